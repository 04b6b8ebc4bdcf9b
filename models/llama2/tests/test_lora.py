"""Adapters of Llama-2 change places with peft on transformers' network, and merge into the weights they adapt."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import train, weights
from mindspeed_model_core.data import train_tokenizer
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.files import read_json, write_json
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.weights import adapters
from mindspeed_model_core.weights.layout import DIFFUSERS
from mindspeed_model_llama2 import MODEL
from mindspeed_model_llama2.config import PRESETS
from mindspeed_model_llama2.task import Llama2Recipe
from mindspeed_model_llama2.weights import HUB, ORIGINAL
from safetensors.torch import load_file, save_file
from torch import Tensor

TOKENS = torch.arange(40) * 7 % 320
TEXT = "the model learns to read a little text and each line is a document of its own"
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote, wide enough for adapters to show in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = PRESETS["tiny"].model_dump(exclude={"rope_theta"})
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    LlamaForCausalLM(LlamaConfig(**{**fields, "initializer_range": 0.2})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of adapters over three steps."""
    folder = tmp_path_factory.mktemp("run")
    train_tokenizer([TEXT] * 8, 320, folder / "tokenizer")
    (folder / "text.txt").write_text("\n\n".join([TEXT] * 40))
    train.run(recipe(hub, data={**corpus(folder), "sequence_length": 24}), MODEL, folder / "run")
    return folder / "run"


def corpus(folder: Path) -> dict[str, str]:
    return {"path": str(folder / "text.txt"), "tokenizer": str(folder / "tokenizer")}


def recipe(hub: Path, **changes: Any) -> Llama2Recipe:
    fields: dict[str, Any] = {
        "preset": "tiny",
        "init_from": str(hub),
        "precision": "fp32",
        "steps": 3,
        "global_batch": 2,
        "optim": {"lr": 0.05, "ema": 0.5, "schedule": "constant"},
        "lora": {"rank": 4, "alpha": 6.0},
        "metrics": {"trackers": ()},
    }
    return Llama2Recipe(**{**fields, **changes})


def logits(hub: Path, lora: dict[str, Any] | None) -> Tensor:
    """Return our network's, with the adapters that ``lora.init_from`` names."""
    made = recipe(hub, lora=lora)
    parallel = train.prepare(made, MODEL, Mesh(torch.device("cpu")))
    weights.load(parallel.net, hub, MODEL, write=lambda name, tensor: parallel.shards[name].write(tensor))
    if made.lora is not None and made.lora.init_from is not None:
        adapters.load(parallel.shards, made.lora.init_from, MODEL, MODEL.config(made), made.lora)
    with torch.no_grad():
        return parallel.net({"tokens": TOKENS, "positions": torch.arange(40), "lengths": (40,)})  # type: ignore[return-value]


def theirs(folder: Path, adapter: Path | None = None) -> Tensor:
    """Return transformers' logits, with peft's adapter if one is named."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    net: Any = LlamaForCausalLM.from_pretrained(folder)
    if adapter is not None:
        net = PeftModel.from_pretrained(net, adapter)
    with torch.no_grad():
        return net.eval()(input_ids=TOKENS[None]).logits[0]


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.fixture
def peft_folder(hub: Path, tmp_path: Path) -> Path:
    """An adapter that peft made and wrote, B no longer zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LoraConfig(r=4, lora_alpha=6, target_modules=EVERY)
    net = get_peft_model(LlamaForCausalLM.from_pretrained(hub), config)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(str(tmp_path / "peft"))
    return tmp_path / "peft"


def test_peft_reads_our_adapter(hub: Path, run: Path, tmp_path: Path) -> None:
    weights.convert(run, tmp_path / "adapter", MODEL, "hub")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    ours = logits(hub, {"rank": 4, "alpha": 6.0, "init_from": str(run)})
    assert close(ours, theirs(hub, tmp_path / "adapter"))
    assert not close(ours, theirs(hub))
    assert sorted(read_json(tmp_path / "adapter" / "adapter_config.json")["target_modules"]) == sorted(
        f"{'mlp' if x[0] in 'gud' else 'self_attn'}.{x}" for x in EVERY
    )


def test_we_read_pefts_adapter(hub: Path, peft_folder: Path) -> None:
    ours = logits(hub, {"rank": 4, "alpha": 6.0, "init_from": str(peft_folder)})
    assert close(ours, theirs(hub, peft_folder))
    assert close(logits(hub, None), theirs(hub)) and not close(ours, theirs(hub))


