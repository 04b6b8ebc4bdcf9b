"""What the models' demonstrations share: headings, commands as a user types them, a folder of their own, tiny parts."""

from __future__ import annotations

import math
import os
import shlex
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer
from rich.console import Console
from torch import nn

from .errors import UserError

N = TypeVar("N", bound=nn.Module)
console = Console(highlight=False, soft_wrap=True)


class Showcase:
    """The demonstration of one model package, by its command's and its import name."""

    def __init__(self, model: str, package: str) -> None:
        self.prog, self.package = f"mindspeed-{model}", package
        self.number = 0

    def heading(self, text: str) -> None:
        """Print what comes next."""
        self.number += 1
        console.print(f"\n[bold cyan]{self.number}. {text}[/bold cyan]")

    def command(self, *arguments: str) -> list[str]:
        """Print a command as a user types it; return it as this interpreter runs it."""
        console.print(f"[bold]$ {self.prog} {shlex.join(arguments)}[/bold]")
        return [sys.executable, "-m", self.package, *arguments]

    def run(self, *arguments: str) -> None:
        """Run a command to its end; raise UserError if it fails."""
        status = subprocess.run(self.command(*arguments)).returncode
        if status:
            raise UserError(f"{self.prog} {arguments[0]} ended with status {status}")

    def folder(self, wanted: Path | None) -> Path:
        """Make the folder everything goes to: the wanted one, or a new one below ``runs``; UserError if it exists."""
        numbers = iter(range(1, 10_000))
        name = f"{self.prog.removeprefix('mindspeed-')}-demo"
        work = wanted or next(p for n in numbers if not (p := Path("runs") / f"{name}-{n}").exists())
        if work.exists():
            raise UserError(f"{work}: exists already; name a new folder")
        work.mkdir(parents=True)
        return work


def main(demo: Callable[..., Any]) -> None:
    """Run a demonstration's command line, on the CPU."""
    os.environ["MINDSPEED_MODEL_DEVICE"] = "cpu"
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "140")  # tables in a log need not fold
    try:
        typer.run(demo)
    except UserError as error:
        sys.exit(f"error: {error}")


# ------------------------------------------------------------------------------------------------ tiny parts


def settle(network: N, seed: int) -> N:
    """Give a network random weights that depend on no library's version and keep activations near 1; return it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() < 2 or "gamma" in name:
                scale = name.endswith(("weight", "gamma"))
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1 + (1.0 if scale else 0.0))
            else:
                inputs = 1 if "embed" in name or "relative" in name else weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(inputs))
    return network.eval()


def letters() -> Any:
    """Return a T5 tokenizer whose words are the printable characters: pad 0, end 1, unknown 2."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("\u2581", -2.0)]
    pieces += [(letter, -4.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=pieces, extra_ids=0)
