"""Text generation with cached keys and values: streaming, in batches, and as a conversation."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from mindspeed_model_core import device as devices
from mindspeed_model_core import weights
from mindspeed_model_core.data.tokenizer import encode, find_tokenizer
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.nn import KVCache
from rich.console import Console
from rich.text import Text
from torch import Tensor

from .data import fitting_tokenizer
from .model import Llama2

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PREFILL = 512
_WINDOW = 8


class Sampler:
    """Chooses the next token of each row: the likeliest at ``temperature`` 0, else a draw.

    A draw is among the ``top_k`` likeliest tokens (0: all), then among the fewest whose probabilities reach ``top_p``.
    Draws happen on the CPU, so that ``seed`` means the same on every device. Raises UserError for impossible values.
    """

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> None:
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature={temperature}: must be 0 (greedy) or more")
        if top_k < 0:
            raise UserError(f"top_k={top_k}: must be 0 (no limit) or more")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p={top_p}: must be above 0 and at most 1 (no limit)")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return int64 ``[rows]`` on the CPU from ``[rows, vocab]`` logits."""
        if self.temperature == 0:
            return logits.float().argmax(-1).cpu()
        return torch.multinomial(self.probabilities(logits), 1, generator=self.generator)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return what is drawn from, ``[rows, vocab]`` in fp32 on the CPU."""
        scores = logits.float().cpu() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        chances = scores.softmax(-1)
        if self.top_p < 1:
            ordered, order = chances.sort(descending=True, stable=True)
            surplus = ordered.cumsum(-1) - ordered >= self.top_p
            chances = chances.masked_fill(surplus.scatter(-1, order, surplus), 0)
        return chances


class Decoder:
    """Rows of tokens that grow together, and the keys and values of those the network has read."""

    def __init__(self, net: Llama2, rows: int, capacity: int) -> None:
        c, weight = net.config, net.head.weight
        self.net, self.rows = net, rows
        self.cache = KVCache(
            c.num_hidden_layers,
            c.num_key_value_heads,
            c.head_dim,
            capacity,
            batch=rows,
            device=weight.device,
            dtype=weight.dtype,
        )

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """Read int64 ``[rows, new]`` and return the logits ``[rows, vocab]`` of what follows.

        Long inputs are read in parts, which bounds the memory of their logits.
        """
        before = self.cache.length
        try:
            for part in tokens.split(_PREFILL, 1):
                logits = self._read(part)
        except BaseException:  # Ctrl-C too leaves the cache as it was
            self.cache.truncate(before)
            raise
        return logits

    def _read(self, tokens: Tensor) -> Tensor:
        count, held, device = tokens.shape[1], self.cache.length, self.cache.store.device
        batch = {
            "tokens": tokens.flatten().to(device),
            "positions": torch.arange(held, held + count, device=device).repeat(self.rows),
            "lengths": (count,) * self.rows,
            "cache": self.cache,
        }
        return self.net(batch).unflatten(0, (self.rows, count))[:, -1]


class TextStream:
    """Turns tokens into text one at a time, holding back bytes until they make a character.

    ``before`` are the tokens that precede: they decide about a leading space and are not shown.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before)[-_WINDOW:]
        self.start, self.end = 0, len(self.ids)

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes, perhaps none."""
        self.ids.append(token)
        piece = self._rest()
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.start, self.end = self.end, len(self.ids)
        return piece

    def flush(self) -> str:
        """Return what is still held back; incomplete bytes show as U+FFFD."""
        piece = self._rest()
        self.start, self.end = self.end, len(self.ids)
        return piece

    def _rest(self) -> str:
        shown = self._text(self.ids[self.start : self.end])
        return self._text(self.ids[self.start :])[len(shown) :]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode(net: Llama2, prompts: Tensor, sampler: Sampler, max_new_tokens: int) -> Iterator[list[int]]:
    """Yield the next token of each row of ``prompts`` (int64 ``[rows, tokens]``) until all have ended.

    A row that has ended stays at the end token. Stops at the model's context length. Raises UserError for prompts
    that leave no room in it.
    """
    limit, end = net.config.max_position_embeddings, net.config.eos_token_id
    rows, length = prompts.shape
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be 1 or more")
    if length >= limit:
        raise UserError(f"the prompt has {length} tokens; the model's context is {limit} with the answer, shorten it")
    count = min(max_new_tokens, limit - length)
    decoder = Decoder(net, rows, length + count)
    ended = torch.zeros(rows, dtype=torch.bool)
    tokens = prompts
    for _ in range(count):
        chosen = sampler(decoder.feed(tokens)).masked_fill(ended, end)
        ended |= chosen == end
        yield chosen.tolist()
        if ended.all():
            return
        tokens = chosen[:, None]


def begin(tokenizer: Any, text: str) -> list[int]:
    """Return the begin token and the text's."""
    return [tokenizer.bos_token_id, *encode(tokenizer, text)]


