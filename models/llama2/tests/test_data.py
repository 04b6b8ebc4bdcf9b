"""Llama-2's tokenizer is found where it belongs and must fit the network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mindspeed_model_core import checkpoint, metrics, train
from mindspeed_model_core.data import train_tokenizer
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.estimate import estimate
from mindspeed_model_core.testing.dist import run_dist
from mindspeed_model_llama2 import MODEL
from mindspeed_model_llama2.config import PRESETS
from mindspeed_model_llama2.data import Llama2Data, open_tokenizer
from mindspeed_model_llama2.task import Llama2Recipe, NextToken


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    train_tokenizer(["a few words to learn from, and a few more words"] * 4, 300, folder)
    return folder


def recipe(data: dict[str, Any] | None = None, **fields: Any) -> Llama2Recipe:
    return Llama2Recipe(preset="tiny", global_batch=4, data=Llama2Data(**(data or {})), **fields)


def test_the_tokenizer_of_the_data_goes_before_that_of_the_weights(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "weights")
    config = PRESETS["tiny"]
    weights = str(tmp_path / "weights")
    assert open_tokenizer(Llama2Data(tokenizer=str(trained)), weights, config).name_or_path == str(trained)
    assert open_tokenizer(Llama2Data(), weights, config).name_or_path == weights


@pytest.mark.parametrize(
    ("data", "init_from", "changes", "message"),
    [
        ({}, None, {}, "data.tokenizer: this field is required without init_from"),
        ({}, "{empty}", {}, "no tokenizer there; set data.tokenizer"),
        ({"tokenizer": "{trained}"}, None, {"vocab_size": 100}, "the model's vocab_size is 100"),
        ({"tokenizer": "{trained}"}, None, {"eos_token_id": 7}, "eos_token_id is 2, the model's is 7"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    trained: Path, tmp_path: Path, data: Any, init_from: str | None, changes: Any, message: str
) -> None:
    places = {"{empty}": str(tmp_path), "{trained}": str(trained)}
    data = Llama2Data(**{key: places[value] for key, value in data.items()})
    with pytest.raises(UserError) as caught:
        open_tokenizer(data, places.get(init_from or ""), PRESETS["tiny"].model_copy(update=changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_tasks_loaders_have_the_recipes_shapes(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"a few words {i}" for i in range(9)))
    made = recipe({"path": str(tmp_path), "tokenizer": str(trained), "sequence_length": 32}, micro_batch=2)
    task = NextToken(made, PRESETS["tiny"])
    for loader in (task.data(1, 2), task.synthetic(1, 2)):
        (batch,) = next(iter(loader))
        assert batch["tokens"].shape == (64,) and sum(batch["lengths"]) == 64
        assert int(batch["tokens"].max()) < 512 and set(loader.state_dict()["slots"]) == {"2", "3"}
    assert Llama2Data().sequence_length == 4096


@pytest.mark.parametrize(
    ("length", "micro_batch", "nearest"), [(33, 1, 32), (255, 1, 256), (35, 2, 36), (256, 1, None), (34, 2, None)]
)
def test_ranks_must_share_the_tokens_evenly(length: int, micro_batch: int, nearest: int | None) -> None:
    made = recipe(
        {"sequence_length": length},
        micro_batch=micro_batch,
        parallel={"tp": 4 if micro_batch == 2 else 2, "sequence": True},
    )
    config = PRESETS["tiny"].model_copy(update={"num_key_value_heads": 4})
    if nearest is None:
        NextToken(made, config)
        return
    with pytest.raises(UserError, match=f"data.sequence_length={length}: .*micro_batch={micro_batch}.*: {nearest}$"):
        NextToken(made, config)
    longest = config.model_copy(update={"max_position_embeddings": length})
    with pytest.raises(UserError, match=f"nearest: {min(nearest, length - 1)}$"):
        NextToken(made, longest)


def refusal(made: Llama2Recipe, run: Path) -> str:
    try:
        train.run(made, MODEL, run)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.dist
def test_show_and_train_refuse_tokens_that_ranks_cannot_share(tmp_path: Path) -> None:
    made = recipe({"sequence_length": 33}, parallel={"tp": 2, "sequence": True})
    with pytest.raises(UserError, match=r"data.sequence_length=33: .*parallel.tp=2; nearest: 32"):
        estimate(made, MODEL, 2)
    for said in run_dist(refusal, 2, made, tmp_path / "run"):
        assert "data.sequence_length=33: " in said and said.endswith("nearest: 32")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["initializer_range=-0.1", "rms_norm_eps=0", "rope_theta=0", "rope_theta=.inf"])
def test_impossible_sizes_are_refused(change: str) -> None:
    with pytest.raises(UserError, match=rf"^config: {change.partition('=')[0]}=.*: Input should be"):
        MODEL.load_recipe("tiny-text", [f"config.{change}"])


def test_a_broken_line_is_mended_and_the_run_resumed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the error says can be followed: mend the line, --resume, and the run is as if it had never been broken."""
    lines = [json.dumps({"text": f"{n} " + "a few more words to learn from " * 3}) for n in range(40)]
    good, text = tmp_path / "good.jsonl", tmp_path / "text.jsonl"
    good.write_text("\n".join(lines))
    text.write_text("\n".join([*lines[:13], '{"text": "cut', *lines[14:]]))

    def run(folder: str, path: Path, **changes: Any) -> list[float]:
        data = {"path": str(path), "tokenizer": str(trained), "sequence_length": 16, "shuffle": False}
        own = {"precision": "fp32", "steps": 12, "metrics": {"trackers": ()}, "init_from": None, **changes}
        train.run(recipe(data, **own), MODEL, tmp_path / folder, resume=folder == "cut" and path == text)
        return [record["loss"] for record in metrics.read(tmp_path / folder)]

    with pytest.raises(
        UserError, match=rf"{text}:14: not a JSON object .* is saved: mend it and continue with --resume"
    ):
        run("cut", text)
    (saved,) = checkpoint.steps(tmp_path / "cut" / "checkpoints")
    assert checkpoint.step_of(saved) > 1
    text.write_text("\n".join([*lines[:13], *lines[14:]]))
    with pytest.raises(UserError, match=r"data.path \(documents\): is 39 now and was 40"):
        run("cut", text)
    text.write_text("\n".join(lines))
    assert run("cut", text) == run("whole", good)
    assert f"{text}:14: not a JSON object" in capsys.readouterr().err
