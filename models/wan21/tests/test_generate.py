"""Sampling: the same video as diffusers' own pipeline from an exported folder, on one process and on several."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from mindspeed_model_core import weights
from mindspeed_model_core.cli import app
from mindspeed_model_core.data.media import probe, read_frames
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.parallel.mesh import open_mesh
from mindspeed_model_core.recipe import ParallelConfig
from mindspeed_model_core.sampling import load_network
from mindspeed_model_core.testing.dist import run_dist
from mindspeed_model_core.testing.suite import open_net, randomise
from mindspeed_model_wan21 import MODEL
from mindspeed_model_wan21.encoders import Encoders
from mindspeed_model_wan21.generate import Sampling, find_shift, generate_command, sample
from mindspeed_model_wan21.tiny import IMAGE_TOKENS, write_tiny_encoders
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

SIZE: dict[str, Any] = {"height": 32, "width": 48, "frames": 5, "steps": 3, "seed": 4}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text-to-video weights in diffusers' layout, with its encoders."""
    return write_hub(tmp_path_factory.mktemp("wan") / "hub", "tiny-t2v")


GIVEN = {"i2v": ("image",), "flf2v": ("image", "last_image")}


@pytest.fixture(scope="module", params=GIVEN)
def image_hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sampling]:
    """A folder of weights that take a first frame, or a first and a last one, and what to sample with it."""
    tmp = tmp_path_factory.mktemp(request.param)
    changes = {"pos_embed_seq_len": 2 * IMAGE_TOKENS} if request.param == "flf2v" else {}
    given = {}
    for name, top in zip(GIVEN[request.param], (40, 140), strict=False):
        given[name] = tmp / f"{name}.png"
        Image.fromarray(skimage.data.astronaut()[top : top + 32, 200:248]).save(given[name])
    return write_hub(tmp / "hub", "tiny-i2v", **changes), Sampling("a red square", **SIZE, **given)


def write_hub(folder: Path, preset: str, *, image: bool = True, **changes: Any) -> Path:
    net = open_net(MODEL, MODEL.presets[preset].model_copy(update=changes))
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
    from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    given = {name: Image.open(file) for name in GIVEN["flf2v"] if (file := getattr(what, name)) is not None}
    assert isinstance(pipeline, WanImageToVideoPipeline if given else WanPipeline)
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
        **given,
    ).frames[0]
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parity
def test_samples_what_diffusers_samples(hub: Path) -> None:
    what = Sampling("a red square", **SIZE)
    got, want = ours(hub, what), theirs(hub, what)
    assert got.shape == (5, 3, 32, 48) and want.float().std() > 5
    assert (got.int() - want.int()).abs().max() <= 1  # a rounding of the last bit


@pytest.mark.parity
def test_continues_frames_as_diffusers_does(image_hub: tuple[Path, Sampling]) -> None:
    folder, what = image_hub
    got, want = ours(folder, what), theirs(folder, what)
    assert got.shape == (5, 3, 32, 48) and want.float().std() > 5
    assert (got.int() - want.int()).abs().max() <= 1
    # What is given matters: exchanged for another picture, it makes another video.
    other = replace(what, **{GIVEN["flf2v" if what.last_image else "i2v"][-1]: what.image.with_name("other.png")})
    Image.fromarray(skimage.data.astronaut()[300:332, 100:148]).save(what.image.with_name("other.png"))
    assert (ours(folder, other).int() - got.int()).abs().max() > 1


def test_a_picture_of_another_aspect_is_cropped(image_hub: tuple[Path, Sampling], tmp_path: Path) -> None:
    """To its middle, as clips are in training; stretched, as diffusers' pipeline has it, it makes another video."""
    folder, what = image_hub
    tall = skimage.data.astronaut()[40:104, 200:248]
    pictures = {"tall": tall, "middle": tall[16:48], "squeezed": tall[::2]}
    made = {}
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        made[name] = ours(folder, replace(what, image=tmp_path / f"{name}.png"))
    assert torch.equal(made["tall"], made["middle"]) and not torch.equal(made["tall"], made["squeezed"])


