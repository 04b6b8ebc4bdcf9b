"""Continuing a text, byte by byte."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from mindspeed_model_core import device as devices
from mindspeed_model_core import weights

from .model import Template


def generate(
    net: Template, prompt: str, *, length: int = 200, temperature: float = 0.8, seed: int = 0
) -> Iterator[str]:
    """Yield ``length`` bytes that continue ``prompt``, as text; temperature 0 takes the likeliest byte each time."""
    window, device = net.config.window, next(net.parameters()).device
    draw, decoder = torch.Generator().manual_seed(seed), codecs.getincrementaldecoder("utf-8")("replace")
    known = [0] * window + list(prompt.encode())
    for _ in range(length):
        before = torch.tensor([known[: -window - 1 : -1]], device=device).T
        with torch.no_grad():
            logits = net({"before": before})[0].float().cpu()  # type: ignore[index]
        if temperature == 0:
            byte = int(logits.argmax())
        else:
            byte = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw))
        known.append(byte)
        yield decoder.decode(bytes([byte]))
    yield decoder.decode(b"", final=True)


def load_net(source: Path, device: torch.device) -> Template:
    """Return the network of a hub folder or a run's checkpoint, in fp32 on one device."""
    from . import MODEL

    with torch.device("meta"):
        net = Template(weights.read_config(source, MODEL))
    net = net.to_empty(device=device).requires_grad_(False).eval()
    weights.load(net, source, MODEL)
    return net


def generate_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A hub folder, or a run's folder or checkpoint.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")],
    length: Annotated[int, typer.Option(metavar="N", min=1, help="Bytes to write.")] = 200,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0: always the likeliest byte.")] = 0.8,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=2**63 - 1, help="The same seed gives the same text.")
    ] = 0,
) -> None:
    """Continue a text, shown as it is generated."""
    sys.stdout.write(prompt)
    for piece in generate(load_net(source, devices.pick()), prompt, length=length, temperature=temperature, seed=seed):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
