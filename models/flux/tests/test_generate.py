"""Sampling: the same image as diffusers' own pipeline from an exported folder, on one process and on several."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from mindspeed_model_core import train, weights
from mindspeed_model_core.cli import app
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.parallel.mesh import open_mesh
from mindspeed_model_core.recipe import ParallelConfig
from mindspeed_model_core.sampling import load_network
from mindspeed_model_core.testing.dist import run_dist
from mindspeed_model_core.testing.suite import open_net, randomise
from mindspeed_model_flux import MODEL
from mindspeed_model_flux.encoders import Encoders
from mindspeed_model_flux.generate import Sampling, generate_command, make_scheduler, sample, settle
from mindspeed_model_flux.task import FluxRecipe
from mindspeed_model_flux.tiny import write_tiny_encoders
from mindspeed_model_flux.weights import is_bare
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from .photos import write_photos

SIZE: dict[str, Any] = {"height": 32, "width": 48, "steps": 3, "seed": 4, "text_tokens": 24}


@pytest.fixture(scope="module", params=[False, True], ids=["dev", "kontext"])
def hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sampling]:
    """A folder of weights in diffusers' layout with its encoders, and what to sample from it."""
    tmp = tmp_path_factory.mktemp("flux")
    net = open_net(MODEL, MODEL.presets["tiny"].model_copy(update={"kontext": request.param}))
    randomise(net, seed=3)
    encoders = write_tiny_encoders(tmp / "encoders")
    weights.save(net.named_parameters(), net.config, MODEL.layouts[0], tmp / "hub", extras_from=encoders)
    photo = tmp / "photo.png"
    Image.fromarray(skimage.data.astronaut()[40:72, 200:248]).save(photo)
    return tmp / "hub", Sampling("a red square", photo if request.param else None, **SIZE)


def ours(folder: Path, what: Sampling, layout: dict[str, int] | None = None) -> Tensor:
    mesh = open_mesh(ParallelConfig(**(layout or {})), torch.device("cpu"))
    net = load_network(folder, MODEL, mesh, torch.float32)
    return sample(net, Encoders(folder, text_dtype=torch.float32), what, make_scheduler(folder, net.config))


def theirs(folder: Path, what: Sampling) -> Tensor:
    """Sample with diffusers alone, from the exported folder."""
    from diffusers import DiffusionPipeline, FluxKontextPipeline, FluxPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is (FluxPipeline if what.image is None else FluxKontextPipeline)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {}
    if what.image is not None:
        given = {"image": Image.open(what.image), "max_area": 32 * 48, "_auto_resize": False}
    frames = pipeline(
        prompt=what.prompt,
        height=what.height,
        width=what.width,
        num_inference_steps=what.steps,
        guidance_scale=what.guidance or (3.5 if what.image is None else 2.5),
        max_sequence_length=what.text_tokens,
        generator=torch.Generator().manual_seed(what.seed),
        output_type="pt",
        **given,
    ).images[0]
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parity
def test_samples_what_diffusers_samples(hub: tuple[Path, Sampling]) -> None:
    folder, what = hub
    got, want = ours(folder, what), theirs(folder, what)
    assert got.shape == (3, 32, 48) and want.float().std() > 5
    assert (got.int() - want.int()).abs().max() <= 1  # a rounding of the last bit
    # All that is given matters: another makes another image.
    for name, value in (("guidance", 9.0), ("seed", 5), ("prompt", "blue"), ("text_tokens", 30)):
        assert (ours(folder, replace(what, **{name: value})).int() - got.int()).abs().max() > 1, name
    if what.image is not None:
        other = what.image.with_name("other.png")
        Image.fromarray(skimage.data.astronaut()[300:332, 100:148]).save(other)
        assert (ours(folder, replace(what, image=other)).int() - got.int()).abs().max() > 1


@pytest.mark.dist
@pytest.mark.parametrize("layout", [{"tp": 2}, {"cp": 2}], ids=str)
def test_several_processes_sample_the_same(hub: tuple[Path, Sampling], layout: dict[str, int]) -> None:
    folder, what = hub
    alone = ours(folder, what)
    for made in run_dist(ours, 2, folder, what, layout):
        assert (made.int() - alone.int()).abs().max() <= 1


