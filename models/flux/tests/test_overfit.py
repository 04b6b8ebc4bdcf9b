"""A tiny network learns an edit by heart and makes it again: from files to the pixels by the commands alone."""

from __future__ import annotations

import json
from pathlib import Path

import skimage.data
import torch
from mindspeed_model_core import cli
from mindspeed_model_core.data.media import contact_sheet, read_frames, write_image
from mindspeed_model_core.showcase import larger, psnr
from mindspeed_model_flux import MODEL
from mindspeed_model_flux.encoders import Encoders
from mindspeed_model_flux.tiny import train_tiny_vae, write_tiny_encoders
from torch import Tensor
from typer.testing import CliRunner

SIDE = 32
BAR = 25.0
"""PSNR in dB between what is made and the VAE's own reconstruction of what was to be made."""


def crop(photo: str) -> Tensor:
    """Return the middle of a photo a quarter its size, uint8 ``[3, H, W]``."""
    pixels = torch.from_numpy(getattr(skimage.data, photo)()).permute(2, 0, 1)[:, ::4, ::4]
    return pixels[:, 15 : 15 + SIDE, 40 : 40 + SIDE].contiguous()


def command(*words: str | Path) -> None:
    done = CliRunner().invoke(cli.app(MODEL), [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)


def test_an_edit_learned_by_heart_is_made_again(tmp_path: Path) -> None:
    """Two references with one prompt: which image is made of it, the reference alone can tell."""
    wanted = [crop("astronaut"), crop("chelsea")]
    rows = []
    for number, image in enumerate(wanted):
        write_image(tmp_path / f"{number}.png", image)
        write_image(tmp_path / f"{number}-before.png", image.flip(2).float().mean(0).byte().expand(3, -1, -1))
        rows.append({"image": f"{number}.png", "text": "colours", "reference": f"{number}-before.png"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoders = write_tiny_encoders(tmp_path / "encoders")
    before = [read_frames(tmp_path / f"{number}-before.png", 1, fps=None, size=(SIDE, SIDE))[0] for number in (0, 1)]
    train_tiny_vae(encoders, [*wanted, *before], steps=150)

    size = ["--height", str(SIDE), "--width", str(SIDE), "--text-tokens", "8"]
    features, run = tmp_path / "features", tmp_path / "run"
    command("prepare", tmp_path / "pairs.jsonl", features, "--pairs", "--encoders", encoders, *size)
    data = [f"data.path={features}", f"data.encoders={encoders}", f"data.height={SIDE}", f"data.width={SIDE}"]
    fast = ["data.text_tokens=8", "steps=200", "micro_batch=4", "checkpoint.every=200", "metrics.every=100"]
    command("train", "tiny-kontext", *data, *fast, "--run-dir", run)

    opened = Encoders(encoders, text_dtype=torch.float32)
    best = [opened.decode(opened.images(image[None]))[0] for image in wanted]
    made = []
    for number in (0, 1):
        out = tmp_path / f"made-{number}.png"
        given = ["--prompt", "colours", "--image", tmp_path / f"{number}-before.png", "--guidance", "1"]
        command("generate", run, *given, *size, "--out", out, "--steps", "20", "--seed", number)
        made.append(read_frames(out, 1, fps=None, size=(SIDE, SIDE))[0])
    contact_sheet(tmp_path / "sheet.png", [larger(torch.stack(row), 4) for row in (wanted, before, best, made)])
    reached = [psnr(got, want) for got, want in zip(made, best, strict=True)]
    wrong = [psnr(got, want) for got, want in zip(made, best[::-1], strict=True)]
    print(f"made: {reached} dB; of the other reference: {wrong} dB")
    assert min(reached) > BAR > 5 + max(wrong), (reached, wrong, tmp_path / "sheet.png")
