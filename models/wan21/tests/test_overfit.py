"""A tiny network learns one clip by heart and samples it again: from a file to the pixels by the commands alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import skimage.data
import torch
import torch.nn.functional as F
from mindspeed_model_core import cli
from mindspeed_model_core.data.media import contact_sheet, read_frames, write_video
from mindspeed_model_wan21 import MODEL
from mindspeed_model_wan21.encoders import Encoders
from mindspeed_model_wan21.tiny import train_tiny_vae, write_tiny_encoders
from torch import Tensor
from typer.testing import CliRunner

FRAMES, SIDE, FPS = 5, 32, 8
SIZE = ["--height", str(SIDE), "--width", str(SIDE), "--frames", str(FRAMES), "--fps", str(FPS)]
BAR = 27.0
"""PSNR in dB between the sample and the VAE's own reconstruction of the clip."""


def pan(photo: str) -> Tensor:
    """Return a window moving right over a photo a quarter its size, uint8 ``[F, 3, H, W]``."""
    pixels = torch.from_numpy(getattr(skimage.data, photo)()).permute(2, 0, 1)[:, ::4, ::4]
    return torch.stack([pixels[:, 15 : 15 + SIDE, x : x + SIDE] for x in range(20, 20 + 4 * FRAMES, 4)])


def psnr(got: Tensor, want: Tensor) -> float:
    error = (got.float() - want.float()).square().mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-9))


def command(*words: str | Path) -> None:
    done = CliRunner().invoke(cli.app(MODEL), [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)


def test_a_clip_learned_by_heart_is_sampled_again(tmp_path: Path) -> None:
    clip, caption = pan("astronaut"), "an astronaut smiles"
    write_video(tmp_path / "clip.mp4", clip, FPS)
    (tmp_path / "clips.jsonl").write_text(json.dumps({"video": "clip.mp4", "caption": caption}) + "\n")
    encoders = write_tiny_encoders(tmp_path / "encoders", image=False)
    train_tiny_vae(encoders, [clip], steps=120)

    features, run, out = tmp_path / "features", tmp_path / "run", tmp_path / "sampled.mp4"
    command("prepare", tmp_path / "clips.jsonl", features, "--encoders", encoders, *SIZE)
    data = [f"data.path={features}", f"data.encoders={encoders}", f"data.height={SIDE}", f"data.width={SIDE}"]
    small = ["config.num_layers=2", "config.num_attention_heads=8", "config.ffn_dim=512", "steps=400", "micro_batch=4"]
    fast = ["optim.lr=5e-3", "optim.min_lr_ratio=0.01", "checkpoint.every=400", "metrics.every=100"]
    command("train", "tiny-t2v", *data, *small, *fast, "--run-dir", run)
    command("generate", run, "--prompt", caption, *SIZE, "--out", out, "--steps", "20", "--guidance", "1")

    opened = Encoders(encoders, text_dtype=torch.float32)
    best, other = (opened.decode(opened.video(c[None]))[0].cpu() for c in (clip, pan("chelsea")))
    sampled = read_frames(out, FRAMES, fps=FPS, size=(SIDE, SIDE))
    contact_sheet(tmp_path / "contact-sheet.png", [larger(c) for c in (clip, best, sampled, other)])
    reached = psnr(sampled, best)
    # What the bar refuses: another clip, this one backwards, without its motion, blurred.
    wrong = {
        "another clip": other,
        "backwards": best.flip(0),
        "a still": best[:1].expand_as(best),
        "the mean frame": best.float().mean(0).expand_as(best),
        "blurred": F.avg_pool2d(best.float(), 5, 1, 2, count_include_pad=False),
    }
    below = {name: round(psnr(frames, best), 1) for name, frames in wrong.items()}
    print(f"sampled: {reached:.1f} dB; {below}")
    assert all(value < BAR - 3 for value in below.values()), below
    assert reached > BAR, f"{reached:.1f} dB; {tmp_path / 'contact-sheet.png'}"


def larger(clip: Tensor) -> Tensor:
    return clip.repeat_interleave(4, -1).repeat_interleave(4, -2)
