"""What the models' demonstrations share: headings, commands as a user types them, a folder of their own, tiny parts."""

from __future__ import annotations

import math
import os
import shlex
import string
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

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


def train_vae(vae: Any, samples: Sequence[Tensor], steps: int) -> tuple[float, Tensor]:
    """Train one of diffusers' VAEs to reconstruct ``samples``, each ``[1, 3, ...]`` in [-1, 1].

    Return its PSNR on them in dB, and their latents ``[channels, all]``, by which they may be normalised.
    """
    vae.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        sample = samples[step % len(samples)]
        z = vae.encode(sample).latent_dist.mode()
        # Noise keeps the latents from hiding detail in digits that a sampler cannot hit.
        noise = torch.randn(z.shape, generator=generator) * 0.05
        # Not clamped as pictures are: a saturated pixel would get no gradient.
        error = (vae.decode(z + noise).sample - sample).square().mean() + 1e-4 * z.square().mean()
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    vae.requires_grad_(False).eval()
    with torch.no_grad():
        latents = [vae.encode(sample).latent_dist.mode() for sample in samples]
        errors = [(vae.decode(z).sample - s).square().mean() for z, s in zip(latents, samples, strict=True)]
    return -10 * math.log10(float(torch.stack(errors).mean()) / 4), torch.cat([z[0].flatten(1) for z in latents], 1)


def psnr(got: Tensor, want: Tensor) -> float:
    """Return the peak signal-to-noise ratio of uint8 pictures in dB."""
    error = (got.float() - want.float()).square().mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-9))


def larger(frames: Tensor, times: int = 3) -> Tensor:
    """Return pictures ``[..., height, width]`` whose pixels are so many times as wide and as high."""
    return frames.repeat_interleave(times, -1).repeat_interleave(times, -2)


def labelled(row: Tensor, text: str) -> Tensor:
    """Return frames uint8 ``[frames, 3, height, width]`` after one that says what they are."""
    from PIL import Image, ImageDraw

    _, _, height, width = row.shape
    tile = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(tile).multiline_text((4, height / 2), text, fill="black")
    pixels = torch.frombuffer(bytearray(tile.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return torch.cat((pixels.permute(2, 0, 1)[None], row))


def photo(name: str) -> Path:
    """Return the file of one of scikit-image's photos; UserError if that is not installed."""
    try:
        import skimage
    except ImportError:
        raise UserError("the demonstration takes its photos from scikit-image; pip install scikit-image") from None
    return Path(skimage.__file__).parent / "data" / name


def letters() -> Any:
    """Return a T5 tokenizer whose words are the printable characters: pad 0, end 1, unknown 2."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("\u2581", -2.0)]
    pieces += [(letter, -4.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=pieces, extra_ids=0)
