"""The layouts against diffusers' own converter, and what their folders say of the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import weights
from mindspeed_model_core.cli import app
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing.suite import open_net, randomise
from mindspeed_model_core.weights.layout import Layout
from mindspeed_model_core.weights.source import whole
from mindspeed_model_flux import MODEL, FluxConfig
from mindspeed_model_flux.tiny import write_tiny_encoders
from mindspeed_model_flux.weights import HUB, ORIGINAL
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

TINY = MODEL.presets["tiny"]


def save(folder: Path, layout: Layout, **changes: Any) -> Path:
    net = open_net(MODEL, TINY.model_copy(update=changes))
    randomise(net, seed=3)
    weights.save(net.named_parameters(), net.config, layout, folder)
    return folder


@pytest.mark.parity
@pytest.mark.parametrize("guidance", [True, False])
def test_the_original_layout_becomes_what_diffusers_makes_of_it(guidance: bool) -> None:
    """At dev's width, which diffusers' converter takes for granted; rows are told apart, columns stay as they are."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    config = FluxConfig(num_layers=1, num_single_layers=2, guidance_embeds=guidance)
    shapes, _ = whole(MODEL.build, config)
    first, ours = 0, {}
    for name, shape in shapes.items():
        rows = torch.arange(first, first + shape[0], dtype=torch.int32)
        ours[name] = rows.view(-1, *(1,) * (len(shape) - 1)).expand(shape)
        first += shape[0]

    def split(layout: Layout) -> dict[str, Tensor]:
        bounds = layout.table(config).bind(shapes)
        return {theirs: part for name, whole in ours.items() for theirs, part in bounds[name].split(whole)}

    got, want = convert_flux_transformer_checkpoint_to_diffusers(split(ORIGINAL)), split(HUB)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name].flatten(1)[:, 0] if tensor.dim() > 1 else got[name], _rows(tensor)), name


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)[:, 0] if tensor.dim() > 1 else tensor


@pytest.mark.parametrize("kontext", [False, True])
@pytest.mark.parametrize("guidance", [True, False])
def test_a_release_tells_its_sizes(kontext: bool, guidance: bool, tmp_path: Path) -> None:
    config = TINY.model_copy(update={"kontext": kontext, "guidance_embeds": guidance})
    folder = save(tmp_path / "made", ORIGINAL, kontext=kontext, guidance_embeds=guidance)
    name = "kontext-dev" if kontext else "dev" if guidance else "schnell"
    assert [path.name for path in folder.iterdir()] == [f"flux1-{name}.safetensors"]
    assert ORIGINAL.detect(folder) and not HUB.detect(folder)
    assert ORIGINAL.read_config(folder) == config
    assert weights.read_config(folder, MODEL) == config


def test_a_pipeline_says_that_it_is_kontext_s(tmp_path: Path) -> None:
    """A transformer alone does not: the network's tensors are the same, so it may become either."""
    folder = save(tmp_path / "made", HUB, kontext=True)
    assert not HUB.read_config(folder).kontext
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline"}))
    assert HUB.read_config(folder).kontext
    for kontext in (True, False):
        weights.load(open_net(MODEL, TINY.model_copy(update={"kontext": kontext})), folder, MODEL)
    weights.convert(folder, tmp_path / "single", MODEL, "original")
    assert (tmp_path / "single" / "flux1-kontext-dev.safetensors").is_file()


def test_convert_says_what_a_pipeline_lacks_and_nothing_of_a_whole_one(tmp_path: Path) -> None:
    release = save(tmp_path / "release", ORIGINAL)

    def convert(source: Path, *words: str) -> str:
        done = CliRunner().invoke(app(MODEL), ["convert", str(source), "--layout", "hub", *words])
        assert done.exit_code == 0, done.output
        return done.output

    said = convert(release, str(tmp_path / "alone"))
    parts = "scheduler, text_encoder, text_encoder_2, tokenizer, tokenizer_2, vae"
    assert f"alone: is no whole pipeline, it lacks {parts}: what goes with the network was not found" in said
    encoders = write_tiny_encoders(tmp_path / "encoders")
    assert "lacks" not in convert(release, str(tmp_path / "whole"), "--extras-from", str(encoders))
    assert "lacks" not in convert(tmp_path / "whole", str(tmp_path / "again"))
    assert (tmp_path / "again" / "model_index.json").is_file()


def test_a_transformer_is_schnell_s_unless_it_says_that_it_is_told_guidance(tmp_path: Path) -> None:
    """As diffusers reads it; a recipe that means another is told which preset it is."""
    folder = save(tmp_path / "made", HUB, guidance_embeds=False)
    path = folder / "transformer" / "config.json"
    said = json.loads(path.read_text())
    assert said.pop("guidance_embeds") is False
    path.write_text(json.dumps(said))
    assert not HUB.read_config(folder).guidance_embeds
    with pytest.raises(UserError, match="guidance_embeds"):
        weights.check_source(folder, MODEL, TINY)
    path.write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    assert HUB.read_config(folder) == MODEL.presets["schnell"]


def test_other_networks_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "made", HUB)
    path = folder / "transformer" / "config.json"
    said = json.loads(path.read_text())
    for field, value, message in (
        ("patch_size", 2, "patch_size=2 is not supported, FLUX.1 has patch_size=1"),
        ("out_channels", 4, "out_channels=4 is not supported, FLUX.1 has out_channels=None"),
        ("axes_dims_rope", [4, 6, 8], "axes_dims_rope=.4, 6, 8. add up to 18, which must be attention_head_dim=16"),
        ("axes_dims_rope", [5, 5, 6], "5 must be even for rotary embedding"),
        ("in_channels", 63, "in_channels=63 must be a multiple of 4"),
    ):
        path.write_text(json.dumps({**said, field: value}))
        with pytest.raises(UserError, match=f"^{path}.*{message}"):
            HUB.read_config(folder)
    release = save(tmp_path / "release", ORIGINAL)
    file = release / "flux1-dev.safetensors"
    tensors = load_file(file)
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    save_file({**tensors, norm: torch.ones(8)}, file)
    with pytest.raises(UserError, match=f"^{file}: has heads of 8 elements, FLUX.1 has 128$"):
        ORIGINAL.read_config(release)
    save_file({**tensors, norm: torch.ones(24)}, file)
    with pytest.raises(UserError, match=f"^{file}: img_in.weight has 64 rows, which heads of 24 do not divide$"):
        ORIGINAL.read_config(release)
    del tensors["txt_in.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"^{file}: missing key 'txt_in.weight'$"):
        ORIGINAL.read_config(release)
    save_file(tensors, release / "flux1-schnell.safetensors")
    with pytest.raises(UserError, match="holds flux1-dev.safetensors and flux1-schnell.safetensors; leave one$"):
        ORIGINAL.read_config(release)
