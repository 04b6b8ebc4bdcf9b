"""First weights, published settings and defaults: what no comparison of a network with itself would notice."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core.parallel import apply
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.recipe import ParallelConfig
from mindspeed_model_wan21 import MODEL
from mindspeed_model_wan21.generate import NEGATIVE, Sampling, generate_command
from mindspeed_model_wan21.weights import ORIGINAL


def test_first_weights_are_the_original_s() -> None:
    """Its ``init_weights``: Xavier's rule for each linear layer alone, embeddings at 0.02, the head and biases zero."""
    with torch.device("meta"):
        net = MODEL.build(MODEL.presets["tiny-i2v"].model_copy(update={"pos_embed_seq_len": 10}))
    made = apply.parallelize(net, Mesh(torch.device("cpu")), ParallelConfig())
    apply.initialise(made, seed=0)
    held = {name: shard.master for name, shard in made.shards.items()}
    width = 64

    def xavier(name: str, outputs: int, inputs: int) -> None:
        bound = (6 / (outputs + inputs)) ** 0.5
        assert bound * 0.98 < held[name].abs().max() <= bound, name

    for name, parameter in held.items():
        leaf = name.split(".")[-1]
        if name.startswith("head.proj") or leaf in ("bias", "positions"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.startswith(("text.", "time.")):
            assert 0.015 < parameter.std() < 0.025, name
        elif leaf == "table":
            assert 0.7 * width**-0.5 < parameter.std() < 1.3 * width**-0.5, name
    for block in range(4):
        xavier(f"blocks.{block}.self_attention.qkv.weight", width, width)
        xavier(f"blocks.{block}.cross_attention.kv.weight", width, width)
        xavier(f"blocks.{block}.cross_attention.image_kv.weight", width, width)
        xavier(f"blocks.{block}.self_attention.out.weight", width, width)
        xavier(f"blocks.{block}.mlp.up.weight", 96, width)
    xavier("patches.proj.weight", width, 36 * 4)


@pytest.mark.parametrize(("preset", "kind"), [("t2v-14b", "t2v"), ("i2v-14b", "i2v"), ("flf2v-14b", "flf2v")])
def test_the_original_s_configuration_says_what_is_given(preset: str, kind: str, tmp_path: Path) -> None:
    ORIGINAL.write_config(MODEL.presets[preset], tmp_path, torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind


def test_sampling_has_the_defaults_of_diffusers_pipeline() -> None:
    from diffusers import WanPipeline

    theirs = {name: p.default for name, p in inspect.signature(WanPipeline.__call__).parameters.items()}
    names = {"frames": "num_frames", "steps": "num_inference_steps", "guidance": "guidance_scale"}
    ours: Any = Sampling("x")
    command = {name: p.default for name, p in inspect.signature(generate_command).parameters.items()}
    for name in ("height", "width", "frames", "steps", "guidance"):
        assert getattr(ours, name) == command[name] == theirs[names.get(name, name)], name
    assert ours.negative == NEGATIVE and ours.shift is command["shift"] is None


RATES = {"pretrain": 1e-5, "lora": 5e-6, "one-device": 1e-5, "flf2v-14b": 1e-5}
"""Learning rates of MindSpeed-MM's examples, by what a recipe's name ends with."""


def test_recipes_have_the_published_learning_rates() -> None:
    from mindspeed_model_core import recipe as recipes

    for name in recipes.names(MODEL.package):
        optim = MODEL.load_recipe(name).optim
        if name.startswith("tiny"):
            assert optim.lr == 3e-3
            continue
        (rate,) = [rate for end, rate in RATES.items() if name.endswith(end)]
        assert (optim.lr, optim.betas, optim.weight_decay, optim.clip) == (rate, (0.9, 0.999), 0.01, 1.0), name
        assert optim.schedule == "constant", name
