"""Adapters of FLUX.1 change places with diffusers', and merge into the weights they adapt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import train, weights
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing.suite import open_net, randomise
from mindspeed_model_core.testing.tolerance import FP32, assert_close
from mindspeed_model_flux import MODEL
from mindspeed_model_flux.model import pack, unpack
from mindspeed_model_flux.task import FluxRecipe
from safetensors.torch import load_file, save_file
from torch import Tensor

from .random_features import write_features

TINY = MODEL.presets["tiny"]
# Those of diffusers' example, and of single blocks what it leaves out.
JOINT = [f"attn.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")]
EXAMPLE = [*JOINT, "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
OURS = ("attention.*", "mlp.*", "text_mlp.*", "qkv_up")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in diffusers' layout."""
    net = open_net(MODEL, TINY)
    randomise(net, seed=3)
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    weights.save(net.named_parameters(), net.config, MODEL.layouts[0], folder)
    return folder


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(8)
    shapes = {"x": (1, 16, 4, 6), "text": (1, 7, 32), "pooled": (1, 24)}
    given = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return {**given, "time": torch.tensor([400.0]), "guidance": torch.tensor([2.0])}


def ours(folder: Path) -> Tensor:
    net = open_net(MODEL, TINY, folder)
    with torch.no_grad():
        return net(batch())  # type: ignore[return-value]


def pipeline(folder: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    return FluxPipeline(
        tokenizer=None,
        text_encoder=None,
        tokenizer_2=None,
        text_encoder_2=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer"),
    )


def theirs(pipe: Any) -> Tensor:
    b = batch()
    with torch.no_grad():
        out = pipe.transformer(
            hidden_states=pack(b["x"]).transpose(0, 1),
            encoder_hidden_states=b["text"],
            pooled_projections=b["pooled"],
            timestep=b["time"] / 1000,
            guidance=b["guidance"],
            img_ids=torch.cartesian_prod(torch.tensor([0]), torch.arange(2), torch.arange(3)).float(),
            txt_ids=torch.zeros(7, 3),
            return_dict=False,
        )[0]
    return unpack(out.transpose(0, 1), (4, 6))


@pytest.mark.parity
@pytest.mark.parametrize("targets", [OURS, ()], ids=["example", "all"])
def test_ours_load_in_diffusers_and_merge(targets: tuple[str, ...], hub: Path, tmp_path: Path) -> None:
    """A run's adapters through FluxPipeline.load_lora_weights, and merged by convert, compute the same."""
    recipe = FluxRecipe.model_validate(
        {
            "preset": "tiny",
            "precision": "fp32",
            "steps": 3,
            "global_batch": 2,
            "init_from": str(hub),
            "data": {"path": str(write_features(tmp_path / "features", TINY, [(4, 6)] * 2))},
            "lora": {"rank": 3, "alpha": 6.0, "targets": targets},
            "optim": {"lr": 0.05, "schedule": "constant"},
            "metrics": {"trackers": ()},
        }
    )
    train.run(recipe, MODEL, tmp_path / "run")
    weights.convert(tmp_path / "run", tmp_path / "adapter", MODEL, "hub")
    keys = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors").keys()
    assert "transformer.single_transformer_blocks.1.proj_mlp.lora_A.weight" in keys
    assert ("transformer.single_transformer_blocks.1.norm.linear.lora_B.weight" in keys) == (not targets)
    pipe = pipeline(hub)
    before = theirs(pipe)
    pipe.load_lora_weights(str(tmp_path / "adapter"))
    adapted = theirs(pipe)
    assert (adapted - before).abs().max() > 0.05 * before.abs().max()
    weights.convert(hub, tmp_path / "merged", MODEL, "hub", merge_lora=tmp_path / "adapter")
    assert_close({"output": ours(tmp_path / "merged")}, {"output": adapted}, FP32)


@pytest.mark.parity
def test_theirs_merge_here(hub: Path, tmp_path: Path) -> None:
    """Adapters that diffusers made and saved, of its example's layers: three of four in a single block's weight."""
    from diffusers import FluxPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = pipeline(hub)
    pipe.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=EXAMPLE, init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.transformer)
    FluxPipeline.save_lora_weights(
        tmp_path / "adapter",
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata={"r": 3, "lora_alpha": 6},
    )
    adapted = theirs(pipe)
    weights.convert(hub, tmp_path / "merged", MODEL, "hub", merge_lora=tmp_path / "adapter")
    assert_close({"output": ours(tmp_path / "merged")}, {"output": adapted}, FP32)
    assert (ours(hub) - adapted).abs().max() > 0.01


@pytest.mark.parity
def test_adapters_of_stacked_layers_merge_as_the_product_says(hub: Path, tmp_path: Path) -> None:
    """Files of other trainers: one pair for all of q, k and v, and all four of a single block."""
    draw = torch.Generator().manual_seed(2)
    weights.convert(hub, tmp_path / "original", MODEL, "original")
    file = tmp_path / "original" / "flux1-dev.safetensors"
    whole = load_file(file)
    tensors, changed = {}, dict(whole)
    for module in ("double_blocks.1.img_attn.qkv", "single_blocks.0.linear1", "single_blocks.1.linear2"):
        rows, columns = whole[f"{module}.weight"].shape
        a, b = torch.randn(3, columns, generator=draw), torch.randn(rows, 3, generator=draw) * 0.1
        stem = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(1.5)}
        changed[f"{module}.weight"] = whole[f"{module}.weight"] + 0.5 * b @ a
    save_file(tensors, tmp_path / "style.safetensors")
    weights.convert(hub, tmp_path / "merged", MODEL, "hub", merge_lora=tmp_path / "style.safetensors")
    save_file(changed, file)
    assert_close({"output": ours(tmp_path / "merged")}, {"output": ours(tmp_path / "original")}, FP32)
    assert (ours(hub) - ours(tmp_path / "merged")).abs().max() > 0.01
    save_file({**tensors, "lora_unet_single_blocks_9_linear1.alpha": torch.tensor(1.0)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="unknown key 'lora_unet_single_blocks_9_linear1.alpha'"):
        weights.convert(hub, tmp_path / "no", MODEL, "hub", merge_lora=tmp_path / "other.safetensors")