def generate(
    net: Llama2,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the prompt's continuation in pieces of whole characters as they are generated.

    Ends at the end token, after ``max_new_tokens`` or at the context length. Raises UserError for impossible values
    and for a prompt longer than the context.
    """
    sampler = Sampler(temperature, top_k, top_p, seed)
    ids = begin(tokenizer, prompt)
    stream = TextStream(tokenizer, ids)
    for (token,) in decode(net, torch.tensor([ids]), sampler, max_new_tokens):
        if token != net.config.eos_token_id and (piece := stream.push(token)):
            yield piece
    if piece := stream.flush():
        yield piece


def complete(
    net: Llama2,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Return the continuations of many prompts; those of equal length in tokens run as one batch."""
    sampler = Sampler(temperature, top_k, top_p, seed)
    ids = [begin(tokenizer, prompt) for prompt in prompts]
    out = [""] * len(prompts)
    for length in sorted({len(row) for row in ids}):
        group = [i for i, row in enumerate(ids) if len(row) == length]
        streams = [TextStream(tokenizer, ids[i]) for i in group]
        for chosen in decode(net, torch.tensor([ids[i] for i in group]), sampler, max_new_tokens):
            for i, stream, token in zip(group, streams, chosen, strict=True):
                if token != net.config.eos_token_id:
                    out[i] += stream.push(token)
        for i, stream in zip(group, streams, strict=True):
            out[i] += stream.flush()
    return out


class Chat:
    """A conversation in Llama-2's chat format; what was said stays in the cache, so each turn reads only itself.

    The format is Meta's: every turn is ``<s>[INST] question [/INST] answer </s>``, and the first question begins with
    ``<<SYS>>`` and ``<</SYS>>`` around the system prompt, if there is one.
    """

    def __init__(
        self, net: Llama2, tokenizer: Any, sampler: Sampler, *, max_new_tokens: int = 512, system: str | None = None
    ) -> None:
        self.net, self.tokenizer, self.sampler = net, tokenizer, sampler
        self.max_new_tokens, self.system = max_new_tokens, system
        self.decoder = Decoder(net, 1, net.config.max_position_embeddings)
        self.pending: list[int] = []
        self.answering = False

    def reset(self) -> None:
        """Forget the conversation."""
        self.decoder.cache.truncate(0)
        self.pending, self.answering = [], False

    def say(self, text: str) -> Iterator[str]:
        """Yield the answer to ``text`` in pieces; one may stop reading at any time and go on with another turn.

        Raises UserError, with the conversation as it was, if the turn does not fit in what is left of the context.
        """
        turn = self._turn(text)
        end = [self.net.config.eos_token_id] if self.answering else []
        used, room = self.decoder.cache.length, self.decoder.cache.capacity
        asked = [*self.pending, *end, *turn]
        if used + len(asked) >= room:
            raise UserError(
                f"the conversation would have {used + len(asked)} tokens and the model's context is {room}; "
                "begin a new one with /reset, or shorten the message"
            )
        self.pending, self.answering = asked, True
        stream = TextStream(self.tokenizer, turn)
        shown = False
        for _ in range(min(self.max_new_tokens, room - used - len(asked))):
            logits = self.decoder.feed(torch.tensor([self.pending]))
            token = int(self.sampler(logits)[0])
            # The cache lags by the newest token: what the network has yet to read goes before the next turn.
            self.pending = [token]
            if token == self.net.config.eos_token_id:
                self.answering = False
                break
            piece = stream.push(token)
            piece = piece if shown else piece.lstrip()
            shown = shown or bool(piece)
            if piece:
                yield piece
        if piece := stream.flush():
            yield piece

    def _turn(self, text: str) -> list[int]:
        first = not self.decoder.cache.length and not self.pending
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
        _converse(Chat(net, words, sampler, max_new_tokens=max_new_tokens, system=system))
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
        _show(pieces)


def _converse(chat: Chat) -> None:
    console = Console(highlight=False)
    prompt = "[bold]> [/bold]" if sys.stdin.isatty() else ""
    if prompt:
        console.print("Ctrl-C stops an answer; /reset begins a new conversation, /exit or Ctrl-D ends.", style="dim")
    while True:
        try:
            line = console.input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/exit":
            return
        if line == "/reset":
            chat.reset()
        elif line.startswith("/"):
            console.print(f"{line.split()[0]}: no such command; /reset or /exit")
        elif line:
            try:
                _show(chat.say(line))
            except UserError as error:
                console.print(Text(str(error)), style="red")


def _show(pieces: Iterator[str]) -> None:
    """Write pieces as they come; Ctrl-C ends them early."""
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    sys.stdout.write("\n")
