"""What the models' demonstrations share: numbered headings, commands as a user types them, a folder of their own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from .errors import UserError

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
