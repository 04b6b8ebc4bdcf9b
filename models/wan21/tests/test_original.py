"""The original layout against tensors that the original repository computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mindspeed_model_core import weights
from mindspeed_model_core.testing.suite import open_net
from mindspeed_model_core.testing.tolerance import FP32, assert_close
from mindspeed_model_wan21 import MODEL
from safetensors import safe_open
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden" / "original_tiny.safetensors"


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_computes_what_the_original_computed(kind: str, tmp_path: Path) -> None:
    """From an original release's folder, and from what ``convert`` makes of it."""
    with safe_open(GOLDEN, "pt") as file:
        names = [name for name in file.keys() if name.startswith(kind)]  # noqa: SIM118  (not a mapping)
        held = {name.removeprefix(f"{kind}."): file.get_tensor(name) for name in names}
        config = json.loads(file.metadata()[kind])
    release = tmp_path / "release"
    release.mkdir()
    (release / "config.json").write_text(json.dumps({"_class_name": "WanModel", "eps": 1e-6, **config}))
    mine = {n.removeprefix("weights."): t for n, t in held.items() if n.startswith("weights.")}
    save_file(mine, release / "diffusion_pytorch_model.safetensors")
    x = held["latents"]
    batch = {"x": x, "time": held["timestep"].float(), "text": held["text"]}
    if kind == "i2v":
        batch |= {"x": torch.cat((x, held["condition"]), 1), "image": held["image_tokens"]}
    weights.convert(release, tmp_path / "hub", MODEL, "hub")
    for folder in (release, tmp_path / "hub"):
        net = open_net(MODEL, weights.read_config(folder, MODEL), folder)
        with torch.no_grad():
            assert_close({"output": net(batch)}, {"output": held["output"]}, FP32)  # type: ignore[dict-item]
