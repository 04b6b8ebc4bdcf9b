"""Frozen parts are found, told apart, loaded, and moved between layouts whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from mindspeed_model_core import frozen, weights
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing import toy
from mindspeed_model_core.weights.layout import Cat, Layout, Row, Table
from mindspeed_model_core.weights.pth import TorchFile
from mindspeed_model_core.weights.tensorfile import Safetensors
from mindspeed_model_core.weights.translation import PartConfig, Sizes, file_part, hub_part, parameters, plan
from safetensors.torch import load_file
from torch import nn

STEM = "layers"


class DeepConfig(PartConfig):
    whose: ClassVar[str] = "Deep"
    fixed: ClassVar[dict[str, object]] = {"act": "gelu", "means": [0.25] * 16}
    width: int
    layers: int


def build(config: DeepConfig) -> nn.Module:
    return nn.ModuleDict({STEM: nn.ModuleList(nn.Linear(config.width, 2 * config.width) for _ in range(config.layers))})


def sizes(folder: Path) -> Sizes:
    return Sizes(folder / FILE.name, FILE.open(folder))


def read_file(folder: Path) -> DeepConfig:
    size = sizes(folder)
    return DeepConfig(width=size("net.0.lin.a.weight", 1), layers=size.count("net"))


FILE = TorchFile("deep.pth")
ORIGINAL = file_part(
    build,
    lambda config: Table(
        Row("layers.*.weight", ("net.*.lin.a.weight", "net.*.lin.b.weight"), Cat()), Row("layers.*.bias", "net.*.bias")
    ),
    FILE,
    read_file,
)
HUB = hub_part(
    DeepConfig,
    build,
    lambda config: Table(*(Row(name, name) for name in parameters(build, config))),
    Safetensors("model", "deep"),
    "deep",
    lambda config: {"kind": "Deep"},
    typed=True,
)
FOLDERS = {"words": "tokenizer"}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "vocab.json").write_text("{}")
    net = build(DeepConfig(width=3, layers=2))
    state = {}
    for i, layer in enumerate(net[STEM]):
        state[f"net.{i}.lin.a.weight"], state[f"net.{i}.lin.b.weight"] = (
            x.clone() for x in layer.weight.detach().split(3)
        )
        state[f"net.{i}.bias"] = layer.bias.detach().half()
    torch.save(state, folder / "deep.pth")
    return folder


def test_parts_go_there_and_back_bit_for_bit(release, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "back").mkdir()
    steps = []
    plan(release, [(ORIGINAL, HUB)], FOLDERS)(tmp_path / "hub", lambda done, total: steps.append((done, total)))
    held = load_file(tmp_path / "hub" / "deep" / "model.safetensors")
    state = torch.load(release / "deep.pth", weights_only=True)
    assert torch.equal(held["layers.1.weight"], torch.cat([state["net.1.lin.a.weight"], state["net.1.lin.b.weight"]]))
    assert held["layers.0.bias"].dtype == torch.float16 and steps[-1][0] == steps[-1][1] > steps[0][0]
    said = json.loads((tmp_path / "hub" / "deep" / "config.json").read_text())
    assert said == {"kind": "Deep", "width": 3, "layers": 2, **DeepConfig.fixed} | dict.fromkeys(
        ("torch_dtype", "dtype"), "float32"
    )
    assert (tmp_path / "hub" / "tokenizer" / "vocab.json").read_text() == "{}"
    plan(tmp_path / "hub", [(HUB, ORIGINAL)], {"tokenizer": "words"})(tmp_path / "back")
    back = torch.load(tmp_path / "back" / "deep.pth", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_what_is_missing_or_wrong_is_named_before_anything_is_written(release, tmp_path):
    (tmp_path / "hub").mkdir()
    made = plan(release, [(ORIGINAL, HUB)], FOLDERS)
    (tmp_path / "hub" / "tokenizer").mkdir()
    with pytest.raises(UserError, match="tokenizer: exists; choose another destination"):
        made(tmp_path / "hub")
    (tmp_path / "hub" / "tokenizer").rmdir()
    made(tmp_path / "hub")
    config = tmp_path / "hub" / "deep" / "config.json"
    config.write_text(config.read_text().replace("0.25", "0.5"))
    with pytest.raises(UserError, match=r"means=\[0.5, .*\.\.\. is not supported, Deep has means=\[0.25, ") as caught:
        plan(tmp_path / "hub", [(HUB, ORIGINAL)], {})
    assert len(str(caught.value)) < 400
    (release / "words" / "vocab.json").unlink()
    (release / "words").rmdir()
    with pytest.raises(UserError, match="words: missing; the parts beside a network come along whole"):
        plan(release, [(ORIGINAL, HUB)], FOLDERS)
    torch.save({"net.0.bias": torch.ones(6)}, release / "deep.pth")
    with pytest.raises(UserError, match=r"deep.pth: missing key 'net.0.lin.a.weight'"):
        sizes(release).need("net.0.lin.a.weight")
    with pytest.raises(UserError, match=r"0.bias: has shape \[6\], expected at least 2 dims"):
        sizes(release)("net.0.bias", 1)


def test_a_network_s_companions_are_planned_before_it_is_written(release, tmp_path):
    """From the first place that has them; and --extras-from is the way round one that is broken."""
    whole = Layout(
        name="whole",
        build=toy.Toy,
        table=lambda config: Table(*(Row(name, name) for name, _ in toy.Toy(config).named_parameters())),
        detect=lambda folder: (folder / "net.safetensors").is_file(),
        read_config=lambda folder: toy.ToyConfig(),
        write_config=lambda config, folder, dtype: None,
        files=Safetensors("net"),
        parts=("deep", "tokenizer"),
        companions=lambda config, origin: plan(origin, [(ORIGINAL, HUB)], FOLDERS) if ORIGINAL.detect(origin) else None,
    )
    model = replace(toy.TOY, layouts=(whole,))
    net = toy.Toy(toy.ToyConfig())
    weights.save(net.named_parameters(), net.config, whole, tmp_path / "one", extras_from=release)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["deep", "net.safetensors", "tokenizer"]
    weights.convert(tmp_path / "one", tmp_path / "two", model, "whole")  # as they are
    assert (tmp_path / "two" / "deep" / "model.safetensors").is_file()
    weights.save(net.named_parameters(), net.config, whole, tmp_path / "bare")
    (release / "words" / "vocab.json").unlink()
    (release / "words").rmdir()
    with pytest.raises(UserError, match="words: missing; .*; --extras-from names another folder"):
        weights.convert(tmp_path / "bare", tmp_path / "three", model, "whole", extras_from=release)
    assert not list(tmp_path.glob("*three*"))


def test_folders_are_checked_and_told_apart(tmp_path):
    class Parts(frozen.FrozenParts):
        needed = ("vae", "words")

    with pytest.raises(UserError, match=r"encoders=.*: no vae/ there; .* holds vae/, words/$"):
        Parts(tmp_path)
    for name in Parts.needed:
        assert not frozen.has_parts(tmp_path, Parts.needed)
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(200_000))
    assert frozen.has_parts(tmp_path, Parts.needed)
    with pytest.raises(UserError, match=r"no eyes/ there; .* holds vae/, words/, eyes/$"):
        Parts(tmp_path).part("eyes")
    first = frozen.fingerprint(tmp_path, Parts.needed)
    (tmp_path / "vae" / ".cache").write_text("not a part")
    assert frozen.fingerprint(tmp_path, (*Parts.needed, "eyes")) == first
    (tmp_path / "vae" / "file").write_bytes(bytes(199_999) + b"x")
    assert frozen.fingerprint(tmp_path, Parts.needed) != first

    class Broken:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            raise RuntimeError("two\nlines")

    with pytest.raises(UserError, match=r"vae: cannot be loaded: two lines$"):
        Parts(tmp_path).load("vae", Broken)


def test_pixels_and_rows_of_text():
    pixels = torch.arange(256, dtype=torch.uint8)
    there = frozen.signed(pixels, torch.device("cpu"))
    assert there.min() == -1 and there.max() == 1
    assert torch.equal(frozen.unsigned(there * 1.5)[[0, -1]], pixels[[0, -1]])
    assert torch.equal(frozen.unsigned(there), pixels)
    rows = frozen.pad_rows([torch.ones(2, 3), torch.ones(9, 3)], 4)
    assert rows.shape == (2, 4, 3) and rows.sum((1, 2)).tolist() == [6, 12]


def _processor(folder, **changes):
    (folder / frozen.PREPROCESSOR).write_text(json.dumps({**frozen.clip_settings(28), **changes}))
    return frozen.ClipProcessor(folder)


def test_clip_s_processor_takes_the_older_form_of_sizes_and_refuses_other_steps(tmp_path):
    frame = torch.arange(3 * 40 * 60).remainder(251).view(3, 40, 60).to(torch.uint8)
    want = _processor(tmp_path).pixels(frame)
    assert want.shape == (3, 28, 28)
    assert torch.equal(_processor(tmp_path, size=28, crop_size=28).pixels(frame), want)
    square = _processor(tmp_path, size={"height": 28, "width": 28}).pixels(frame)
    assert square.shape == want.shape and not torch.equal(square, want)
    assert not torch.equal(_processor(tmp_path, image_mean=[0.5] * 3).pixels(frame), want)
    for name, value in {
        "do_center_crop": False,
        "do_resize": False,
        "do_rescale": False,
        "do_normalize": False,
        "do_convert_rgb": False,
        "resample": 2,
        "rescale_factor": 1 / 127.5,
    }.items():
        with pytest.raises(UserError, match=f"{frozen.PREPROCESSOR}: {name}={value}.* is not supported, CLIP's proc"):
            _processor(tmp_path, **{name: value})
    for changes in ({"size": {"longest_edge": 3}}, {"crop_size": None}, {"image_std": [1.0]}):
        with pytest.raises(UserError, match=f"{frozen.PREPROCESSOR}: cannot be read as CLIP's: size="):
            _processor(tmp_path, **changes)