def test_the_shift_is_that_of_the_folder(hub: Path, image_hub: tuple[Path, Sampling], tmp_path: Path) -> None:
    """What the release has for its kind is written on export; what a folder says goes before it."""
    folder, what = image_hub
    assert find_shift(hub) == find_shift(hub / "transformer") == 5
    assert find_shift(folder) == (16 if what.last_image else 3) and find_shift(tmp_path) is None
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text('{"flow_shift": 7}')
    for part in ("vae", "text_encoder", "tokenizer", "transformer"):
        (tmp_path / part).symlink_to(hub / part)
    words = ["generate", "--prompt", "x", "--height", "32", "--width", "48", "--frames", "5", "--steps", "2"]
    sampled = {}
    for name, source, given in (("7", tmp_path, []), ("given", hub, ["--shift", "7"]), ("5", hub, [])):
        done = CliRunner().invoke(app(MODEL), [*words, str(source), *given, "--out", str(tmp_path / f"{name}.mp4")])
        assert done.exit_code == 0, done.output
        sampled[name] = (tmp_path / f"{name}.mp4").read_bytes()
    assert sampled["7"] == sampled["given"] != sampled["5"]
    scheduler.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 8}')
    assert find_shift(tmp_path) == 8
    for text, said in {
        '{"flow_shift": "much"}': "flow_shift='much': expected a number above 0; or give --shift",
        '{"flow_shift": 5, "prediction_type": "epsilon"}': "prediction_type='epsilon' is not supported, Wan2.1 has pre",
        '{"flow_shift": 5, "use_karras_sigmas": true}': "use_karras_sigmas=True is not supported",
        '{"_class_name": "DDIMScheduler"}': "_class_name='DDIMScheduler': known are UniPC.*; or give --shift",
    }.items():
        scheduler.write_text(text)
        with pytest.raises(UserError, match=f"scheduler_config.json: {said}"):
            find_shift(tmp_path)


@pytest.mark.parity
def test_an_original_release_becomes_the_same_pipeline(tmp_path: Path) -> None:
    """VAE, text encoder and tokenizer go to the original layout and back with the network, and sample the same."""
    hub = write_hub(tmp_path / "hub", "tiny-t2v", image=False)
    weights.convert(hub, tmp_path / "release", MODEL, "original")
    assert {p.name for p in (tmp_path / "release").iterdir()} >= {"Wan2.1_VAE.pth", "google"}
    with pytest.raises(UserError, match="of an original release are not read; .*convert .*release DST --layout hub'"):
        generate_command(tmp_path / "release", prompt="x", out=tmp_path / "a.mp4")
    weights.convert(tmp_path / "release", tmp_path / "back", MODEL, "hub")
    what = Sampling("a red square", **SIZE)
    assert torch.equal(theirs(tmp_path / "back", what), theirs(hub, what))


@pytest.mark.parametrize("layout", ["hub", "original"])
def test_an_export_that_is_no_pipeline_says_so(hub: Path, tmp_path: Path, layout: str) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "transformer").symlink_to(hub / "transformer")
    said = {}
    for name, words in {"bare": [], "whole": ["--extras-from", str(hub)], "chosen": ["--extras-from", "bare"]}.items():
        words = ["convert", str(tmp_path / "bare"), str(tmp_path / name / layout), "--layout", layout, *words]
        done = CliRunner().invoke(app(MODEL), [str(tmp_path / "bare") if w == "bare" else w for w in words])
        assert done.exit_code == 0, done.output
        said[name] = done.stderr
    assert "what goes with the network was not found" in said["bare"] and "; --extras-from DIR adds it" in said["bare"]
    assert said["whole"] == said["chosen"] == ""


@pytest.mark.dist
@pytest.mark.parametrize("layout", [{"tp": 2}, {"cp": 2}, {"tp": 2, "cp": 2}], ids=str)
def test_processes_sample_what_one_does(hub: Path, layout: dict[str, int]) -> None:
    what = Sampling("a red square", **SIZE)
    alone = ours(hub, what)
    world = layout.get("tp", 1) * layout.get("cp", 1)
    for got in run_dist(ours, world, hub, what, layout):
        assert (got.int() - alone.int()).abs().max() <= 1


@pytest.mark.dist
def test_processes_continue_frames_as_one_does(image_hub: tuple[Path, Sampling]) -> None:
    """Tokens shared out for a first frame, heads for a first and a last one."""
    folder, what = image_hub
    alone = ours(folder, what)
    for got in run_dist(ours, 2, folder, what, {"tp": 2} if what.last_image else {"cp": 2}):
        assert (got.int() - alone.int()).abs().max() <= 1


