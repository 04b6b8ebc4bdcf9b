"""The ``generate`` command: Llama-2 continues a text or holds a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from mindspeed_model_core import device as devices
from mindspeed_model_core import weights
from mindspeed_model_core.data.tokenizer import find_tokenizer
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.generation import Chat, Sampler, begin, converse, generate, show
from rich.console import Console
from rich.text import Text

from .data import fitting_tokenizer
from .model import Llama2

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Llama2Chat(Chat):
    """Meta's chat format: every turn is ``<s>[INST] question [/INST] answer </s>``.

    The first question begins with ``<<SYS>>`` and ``<</SYS>>`` around the system prompt, if there is one.
    """

    def turn(self, text: str, *, first: bool) -> list[int]:
        """Return the tokens of one question."""
        system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if first and self.system else ""
        return begin(self.tokenizer, f"[INST] {system}{text.strip()} [/INST]")


def load_net(source: Path, device: torch.device, dtype: torch.dtype) -> Llama2:
    """Return the network of a hub folder, an original release or a run's checkpoint, whole on one device."""
    from . import MODEL

    with torch.device("meta"):
        net = Llama2(weights.read_config(source, MODEL))
    try:
        net = net.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        weights.load(net, source, MODEL)
    except torch.OutOfMemoryError:
        size = sum(p.numel() for p in net.parameters()) * dtype.itemsize / 1e9
        raise UserError(f"{source}: {size:.1f} GB of weights do not fit on {device}; try --device cpu") from None
    return net


def generate_command(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A hub folder, an original release or a run's folder or checkpoint.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text to continue; may be given several times.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with a chat model; /reset forgets, /exit ends.")] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="How the chat model should behave, told before the first turn.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="0: always the likeliest token; higher: more varied.")
    ] = 0.6,
    top_k: Annotated[int, typer.Option(metavar="K", min=0, help="Draw among the K likeliest tokens only; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Draw among the fewest tokens with this probability together; 1: all.")
    ] = 0.9,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same text.")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The tokenizer's folder.  \\[default: the one of SRC]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="KIND", help="npu, cuda or cpu.  \\[default: the first one present]")
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Precision.  \\[default: fp32 on cpu, else bf16]")
    ] = None,
) -> None:
    """Continue a text or hold a conversation, shown as it is generated.

    SRC is what training or 'convert' wrote, or a downloaded folder; weights are read as they are, on one device.
    Base models continue a --prompt; models trained for conversation answer in a --chat.

    [bold]Examples[/bold]

    \b
    [green]$ mindspeed-llama2 generate Llama-2-7b-hf --prompt "The capital of France is"[/green]
    [green]$ mindspeed-llama2 generate runs/first --prompt "Once upon a time" --temperature 0[/green]
    [green]$ mindspeed-llama2 generate Llama-2-7b-chat-hf --chat --system "Answer briefly."[/green]
    """
    if chat == bool(prompt):
        raise UserError("generate: give either --prompt TEXT, to be continued, or --chat, to talk")
    if system is not None and not chat:
        raise UserError("--system: is for --chat; put it into the --prompt")
    sampler = Sampler(temperature, top_k, top_p, seed)
    place = devices.pick(device)
    kind = DTYPES[dtype or ("fp32" if place.type == "cpu" else "bf16")]
    notes = Console(stderr=True)
    with notes.status(f"loading {source}"):
        words_source = tokenizer or find_tokenizer(source)
        net = load_net(source, place, kind)
        if words_source is None:
            raise UserError(f"{source}: no tokenizer there; name a folder with one: --tokenizer DIR")
        words = fitting_tokenizer(words_source, net.config)
    if chat:
        converse(Llama2Chat(net, words, sampler, max_new_tokens=max_new_tokens, system=system))
        return
    console = Console(highlight=False, soft_wrap=True)
    for text in prompt or ():
        console.print(Text(text, style="bold"), end="")
        pieces = generate(
            net,
            words,
            text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        show(pieces)
