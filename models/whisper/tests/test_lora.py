"""Adapters of Whisper change places with peft on transformers' network, and merge into what they adapt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import lora, train, weights
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.recipe import LoraConfig
from mindspeed_model_core.testing.equivalence import assert_equivalent
from mindspeed_model_core.testing.suite import open_net, randomise
from mindspeed_model_core.testing.tolerance import FP64
from mindspeed_model_core.weights import adapters
from mindspeed_model_whisper import MODEL
from mindspeed_model_whisper.task import WhisperRecipe
from torch import Tensor

from .speech import write_speech
from .test_suite import TestSuite as Suite

CONFIG = MODEL.presets["mini"]
BATCH = {key: value for key, value in Suite().batch(CONFIG, 1).items() if key != "labels"}
DECODER = ("blocks.2.*", "blocks.3.*")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "mini"
    net = open_net(MODEL, CONFIG)
    randomise(net, seed=2)
    weights.save(net.named_parameters(), CONFIG, MODEL.layouts[0], folder)
    return folder


def recipe(hub: Path, folder: Path | None = None, **changes: Any) -> WhisperRecipe:
    fields: dict[str, Any] = {
        "preset": "mini",
        "init_from": str(hub),
        "precision": "fp32",
        "steps": 3,
        "global_batch": 4,
        "optim": {"lr": 0.05, "schedule": "constant"},
        "lora": {"rank": 4, "alpha": 6.0},
        "data": {} if folder is None else write_speech(folder),
        "metrics": {"trackers": ()},
    }
    return WhisperRecipe(**{**fields, **changes})


def logits(hub: Path, source: Path, **fields: Any) -> Tensor:
    """Return our network's, with the adapters of a run or a folder."""
    made = recipe(hub, lora={"rank": 4, "alpha": 6.0, "init_from": str(source), **fields})
    parallel = train.prepare(made, MODEL, Mesh(torch.device("cpu")))
    weights.load(parallel.net, hub, MODEL, write=lambda name, tensor: parallel.shards[name].write(tensor))
    assert made.lora is not None
    adapters.load(parallel.shards, str(source), MODEL, CONFIG, made.lora)
    with torch.no_grad():
        return parallel.net(BATCH)  # type: ignore[return-value]


def theirs(folder: Path, adapter: Path | None = None) -> Tensor:
    """Return transformers' logits, with peft's adapter if one is named."""
    from peft import PeftModel
    from transformers import WhisperForConditionalGeneration

    net: Any = WhisperForConditionalGeneration.from_pretrained(folder)
    if adapter is not None:
        net = PeftModel.from_pretrained(net, adapter)
    with torch.no_grad():
        return net.eval()(input_features=BATCH["mel"], decoder_input_ids=BATCH["tokens"]).logits  # type: ignore[no-any-return]


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("targets", [(), DECODER], ids=["all", "decoder"])
def test_peft_reads_our_adapter_and_it_merges(hub: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Trained for three steps; both parts of the network have layers of the same names there."""
    chosen = {"targets": targets}
    made = recipe(hub, tmp_path / "speech", lora={"rank": 4, "alpha": 6.0, **chosen})
    train.run(made, MODEL, tmp_path / "run")
    ours = logits(hub, tmp_path / "run", **chosen)
    weights.convert(tmp_path / "run", tmp_path / "adapter", MODEL, "hub")
    assert close(ours, theirs(hub, tmp_path / "adapter")) and not close(ours, theirs(hub))
    weights.convert(hub, tmp_path / "merged", MODEL, "hub", merge_lora=tmp_path / "adapter")
    assert close(ours, theirs(tmp_path / "merged"))


@pytest.mark.parity
def test_we_read_pefts_adapter(hub: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import WhisperForConditionalGeneration

    every = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=every)
    net: Any = get_peft_model(WhisperForConditionalGeneration.from_pretrained(hub), config)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(str(tmp_path / "peft"))
    assert close(logits(hub, tmp_path / "peft"), theirs(hub, tmp_path / "peft"))


@pytest.mark.dist
@pytest.mark.parametrize("fields", [{"tp": 2, "sequence": True}, {"pp": 2}], ids=str)
def test_adapters_under_layouts_equal_one_process(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # B begins at zero, and A then has no gradient in the first step.
    monkeypatch.setattr(lora, "initialise", lambda name, whole, generator: whole.normal_(0, 0.1, generator=generator))
    job = Suite().job(build=lambda: lora.attach(MODEL.build(CONFIG), LoraConfig(rank=3, alpha=5.0)), steps=2)
    assert_equivalent(job, 2, fields, FP64)


def test_a_stage_without_adapters_is_refused() -> None:
    net = lora.attach(MODEL.build(CONFIG), LoraConfig(rank=2, targets=DECODER))
    with pytest.raises(UserError, match="stage 0, blocks 0 to 1, has no adapter"):
        lora.check_stages(net, 2)
