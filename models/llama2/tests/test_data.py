"""Llama-2's tokenizer is found where it belongs and must fit the network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from mindspeed_model_core.data import train_tokenizer
from mindspeed_model_core.errors import UserError
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