@pytest.mark.parametrize("source", ["hub", "original"])
@pytest.mark.parametrize("target", ["hub", "original"])
def test_merged_equals_unmerged(hub: Path, peft_folder: Path, tmp_path: Path, source: str, target: str) -> None:
    base = hub
    if source == "original":
        base = tmp_path / "original"
        weights.convert(hub, base, MODEL, "original")
    weights.convert(base, tmp_path / "merged", MODEL, target, preset="tiny", merge_lora=peft_folder)
    if target == "original":
        weights.convert(tmp_path / "merged", tmp_path / "back", MODEL, "hub", preset="tiny")
    merged = tmp_path / ("merged" if target == "hub" else "back")
    assert close(theirs(merged), theirs(hub, peft_folder))


def test_a_run_merges_into_its_base(hub: Path, run: Path, tmp_path: Path) -> None:
    weights.convert(hub, tmp_path / "merged", MODEL, "hub", merge_lora=run)
    assert close(theirs(tmp_path / "merged"), logits(hub, {"rank": 4, "alpha": 6.0, "init_from": str(run)}))
    weights.convert(hub, tmp_path / "ema", MODEL, "hub", merge_lora=run, ema=True)
    weights.convert(run, tmp_path / "adapter", MODEL, "hub", ema=True)
    assert close(theirs(tmp_path / "ema"), theirs(hub, tmp_path / "adapter"))
    assert not close(theirs(tmp_path / "ema"), theirs(tmp_path / "merged"))


def test_pefts_patterns_scales_and_part_of_a_stack_merge(hub: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "lm_head"], rank_pattern={"1.self_attn.v_proj": 2},
        alpha_pattern={"q_proj": 3}, use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    net = get_peft_model(LlamaForCausalLM.from_pretrained(hub), config)
    net.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    weights.convert(hub, tmp_path / "merged", MODEL, "hub", merge_lora=tmp_path / "peft")
    assert close(theirs(tmp_path / "merged"), theirs(hub, tmp_path / "peft"))
    before, after = (load_file(folder / "model.safetensors") for folder in (hub, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"lm_head.weight"} | {
        f"model.layers.{i}.self_attn.{x}_proj.weight" for i in range(4) for x in "qv"
    }


def test_diffusers_form_says_all_in_one_file(hub: Path, run: Path, tmp_path: Path) -> None:
    """No network of diffusers is needed to see its keys, its metadata, and that both ways give the same."""
    from peft import LoraConfig
    from safetensors import safe_open

    model = replace(MODEL, layouts=(replace(HUB, adapter=DIFFUSERS), ORIGINAL))
    weights.convert(run, tmp_path / "adapter", model, "hub")
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["pytorch_lora_weights.safetensors"]
    file = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        assert "transformer.model.layers.3.mlp.up_proj.lora_B.weight" in opened.keys()  # noqa: SIM118
        said = json.loads(opened.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in said.items()})
    assert (config.r, config.lora_alpha) == (4, 6.0)
    want = logits(hub, {"rank": 4, "alpha": 6.0, "init_from": str(run)})
    lora = {"rank": 4, "alpha": 6.0, "init_from": str(tmp_path / "adapter")}
    assert torch.equal(logits(hub, lora), want)
    # Without metadata alphas are tensors, and without those the scale is 1.
    plain = load_file(file)
    alphas = {f"{k.removesuffix('lora_A.weight')}alpha": torch.tensor(6.0) for k in plain if "lora_A" in k}
    save_file({**plain, **alphas}, file)
    assert torch.equal(logits(hub, lora), want)
    save_file(plain, file)
    with pytest.raises(UserError, match=r"lora.alpha=6: .*/adapter has alpha 4; .*, set lora.alpha=4$"):
        logits(hub, lora)


