"""Adapters of Wan2.1 change places with diffusers', and merge into the weights they adapt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import train, weights
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing.suite import open_net, randomise
from mindspeed_model_core.testing.tolerance import FP32, assert_close
from mindspeed_model_wan21 import MODEL
from mindspeed_model_wan21.task import Wan21Recipe
from safetensors.torch import save_file
from torch import Tensor

from .random_features import write_features

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in diffusers' layout."""
    net = open_net(MODEL, MODEL.presets["tiny-t2v"])
    randomise(net, seed=3)
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    weights.save(net.named_parameters(), net.config, MODEL.layouts[0], folder)
    return folder


def batch() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(8)
    shapes = {"x": (1, 16, 2, 4, 6), "text": (1, 512, 32)}
    return {**{n: torch.randn(s, generator=draw) for n, s in shapes.items()}, "time": torch.tensor([400.0])}


def ours(folder: Path) -> Tensor:
    net = open_net(MODEL, MODEL.presets["tiny-t2v"], folder)
    with torch.no_grad():
        return net(batch())  # type: ignore[return-value]


def pipeline(folder: Path) -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer"),
    )


def theirs(pipe: Any) -> Tensor:
    b = batch()
    with torch.no_grad():
        return pipe.transformer(b["x"], b["time"], b["text"], return_dict=False)[0]


@pytest.mark.parity
def test_ours_load_in_diffusers_and_merge(hub: Path, tmp_path: Path) -> None:
    """A run's adapters through WanPipeline.load_lora_weights, and merged by convert, compute the same."""
    recipe = Wan21Recipe(
        preset="tiny-t2v",
        precision="fp32",
        steps=3,
        global_batch=2,
        init_from=str(hub),
        data={"path": str(write_features(tmp_path / "features", MODEL.presets["tiny-t2v"], [(2, 4, 6)] * 2))},  # type: ignore[arg-type]
        lora={"rank": 3, "alpha": 6.0},  # type: ignore[arg-type]
        optim={"lr": 0.05, "schedule": "constant"},  # type: ignore[arg-type]
        metrics={"trackers": ()},  # type: ignore[arg-type]
    )
    train.run(recipe, MODEL, tmp_path / "run")
    weights.convert(tmp_path / "run", tmp_path / "adapter", MODEL, "hub")
    pipe = pipeline(hub)
    before = theirs(pipe)
    pipe.load_lora_weights(str(tmp_path / "adapter"))
    adapted = theirs(pipe)
    assert (adapted - before).abs().max() > 0.05 * before.abs().max()
    weights.convert(hub, tmp_path / "merged", MODEL, "hub", merge_lora=tmp_path / "adapter")
    assert_close({"output": ours(tmp_path / "merged")}, {"output": adapted}, FP32)


@pytest.mark.parity
def test_theirs_merge_here(hub: Path, tmp_path: Path) -> None:
    """Adapters that diffusers made and saved."""
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = pipeline(hub)
    pipe.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.transformer)
    WanPipeline.save_lora_weights(
        tmp_path / "adapter",
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata={"r": 3, "lora_alpha": 6},
    )
    adapted = theirs(pipe)
    weights.convert(hub, tmp_path / "merged", MODEL, "hub", merge_lora=tmp_path / "adapter")
    assert_close({"output": ours(tmp_path / "merged")}, {"output": adapted}, FP32)
    assert (ours(hub) - adapted).abs().max() > 0.01


ORIGINAL = [f"{attention}.{x}" for attention in ("self_attn", "cross_attn") for x in "qkvo"] + ["ffn.0", "ffn.2"]


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["diffusion_model.lora_A", "diffusion_model.lora_down", "lora_unet"])
def test_adapters_in_the_original_names_merge_as_in_diffusers(hub: Path, tmp_path: Path, kind: str) -> None:
    """Files of other trainers: names of the original layers, an alpha for each, one file of any name."""
    draw = torch.Generator().manual_seed(2)
    net = open_net(MODEL, MODEL.presets["tiny-t2v"])
    sizes = {name: tensor.shape for name, tensor in original(net).items()}
    ends = ("lora_A", "lora_B") if kind.endswith("lora_A") else ("lora_down", "lora_up")
    tensors = {}
    for module in [f"blocks.{i}.{layer}" for i in range(4) for layer in ORIGINAL]:
        rows, columns = sizes[f"{module}.weight"]
        stem = f"lora_unet_{module.replace('.', '_')}" if kind == "lora_unet" else f"diffusion_model.{module}"
        tensors[f"{stem}.{ends[0]}.weight"] = torch.randn(3, columns, generator=draw)
        tensors[f"{stem}.{ends[1]}.weight"] = torch.randn(rows, 3, generator=draw) * 0.1
        if kind != "diffusion_model.lora_A":
            tensors[f"{stem}.alpha"] = torch.tensor(1.5)
    save_file(tensors, tmp_path / "style.safetensors", {"ss_network_dim": "3"})
    pipe = pipeline(hub)
    pipe.load_lora_weights(str(tmp_path), weight_name="style.safetensors")
    adapted = theirs(pipe)
    weights.convert(hub, tmp_path / "merged", MODEL, "hub", merge_lora=tmp_path / "style.safetensors")
    assert_close({"output": ours(tmp_path / "merged")}, {"output": adapted}, FP32)
    assert (ours(hub) - adapted).abs().max() > 0.01
    save_file({**tensors, "lora_unet_blocks_9_ffn_0.alpha": torch.tensor(1.0)}, tmp_path / "other.safetensors")
    with pytest.raises(
        UserError, match="unknown key 'lora_unet_blocks_9_ffn_0.alpha'.*; read are keys in peft's, diff"
    ):
        weights.convert(hub, tmp_path / "no", MODEL, "hub", merge_lora=tmp_path / "other.safetensors")
    tensors.pop(next(name for name in tensors if ends[1] in name))
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=f"half.safetensors: missing key '.*{ends[1]}.weight'"):
        weights.convert(hub, tmp_path / "no", MODEL, "hub", merge_lora=tmp_path / "half.safetensors")


def original(net: Any) -> dict[str, Tensor]:
    bounds = MODEL.layouts[1].table(net.config).bind({n: tuple(p.shape) for n, p in net.named_parameters()})
    return {n: t for name, p in net.named_parameters() for n, t in bounds[name].split(p.detach())}


def test_a_damaged_adapter_is_refused(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    save_file(
        {"transformer.blocks.0.attn9.to_q.lora_A.weight": torch.ones(2, 64)},
        tmp_path / "adapter" / "pytorch_lora_weights.safetensors",
    )
    with pytest.raises(Exception, match="attn9") as caught:
        weights.convert(hub, tmp_path / "merged", MODEL, "hub", merge_lora=tmp_path / "adapter")
    assert type(caught.value).__name__ == "UserError" and not (tmp_path / "merged").exists()
