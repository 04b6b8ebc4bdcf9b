"""From a folder of photos to sampled images, small enough for a CPU: ``python -m mindspeed_model_flux.demo``.

Crops two photos, trains a tiny VAE for them, encodes them with their captions, trains a tiny network with two
processes until it knows them by heart, exports it as a diffusers pipeline, samples each photo from its caption and
draws original, reconstruction and sample side by side.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from mindspeed_model_core import metrics
from mindspeed_model_core.data.media import contact_sheet, read_frames, write_image
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.showcase import Showcase, console, labelled, larger, main, photo, psnr
from torch import Tensor

from .encoders import Encoders
from .tiny import train_tiny_vae, write_tiny_encoders

PHOTOS = {"an astronaut smiles": "astronaut.png", "a cat looks up": "chelsea.png"}
SIDE, TOKENS = 64, 24
VAE_STEPS, BAR = 300, 20.0
shows = Showcase("flux", __package__ or "mindspeed_model_flux")


def make_photos(folder: Path) -> list[Tensor]:
    """Write the photos, each with its caption beside it; return them, uint8 ``[3, side, side]``."""
    folder.mkdir()
    made = []
    for number, (caption, name) in enumerate(PHOTOS.items()):
        made.append(read_frames(photo(name), 1, fps=None, size=(SIDE, SIDE))[0])
        write_image(folder / f"{number}.png", made[-1])
        (folder / f"{number}.txt").write_text(caption + "\n", encoding="utf-8")
    console.print(f"{len(made)} photos of {SIDE}x{SIDE} with their captions in {folder}")
    return made


def demo(
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where everything goes; by default a new folder below runs/.")
    ] = None,
) -> None:
    """Train a tiny text-to-image network on real photos on this machine's CPU, and sample them again."""
    begun = time.perf_counter()
    work = shows.folder(folder)

    shows.heading("Real photos with captions, and a tiny VAE and text encoders for them")
    photos = make_photos(work / "photos")
    encoders = write_tiny_encoders(work / "encoders")
    quality = train_tiny_vae(encoders, photos, VAE_STEPS)
    console.print(f"the VAE reconstructs them at {quality:.1f} dB")

    shows.heading("Encode photos and captions once")
    size = ["--height", str(SIDE), "--width", str(SIDE), "--text-tokens", str(TOKENS)]
    shows.run("prepare", str(work / "photos"), str(work / "features"), "--encoders", str(encoders), *size)

    shows.heading("Train with two processes, until the network knows the photos by heart")
    values = [f"data.path={work / 'features'}", f"data.encoders={encoders}", f"data.text_tokens={TOKENS}"]
    shows.run("train", "tiny", *values, "metrics.every=50", "--nproc", "2", "--run-dir", str(work / "run"))
    losses = [float(record["loss"]) for record in metrics.read(work / "run")]
    console.print(
        f"loss {losses[0]:.2f} at first, {sum(losses[-3:]) / 3:.3f} at the end: {work / 'run' / metrics.CHART}"
    )

    shows.heading("Export it as a diffusers pipeline, and sample each photo from its caption")
    shows.run("convert", str(work / "run"), str(work / "exported"), "--layout", "hub")
    rows: dict[str, list[Tensor]] = {"original": photos, "the VAE's\nreconstruction": [], "sample": []}
    opened = Encoders(encoders, text_dtype=torch.float32)
    for number, (caption, image) in enumerate(zip(PHOTOS, photos, strict=True)):
        out = work / f"sampled-{number}.png"
        options = [*size, "--out", str(out), "--steps", "20", "--guidance", "1", "--seed", str(number)]
        shows.run("generate", str(work / "exported"), "--prompt", caption, *options)
        best = opened.decode(opened.images(image[None]))[0].cpu()
        sampled = read_frames(out, 1, fps=None, size=(SIDE, SIDE))[0]
        rows["the VAE's\nreconstruction"].append(best)
        rows["sample"].append(sampled)
        reached = psnr(sampled, best)
        console.print(f"{caption!r}: {reached:.1f} dB from the VAE's own reconstruction (bar: {BAR:.0f})")
        if reached < BAR:
            raise UserError(f"{out}: {reached:.1f} dB from the reconstruction, the bar is {BAR:.0f}")
    sheet = work / "contact-sheet.png"
    contact_sheet(sheet, [labelled(larger(torch.stack(row)), text) for text, row in rows.items()])
    console.print(f"original, the VAE's reconstruction and sample of each photo: {sheet}")
    console.print("The tiny VAE blurs: no sample can be sharper than its reconstruction.")
    console.print(f"\n[bold green]Done in {time.perf_counter() - begun:.0f} s.[/bold green] Everything is in {work}.")


if __name__ == "__main__":
    main(demo)
