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
from mindspeed_model_llama2 import MODEL
from mindspeed_model_llama2.config import PRESETS
from mindspeed_model_llama2.data import Llama2Data, find_tokenizer, open_tokenizer
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


def test_metas_release_keeps_its_tokenizer_one_folder_up(tmp_path: Path) -> None:
    release = tmp_path / "llama-2-7b"
    release.mkdir()
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert find_tokenizer(release) is None
    (release / "params.json").write_text("{}")
    assert find_tokenizer(release) == str(tmp_path / "tokenizer.model")


def test_a_run_remembers_its_tokenizer(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    rest = {"model": "llama2", "config": {}, "digest": "", "step": 2, "data": {}}
    for fields, found in (
        ({"data": {"tokenizer": str(trained)}, "init_from": None}, str(trained)),
        ({"data": {"tokenizer": None}, "init_from": str(trained)}, str(trained)),
        ({"data": {"tokenizer": None}, "init_from": None}, None),
    ):
        saved = {"seed": 0, "precision": "bf16", "global_batch": 8, **fields}
        (folder / "run.json").write_text(json.dumps({**rest, "recipe": saved}))
        assert find_tokenizer(folder) == find_tokenizer(tmp_path / "run") == found


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