@pytest.mark.parity
def test_a_run_is_sampled_as_what_is_exported_of_it(tmp_path: Path) -> None:
    """Trained on a folder of photos by the encoders it names; the export is a pipeline of diffusers."""
    encoders = write_tiny_encoders(tmp_path / "encoders")
    write_photos(tmp_path / "photos", [(32, 48)] * 2).unlink()
    recipe = FluxRecipe.model_validate(
        {
            "preset": "tiny",
            "precision": "fp32",
            "steps": 2,
            "global_batch": 2,
            "data": {
                **{"path": str(tmp_path / "photos"), "prompt": "a photo", "encoders": str(encoders)},
                **{"height": 32, "width": 48, "text_tokens": 24},
            },
            "optim": {"lr": 0.05, "schedule": "constant"},
            "metrics": {"trackers": ()},
        }
    )
    train.run(recipe, MODEL, tmp_path / "run")
    weights.convert(tmp_path / "run", tmp_path / "exported", MODEL, "hub")
    what = Sampling("a photo", **SIZE)
    want = theirs(tmp_path / "exported", what)
    words = ["generate", str(tmp_path / "run"), "--prompt", "a photo", "--out", str(tmp_path / "made.png")]
    sizes = ["--height", "32", "--width", "48", "--steps", "3", "--seed", "4"]  # as many tokens of text as in training
    # The text is encoded in the type of the network.
    done = CliRunner().invoke(app(MODEL), [*words, *sizes, "--dtype", "fp32"])
    assert done.exit_code == 0 and "made.png: 48x32" in done.output, done.output
    made = torch.from_numpy(np.array(Image.open(tmp_path / "made.png"))).permute(2, 0, 1)
    assert (made.int() - want.int()).abs().max() <= 1


@pytest.mark.parity
def test_schnell_is_sampled_as_diffusers_does(tmp_path: Path) -> None:
    """From a release, which becomes a pipeline; its levels are not shifted, and it is told no guidance."""
    net = open_net(MODEL, MODEL.presets["tiny"].model_copy(update={"guidance_embeds": False}))
    randomise(net, seed=3)
    encoders = write_tiny_encoders(tmp_path / "encoders")
    weights.save(net.named_parameters(), net.config, MODEL.layouts[1], tmp_path / "release")
    weights.convert(tmp_path / "release", tmp_path / "hub", MODEL, "hub", extras_from=encoders)
    said = json.loads((tmp_path / "hub" / "scheduler" / "scheduler_config.json").read_text())
    assert (said["shift"], said["use_dynamic_shifting"]) == (1.0, False)
    assert make_scheduler(tmp_path / "release", net.config).sigmas[1] == pytest.approx(0.999)
    what = Sampling("a red square", **SIZE)
    want = theirs(tmp_path / "hub", what)
    assert (ours(tmp_path / "hub", what).int() - want.int()).abs().max() <= 1
    weights.convert(tmp_path / "hub", tmp_path / "again", MODEL, "original")
    assert (tmp_path / "again" / "flux1-schnell.safetensors").is_file()

    words = ["generate", str(tmp_path / "again"), "--prompt", "a red square", "--encoders", str(encoders)]
    size = ["--height", "32", "--width", "48", "--seed", "4"]
    done = CliRunner().invoke(app(MODEL), [*words, *size, "--out", str(tmp_path / "made.png"), "--dtype", "fp32"])
    assert done.exit_code == 0, done.output
    want = theirs(tmp_path / "hub", replace(what, steps=4, text_tokens=256))
    made = torch.from_numpy(np.array(Image.open(tmp_path / "made.png"))).permute(2, 0, 1)
    assert (made.int() - want.int()).abs().max() <= 1
    with pytest.raises(UserError, match=r"^--guidance=3.5: this network \(schnell\) is told none; leave it out$"):
        generate_command(tmp_path / "hub", prompt="x", out=tmp_path / "a.png", guidance=3.5)