def test_writes_a_video_of_the_given_frames(image_hub: tuple[Path, Sampling], tmp_path: Path) -> None:
    """Through the command: the video of a seed, another seed's is another, and a frame too few is named."""
    folder, what = image_hub
    given = [("--image", what.image), ("--last-image", what.last_image)]
    words = ["generate", str(folder), "--prompt", what.prompt, "--height", "32", "--width", "48", "--frames", "5"]
    words += [str(word) for option, file in given if file is not None for word in (option, file)]
    videos = []
    for number in (1, 2):
        out = tmp_path / f"{number}.mp4"
        done = CliRunner().invoke(app(MODEL), [*words, "--steps", "2", "--seed", str(number), "--out", str(out)])
        assert done.exit_code == 0, done.output
        clip = probe(out)
        assert (clip.width, clip.height, clip.frames) == (48, 32, 5)
        videos.append(read_frames(out, 5, fps=16.0, size=(32, 48)).float())
    assert (videos[0] - videos[1]).abs().mean() > 1
    few = CliRunner().invoke(app(MODEL), [*words[:-2], "--out", str(tmp_path / "3.mp4")])
    assert few.exit_code == 2 and f"{words[-2]}: this network makes a video from" in few.output


@pytest.mark.parametrize("image_hub", ["i2v"], indirect=True)
def test_libraries_say_nothing_of_what_is_not_used(image_hub: tuple[Path, Sampling], tmp_path: Path) -> None:
    """In a process of its own, where nothing is imported yet."""
    folder, what = image_hub
    given = [("--image", what.image), ("--last-image", what.last_image)]
    words = ["--prompt", "x", "--height", "32", "--width", "48", "--frames", "5", "--steps", "1"]
    words += [str(word) for option, file in given if file is not None for word in (option, file)]
    command = [sys.executable, "-m", "mindspeed_model_wan21", "generate", str(folder), *words]
    done = subprocess.run([*command, "--out", str(tmp_path / "a.mp4")], capture_output=True, text=True, timeout=150)
    shown = [line for line in done.stderr.replace("\r", "\n").splitlines() if not line.startswith("sampling: ")]
    assert done.returncode == 0 and [line for line in shown if line.strip()] == []


def test_mistakes_are_one_line(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.mp4"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": tmp_path / "no.png"}, "--image"),
        ({"height": 40}, "--height=40: must be a multiple of 16; try 32"),
        ({"frames": 6}, "--frames=6: must be 4n \\+ 1; try 5"),
        ({"dtype": "fp8"}, "--dtype=fp8"),
        ({"shift": 0.0}, "--shift=0: must be above 0"),
        ({"frames": -3}, "--frames=-3: must be 4n \\+ 1; try 1"),
        ({"fps": 0.0}, "--fps=0: must be from 1 to 240; nearest: 1"),
        ({"fps": -5.0}, "--fps=-5: .*nearest: 1"),
        ({"guidance": -1.0}, "--guidance=-1: must be from 1 to 100; nearest: 1"),
        ({"guidance": math.inf}, "--guidance=inf: .*nearest: 100"),
        ({"guidance": math.nan}, "--guidance=nan: .*nearest: 1"),
        ({"out": tmp_path / "a.gif"}, "written as .mp4"),
        ({"encoders": tmp_path}, "no vae/"),
        ({"ema": True}, "is not a run, so it has no moving average"),
    ]
    # Nothing is loaded, not to speak of sampled, before a mistake is found.
    monkeypatch.setattr("mindspeed_model_wan21.generate.load_network", None)
    for options, said in cases:
        with pytest.raises(UserError, match=said):
            generate_command(hub, **{"prompt": "x", "out": out, "width": 48, "frames": 5, "height": 32, **options})
    out.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        generate_command(hub, prompt="x", out=out)
    assert out.read_text() == "mine"
    words = ["generate", str(hub), "--prompt", "x", "--out", str(tmp_path / "b.mp4"), "--seed", str(2**63)]
    done = CliRunner().invoke(app(MODEL), words)
    assert done.exit_code == 2 and "--seed" in done.output and str(2**63 - 1) in done.output