def test_resumes_bit_for_bit(hub: Path, run: Path, tmp_path: Path) -> None:
    data = {**corpus(run.parent), "sequence_length": 24}
    fields: dict[str, Any] = {"data": data, "lora": {"rank": 4, "alpha": 6.0, "dropout": 0.2}, "recompute": "all"}
    train.run(recipe(hub, **fields, steps=4), MODEL, tmp_path / "whole")
    train.run(recipe(hub, **fields, steps=2), MODEL, tmp_path / "cut")
    train.run(recipe(hub, **fields, steps=4), MODEL, tmp_path / "cut", resume=True)
    for ema in (False, True):
        one, two = (adapters.checkpoint.open_weights(tmp_path / x, ema=ema) for x in ("whole", "cut"))
        assert all(torch.equal(one.read(name), two.read(name)) for name in one.names())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("other", r"unknown key 'base_model.model.encoder.0.lora_A.weight': llama2 has no such linear layer"),
        ("half", r"missing key 'base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight'"),
        (
            "module",
            r"missing key 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'; lora.targets names it",
        ),
        ("shape", r"layers.0.self_attn.q_proj.lora_B.weight: has shape \[3, 4\], expected \[64, 4\]"),
        ("rank", r"lora_A.weight: has shape \[4, 176\], expected \[8, 176\]"),
        ("dora", r"adapter_config.json: use_dora=True is not supported, only use_dora=False"),
        ("kind", r"peft_type='LOHA' is not supported, only 'LORA'"),
        ("empty", r"no adapter here; it would hold adapter_model.safetensors or pytorch_lora_weights"),
        ("targets", r"adapts blocks.0.attention.qkv, which lora.targets leaves out"),
        ("head", r"model.lm_head.lora_A.weight: adapts head, which runs do not; merge them instead: convert --merge"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    hub: Path, run: Path, peft_folder: Path, tmp_path: Path, change: str, said: str
) -> None:
    file, config = peft_folder / "adapter_model.safetensors", peft_folder / "adapter_config.json"
    tensors, values = load_file(file), read_json(config)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    lora: dict[str, Any] = {"rank": 4, "alpha": 6.0, "init_from": str(peft_folder)}
    if change == "other":
        tensors = {"base_model.model.encoder.0.lora_A.weight": torch.zeros(4, 8)}
    elif change == "half":
        del tensors[f"{first}B.weight"]
    elif change == "module":
        del tensors[f"{first}A.weight"], tensors[f"{first}B.weight"]
    elif change == "head":
        rows, columns = load_file(hub / "model.safetensors")["lm_head.weight"].shape
        stem = "base_model.model.lm_head.lora_"
        tensors |= {f"{stem}A.weight": torch.zeros(4, columns), f"{stem}B.weight": torch.zeros(rows, 4)}
    elif change == "shape":
        tensors[f"{first}B.weight"] = torch.zeros(3, 4)
    elif change == "rank":
        values["r"] = 8
    elif change == "dora":
        values["use_dora"] = True
    elif change == "kind":
        values["peft_type"] = "LOHA"
    elif change == "targets":
        lora["targets"] = ("mlp.*", "attention.out")
    save_file(tensors, file)
    write_json(config, values)
    if change == "empty":
        shutil.rmtree(peft_folder)
        peft_folder.mkdir()
    with pytest.raises(UserError, match=said) as caught:
        train.starting_point(tmp_path / "run", False, recipe(hub, lora=lora), MODEL)
    assert "\n" not in str(caught.value)


def test_what_adapters_are_not(hub: Path, run: Path, tmp_path: Path) -> None:
    for said, start in {
        "init_from: lora trains adapters of given weights": recipe(hub, init_from=None),
        "holds adapters alone; continue them with lora.init_from=": recipe(hub, init_from=str(run), lora=None),
        "lora.rank=8: .* has rank 4; .*, set lora.rank=4 lora.alpha=6$": recipe(
            hub, lora={"rank": 8, "init_from": str(run)}
        ),
        r"lora.targets: 'atention.qkv' names no linear layer; did you mean 'blocks.\*.attention.qkv'": recipe(
            hub, lora={"targets": ("atention.qkv",)}
        ),
    }.items():
        with pytest.raises(UserError, match=said):
            train.starting_point(tmp_path / "run", False, start, MODEL)
    with pytest.raises(UserError, match="layout='original': has no form of adapters"):
        weights.convert(run, tmp_path / "out", MODEL, "original")
    with pytest.raises(UserError, match="is not a run, so it has no moving average"):
        weights.convert(hub, tmp_path / "out", MODEL, "hub", ema=True)
    with pytest.raises(UserError, match="is a run of whole weights, not of adapters"):
        train.run(
            recipe(hub, lora=None, steps=1, data={**corpus(run.parent), "sequence_length": 24}), MODEL, tmp_path / "w"
        )
        weights.convert(hub, tmp_path / "out", MODEL, "hub", merge_lora=tmp_path / "w")
    for said, changes in {
        "lora.rank=2: the run was saved with 4": {"lora": {"rank": 2, "alpha": 6.0}},
        "holds adapters, the recipe trains whole weights": {"lora": None},
        "init_from=/else: the run adapts": {"init_from": "/else"},
        "optim.ema=null: .* holds a moving average of decay 0.5": {"optim": {"lr": 0.05}},
    }.items():
        with pytest.raises(UserError, match=said):
            train.starting_point(run, True, recipe(hub, **changes, steps=9), MODEL)