def test_a_transformer_alone_is_kontext_s_with_a_reference(
    hub: tuple[Path, Sampling], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors tell nothing; a pipeline around it says what it is."""
    folder, what = hub
    bare = tmp_path / "transformer"
    shutil.copytree(folder / "transformer", bare)
    monkeypatch.chdir(folder / "transformer")
    assert is_bare(bare) and not is_bare(Path("."))
    photo = tmp_path / "photo.png"
    Image.fromarray(skimage.data.astronaut()[40:72, 200:248]).save(photo)
    for image in (None, photo):
        out = tmp_path / f"{image is not None}.png"
        given = {"encoders": folder, "image": image, "height": 32, "width": 48, "steps": 3, "seed": 4}
        generate_command(bare, prompt=what.prompt, out=out, text_tokens=24, dtype="fp32", **given)  # type: ignore[arg-type]
        if (image is None) == (what.image is None):
            made = torch.from_numpy(np.array(Image.open(out))).permute(2, 0, 1)
            want = ours(folder, replace(what, image=image))
            # The pipeline's own guidance; the scheduler is the release's in both.
            assert (made.int() - want.int()).abs().max() <= 1


def test_what_cannot_be_sampled_is_refused(hub: tuple[Path, Sampling], tmp_path: Path) -> None:
    folder, what = hub

    def refused(message: str, **given: Any) -> None:
        fields = {"prompt": "x", "out": tmp_path / "a.png", "image": what.image, **given}
        with pytest.raises(UserError, match=message):
            generate_command(folder, **fields)

    refused("^--height=250: must be a multiple of 16; try 256$", height=250, width=256)
    refused("^--width: --height is given, so this is required too$", height=256)
    refused("^--guidance=-1: must be from 0 to 100; nearest: 0$", guidance=-1)
    refused("^--out=.*: samples are written as .png or .jpg$", out=tmp_path / "a.mp4")
    if what.image is None:
        refused("^--image=cat.png: this network takes a prompt alone; leave it out$", image=Path("cat.png"))
    else:
        refused("^--image: this network makes an image from another; give it$", image=None)
        refused("cat.png: no such file$", image=tmp_path / "cat.png")
        refused("^--image=.*: is no image", image=folder / "model_index.json")
        Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
        refused("dot.png: is 1 x 1 pixels, the least is 16 along a side$", image=tmp_path / "dot.png")
        said = folder / "scheduler" / "scheduler_config.json"
        before = said.read_text()
        said.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
        refused("_class_name='DDIMScheduler' is not supported, FLUX.1 has FlowMatchEulerDiscreteScheduler")
        said.write_text(before)
    assert not (tmp_path / "a.png").exists()


def test_kontext_keeps_the_aspect_of_its_reference(tmp_path: Path) -> None:
    Image.new("RGB", (1000, 700)).save(tmp_path / "wide.png")
    assert Sampling("x", tmp_path / "wide.png").size == (832, 1248)
    assert Sampling("x").size == (1024, 1024) and Sampling("x", tmp_path / "wide.png", 32, 48).size == (32, 48)


def test_sampling_has_the_defaults_of_diffusers_pipelines() -> None:
    from diffusers import FluxKontextPipeline, FluxPipeline

    dev, schnell = (MODEL.presets[name] for name in ("dev", "schnell"))
    for kind in (FluxPipeline, FluxKontextPipeline):
        found = {name: p.default for name, p in inspect.signature(kind.__call__).parameters.items()}
        ours = settle(dev, Sampling("x"))
        assert ours.steps == found["num_inference_steps"] and ours.text_tokens == found["max_sequence_length"]
        assert ours.guidance == found["guidance_scale"] == 3.5
    assert settle(dev, Sampling("x", Path("cat.png"))).guidance == 2.5
    fast = settle(schnell, Sampling("x"))
    assert (fast.steps, fast.text_tokens) == (4, 256)
    given = Sampling("x", steps=9, guidance=0.0, text_tokens=77)
    assert settle(dev, given) == settle(schnell, given) == given
