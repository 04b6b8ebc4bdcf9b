"""A tokenizer goes where its weights go: through runs, conversions and working directories."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mindspeed_model_core import train, weights
from mindspeed_model_core.cli import app
from mindspeed_model_core.data import train_tokenizer
from mindspeed_model_core.testing.suite import open_net
from mindspeed_model_llama2 import MODEL
from mindspeed_model_llama2.task import Llama2Recipe
from typer.testing import CliRunner

TEXT = "a few words to learn from, and a few more words"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with text and a tokenizer."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    train_tokenizer([TEXT] * 4, 300, "words")
    Path("text.txt").write_text("\n\n".join(f"{TEXT} {i}" for i in range(9)))
    return folder


def trained(run: str, **fields: object) -> None:
    data = {"path": "text.txt", "sequence_length": 16, "tokenizer": fields.pop("tokenizer", None)}
    recipe = Llama2Recipe(
        preset="tiny", precision="fp32", steps=1, global_batch=2, data=data, metrics={"trackers": ()}, **fields
    )
    train.run(recipe, MODEL, run)


def test_runs_after_runs_export_their_tokenizer_from_anywhere(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained("one", tokenizer="words")
    trained("two", init_from="one")
    trained("three", init_from="two/checkpoints/step-00000001")
    want = (work / "words" / "tokenizer.json").read_bytes()
    shutil.rmtree("words")
    shutil.rmtree("one")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for source in (work / "two", work / "three" / "checkpoints" / "step-00000001"):
        out = tmp_path / f"out-{source.name}"
        weights.convert(source, out, MODEL, "hub")
        assert (out / "tokenizer.json").read_bytes() == want
        assert (out / "tokenizer_config.json").is_file()


def test_metas_tokenizer_one_folder_up_is_exported(work: Path, tmp_path: Path) -> None:
    net = open_net(MODEL, MODEL.presets["tiny"])
    weights.save(net.named_parameters(), net.config, MODEL.layouts[1], tmp_path / "release" / "llama-2-7b")
    (tmp_path / "release" / "tokenizer.model").write_bytes(b"pieces")
    weights.convert(tmp_path / "release" / "llama-2-7b", tmp_path / "hub", MODEL, "hub", preset="tiny")
    assert (tmp_path / "hub" / "tokenizer.model").read_bytes() == b"pieces"


def test_convert_says_that_there_is_no_tokenizer(work: Path, tmp_path: Path) -> None:
    net = open_net(MODEL, MODEL.presets["tiny"])
    weights.save(net.named_parameters(), net.config, MODEL.layouts[0], tmp_path / "bare")
    weights.save(net.named_parameters(), net.config, MODEL.layouts[0], tmp_path / "full", extras_from="words")
    for name, silent in (("bare", False), ("full", True)):
        command = ["convert", str(tmp_path / name), str(tmp_path / f"{name}-out"), "--layout", "original"]
        done = CliRunner().invoke(app(MODEL), command)
        assert done.exit_code == 0
        assert ("has no tokenizer, none was found with" not in done.output) is silent
