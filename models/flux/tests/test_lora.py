"""Adapters of FLUX.1 change places with diffusers', and merge into the weights they adapt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import train, weights
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.testing.suite import open_net, randomise
from mindspeed_model_core.testing.tolerance import FP32, assert_close
from mindspeed_model_core.weights import adapters
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


ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
WIDER = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "add_k_proj", "add_v_proj", "proj_mlp", "proj_out", "norm.linear"]


def save_theirs(hub: Path, folder: Path, targets: list[str], **options: Any) -> Tensor:
    """Make and save adapters as diffusers' train_dreambooth_lora_flux.py does; return what its network gives."""
    from diffusers import FluxPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = pipeline(hub)
    torch.manual_seed(5)
    given = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, **options}
    pipe.transformer.add_adapter(LoraConfig(target_modules=targets, **given))
    FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        **_collate_lora_metadata({"transformer": pipe.transformer}),
    )
    return theirs(pipe)


@pytest.mark.parity
@pytest.mark.filterwarnings("error:While injecting the PEFT adapters")
@pytest.mark.parametrize(
    ("targets", "ours_are"),
    [
        (
            EXAMPLE,
            "attention.qkv,attention.text_qkv,attention.out,attention.text_out,mlp.up,mlp.down,text_mlp.up,"
            "text_mlp.down,qkv_up.0,qkv_up.1,qkv_up.2",
        ),
        (ATTENTION, "attention.qkv,attention.out,qkv_up.0,qkv_up.1,qkv_up.2"),
        (["attn.to_q", "attn.to_v"], "attention.qkv.0,attention.qkv.2,qkv_up.0,qkv_up.2"),
        (
            WIDER,
            "attention.qkv,attention.text_qkv.1,attention.text_qkv.2,attention.out,mlp.up,mlp.down,"
            "blocks.2.modulation,blocks.3.modulation,qkv_up,out_down,head.proj",
        ),
    ],
    ids=["example", "attention", "two", "wider"],
)
def test_theirs_merge_here_and_train_on(targets: list[str], ours_are: str, hub: Path, tmp_path: Path) -> None:
    """Adapters of diffusers' example: three of four layers in a single block's weight; the refusal says what to set."""
    adapted = save_theirs(hub, tmp_path / "adapter", targets)
    weights.convert(hub, tmp_path / "merged", MODEL, "hub", merge_lora=tmp_path / "adapter")
    assert_close({"output": ours(tmp_path / "merged")}, {"output": adapted}, FP32)
    assert (ours(hub) - adapted).abs().max() > 0.01

    fields: dict[str, Any] = {
        "preset": "tiny",
        "precision": "fp32",
        "steps": 2,
        "global_batch": 2,
        "init_from": str(hub),
        "data": {"path": str(write_features(tmp_path / "features", TINY, [(4, 6)] * 2))},
        "lora": {"init_from": str(tmp_path / "adapter"), "targets": OURS},
        "optim": {"lr": 0.01, "schedule": "constant"},
        "metrics": {"trackers": ()},
    }
    with pytest.raises(UserError, match=r"^lora.rank=16: .* has rank 3; .*, set lora.rank=3 lora.alpha=6 ") as caught:
        train.starting_point(tmp_path / "run", False, FluxRecipe.model_validate(fields), MODEL)
    assert str(caught.value).endswith(f" 'lora.targets=[{ours_are}]'")
    fields["lora"] |= {"rank": 3, "alpha": 6.0, "targets": tuple(ours_are.split(","))}
    recipe = FluxRecipe.model_validate(fields)
    session = train.Session(recipe, MODEL, Mesh(torch.device("cpu")))
    session.start()
    with torch.no_grad():
        assert_close({"output": session.parallel.net(batch())}, {"output": adapted}, FP32)

    train.run(recipe, MODEL, tmp_path / "run")
    weights.convert(tmp_path / "run", tmp_path / "further", MODEL, "hub")
    before, after = (load_file(tmp_path / x / "pytorch_lora_weights.safetensors") for x in ("adapter", "further"))
    assert before.keys() == after.keys()
    moved = {key: (after[key] - before[key]).abs().max() for key in before}
    assert min(moved.values()) > 0 and max(moved.values()) < 0.1
    weights.convert(hub, tmp_path / "both", MODEL, "hub", merge_lora=tmp_path / "run")
    pipe = pipeline(hub)
    pipe.load_lora_weights(str(tmp_path / "further"))
    assert_close({"output": ours(tmp_path / "both")}, {"output": theirs(pipe)}, FP32)


@pytest.mark.parity
def test_theirs_that_no_run_can_hold_are_refused(hub: Path, tmp_path: Path) -> None:
    """Ranks that differ, and one pair for what has several here: a recipe has no words for them; merging takes both."""

    def said(path: Path) -> str:
        fields = {"preset": "tiny", "init_from": str(hub), "lora": {"init_from": str(path)}, "data": {"path": "x"}}
        with pytest.raises(UserError) as caught:
            train.starting_point(tmp_path / "run", False, FluxRecipe.model_validate(fields), MODEL)
        assert str(caught.value).endswith("; merge them instead: convert --merge-lora")
        return str(caught.value)

    save_theirs(hub, tmp_path / "ranks", ATTENTION, rank_pattern={"to_out.0": 2})
    assert "has adapters of rank 3 (blocks.2.qkv_up) and 2 (blocks.0.attention.out)" in said(tmp_path / "ranks")
    save_theirs(hub, tmp_path / "scales", ATTENTION, alpha_pattern={"to_out.0": 3})
    assert "of scale 2 (blocks.2.qkv_up) and 1 (blocks.0.attention.out)" in said(tmp_path / "scales")
    file = tmp_path / "ranks" / "pytorch_lora_weights.safetensors"
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**load_file(file), key: torch.ones(3, 8)}, file)
    for use in (
        lambda: adapters.open_adapters(file, MODEL, TINY),
        lambda: weights.convert(hub, tmp_path / "no", MODEL, "hub", merge_lora=file),
    ):
        with pytest.raises(UserError, match=rf"{file}: '{key}' adapts a text encoder, which stays as it is here"):
            use()
    stem = "lora_unet_double_blocks_1_img_attn_qkv"
    file = tmp_path / "style.safetensors"
    save_file({f"{stem}.lora_down.weight": torch.ones(3, 64), f"{stem}.lora_up.weight": torch.ones(192, 3)}, file)
    assert f"{file}: has one pair of factors for all that blocks.1.attention.qkv stacks" in said(file)


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
