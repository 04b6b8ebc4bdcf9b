"""Sampling: the same video as diffusers' own pipeline from an exported folder, on one process and on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import weights
from mindspeed_model_core.data.media import probe, read_frames
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.parallel.mesh import open_mesh
from mindspeed_model_core.recipe import ParallelConfig
from mindspeed_model_core.testing.dist import run_dist
from mindspeed_model_core.testing.suite import open_net, randomise
from mindspeed_model_wan21 import MODEL
from mindspeed_model_wan21.encoders import Encoders
from mindspeed_model_wan21.generate import Sampling, generate_command, load_network, sample
from mindspeed_model_wan21.tiny import write_tiny_encoders
from torch import Tensor

SIZE: dict[str, Any] = {"height": 32, "width": 48, "frames": 5, "steps": 3, "seed": 4}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text-to-video weights in diffusers' layout, with its encoders."""
    return write_hub(tmp_path_factory.mktemp("wan") / "hub", "tiny-t2v")


def write_hub(folder: Path, preset: str, *, image: bool = True) -> Path:
    net = open_net(MODEL, MODEL.presets[preset])
    randomise(net, seed=3)
    encoders = write_tiny_encoders(folder.with_name("encoders"), image=image)
    weights.save(net.named_parameters(), net.config, MODEL.layouts[0], folder, extras_from=encoders)
    return folder


def ours(folder: Path, what: Sampling, layout: dict[str, int] | None = None) -> Tensor:
    mesh = open_mesh(ParallelConfig(**(layout or {})), torch.device("cpu"))
    net = load_network(folder, MODEL, mesh, torch.float32)
    return sample(net, Encoders(folder, text_dtype=torch.float32), what)


def theirs(folder: Path, what: Sampling) -> Tensor:
    """Sample with diffusers alone, from the exported folder."""
    from diffusers import DiffusionPipeline, WanPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline, WanPipeline)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        prompt=what.prompt,
        negative_prompt=what.negative,
        height=what.height,
        width=what.width,
        num_frames=what.frames,
        num_inference_steps=what.steps,
        guidance_scale=what.guidance,
        generator=torch.Generator().manual_seed(what.seed),
        output_type="pt",
    ).frames[0]
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parity
def test_samples_what_diffusers_samples(hub: Path) -> None:
    what = Sampling("a red square", **SIZE)
    got, want = ours(hub, what), theirs(hub, what)
    assert got.shape == (5, 3, 32, 48) and want.float().std() > 5
    assert (got.int() - want.int()).abs().max() <= 1  # a rounding of the last bit


@pytest.mark.parity
def test_an_original_release_becomes_the_same_pipeline(tmp_path: Path) -> None:
    """VAE, text encoder and tokenizer go to the original layout and back with the network, and sample the same."""
    hub = write_hub(tmp_path / "hub", "tiny-t2v", image=False)
    weights.convert(hub, tmp_path / "release", MODEL, "original")
    assert {p.name for p in (tmp_path / "release").iterdir()} >= {"Wan2.1_VAE.pth", "google"}
    weights.convert(tmp_path / "release", tmp_path / "back", MODEL, "hub")
    what = Sampling("a red square", **SIZE)
    assert torch.equal(theirs(tmp_path / "back", what), theirs(hub, what))


@pytest.mark.dist
@pytest.mark.parametrize("layout", [{"tp": 2}, {"cp": 2}, {"tp": 2, "cp": 2}], ids=str)
def test_processes_sample_what_one_does(hub: Path, layout: dict[str, int]) -> None:
    what = Sampling("a red square", **SIZE)
    alone = ours(hub, what)
    world = layout.get("tp", 1) * layout.get("cp", 1)
    for got in run_dist(ours, world, hub, what, layout):
        assert (got.int() - alone.int()).abs().max() <= 1


def test_writes_a_video_of_the_given_frame(tmp_path: Path) -> None:
    """Image-to-video through the command; another first frame makes another video."""
    from PIL import Image

    folder = write_hub(tmp_path / "hub", "tiny-i2v")
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{name}.png")
    options: dict[str, Any] = {"prompt": "a square", "height": 32, "width": 48, "frames": 5, "steps": 2}
    for name in ("red", "blue"):
        generate_command(folder, out=tmp_path / f"{name}.mp4", image=tmp_path / f"{name}.png", **options)
    clip = probe(tmp_path / "red.mp4")
    assert (clip.width, clip.height, clip.frames) == (48, 32, 5)
    red, blue = (read_frames(tmp_path / f"{n}.mp4", 5, fps=16.0, size=(32, 48)).float() for n in ("red", "blue"))
    assert (red - blue).abs().mean() > 1


def test_mistakes_are_one_line(hub: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": tmp_path / "no.png"}, "--image"),
        ({"height": 40}, "--height=40: must be a multiple of 16; try 32"),
        ({"frames": 6}, "--frames=6: must be 4n \\+ 1; try 5"),
        ({"dtype": "fp8"}, "--dtype=fp8"),
        ({"out": tmp_path / "a.gif"}, "written as .mp4"),
        ({"encoders": tmp_path}, "no vae/"),
    ]
    for options, said in cases:
        with pytest.raises(UserError, match=said):
            generate_command(hub, **{"prompt": "x", "out": out, "width": 48, "frames": 5, "height": 32, **options})
    out.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        generate_command(hub, prompt="x", out=out)
    assert out.read_text() == "mine"
