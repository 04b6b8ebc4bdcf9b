"""Text-to-video from clips to a sampled clip, small enough for a CPU: ``python -m mindspeed_model_wan21.demo``.

Makes short clips of a window that moves over photos, trains a tiny VAE for them, encodes them, trains a tiny network
with two processes until it knows them by heart, exports it as a diffusers pipeline, samples each clip from its caption
and draws original, reconstruction and sample side by side.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from mindspeed_model_core import metrics
from mindspeed_model_core.data.media import contact_sheet, read_frames, write_video
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.showcase import Showcase, console, labelled, larger, main, photo, psnr
from torch import Tensor

from .encoders import Encoders
from .tiny import train_tiny_vae, write_tiny_encoders

CLIPS = {"an astronaut smiles": "astronaut.png", "a cat looks up": "chelsea.png"}
FRAMES, SIDE, FPS = 5, 48, 8
VAE_STEPS, BAR = 150, 20.0
shows = Showcase("wan21", __package__ or "mindspeed_model_wan21")


def pan(file: Path) -> Tensor:
    """Return a window moving right over the middle of a photo, uint8 ``[frames, 3, side, side]``."""
    whole = read_frames(file, 1, fps=1, size=(2 * SIDE, 2 * SIDE))[0]
    places = [round(SIDE * 0.6 * frame / (FRAMES - 1)) for frame in range(FRAMES)]
    return torch.stack([whole[:, SIDE // 4 : SIDE // 4 + SIDE, x : x + SIDE] for x in places])


def make_clips(folder: Path) -> tuple[Path, list[Tensor]]:
    """Write the clips and the list that names them with their captions; return the list and the clips."""
    clips, lines = [], []
    for number, (caption, name) in enumerate(CLIPS.items()):
        clips.append(pan(photo(name)))
        write_video(folder / f"{number}.mp4", clips[-1], FPS)
        lines.append(json.dumps({"video": f"{number}.mp4", "caption": caption}))
    listed = folder / "clips.jsonl"
    listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(f"{len(clips)} clips of {FRAMES} frames, {SIDE}x{SIDE}, in {folder}")
    return listed, clips


def demo(
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where everything goes; by default a new folder below runs/.")
    ] = None,
) -> None:
    """Train a tiny text-to-video network on real clips on this machine's CPU, and sample them again."""
    begun = time.perf_counter()
    work = shows.folder(folder)

    shows.heading("Short clips of real photos, and a tiny VAE and text encoder for them")
    listed, clips = make_clips(work / "clips")
    encoders = write_tiny_encoders(work / "encoders", image=False)
    quality = train_tiny_vae(encoders, clips, VAE_STEPS)
    console.print(f"the VAE reconstructs them at {quality:.1f} dB")

    shows.heading("Encode clips and captions once")
    size = ["--height", str(SIDE), "--width", str(SIDE), "--frames", str(FRAMES), "--fps", str(FPS)]
    shows.run("prepare", str(listed), str(work / "features"), "--encoders", str(encoders), *size)

    shows.heading("Train with two processes, until the network knows the clips by heart")
    values = [f"data.path={work / 'features'}", f"data.encoders={encoders}", "metrics.every=50"]
    shows.run("train", "tiny-t2v", *values, "--nproc", "2", "--run-dir", str(work / "run"))
    losses = [float(record["loss"]) for record in metrics.read(work / "run")]
    console.print(
        f"loss {losses[0]:.2f} at first, {sum(losses[-3:]) / 3:.3f} at the end: {work / 'run' / metrics.CHART}"
    )

    shows.heading("Export it as a diffusers pipeline, and sample each clip from its caption")
    shows.run("convert", str(work / "run"), str(work / "exported"), "--layout", "hub")
    rows, opened = [], Encoders(encoders, text_dtype=torch.float32)
    for number, (caption, clip) in enumerate(zip(CLIPS, clips, strict=True)):
        out = work / f"sampled-{number}.mp4"
        options = [*size, "--out", str(out), "--steps", "30", "--guidance", "1", "--seed", str(number)]
        shows.run("generate", str(work / "exported"), "--prompt", caption, *options)
        best = opened.decode(opened.video(clip[None]))[0].cpu()
        sampled = read_frames(out, FRAMES, fps=FPS, size=(SIDE, SIDE))
        named = {"original": clip, "the VAE's\nreconstruction": best, "sample": sampled}
        rows += [labelled(larger(row), text) for text, row in named.items()]
        reached = psnr(sampled, best)
        console.print(f"{caption!r}: {reached:.1f} dB from the VAE's own reconstruction (bar: {BAR:.0f})")
        if reached < BAR:
            raise UserError(f"{out}: {reached:.1f} dB from the reconstruction, the bar is {BAR:.0f}")
    sheet = work / "contact-sheet.png"
    contact_sheet(sheet, rows)
    console.print(f"original, the VAE's reconstruction and sample of each clip: {sheet}")
    console.print("The tiny VAE blurs: no sample can be sharper than its reconstruction.")
    console.print(f"\n[bold green]Done in {time.perf_counter() - begun:.0f} s.[/bold green] Everything is in {work}.")


if __name__ == "__main__":
    main(demo)
