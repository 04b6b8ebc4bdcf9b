"""Tokenizers are trained, saved, found and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mindspeed_model_core.data import PackedText, TextData
from mindspeed_model_core.data.tokenizer import find_tokenizer, keep_tokenizer, load_tokenizer, train_tokenizer
from mindspeed_model_core.errors import UserError

TEXTS = ["The quick brown fox jumps over the lazy dog.\n\tThe dog sleeps."] * 8 + [
    "Ein Fuchs läuft über die Brücke."
] * 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(TEXTS, 340, folder)
    return folder


def test_a_trained_tokenizer_is_like_llamas(trained: Path) -> None:
    tok = load_tokenizer(trained, 340)
    assert (tok.bos_token_id, tok.eos_token_id, tok.unk_token_id) == (1, 2, 0)
    vocab = tok.get_vocab()
    assert len(vocab) <= 340 and [vocab[f"<0x{i:02X}>"] for i in (0, 255)] == [3, 258]
    assert any(len(token) > 4 for token in vocab), "no merge was learnt"
    assert not any("\n" in token or "▁" in token[1:] for token in vocab)
    for text in ("The fox 你好 \U0001f600 läuft\n\n  twice", "", "a\tb"):
        ids = tok.encode(text, add_special_tokens=False)
        assert tok.decode(ids) == text
        assert 0 not in ids
    assert tok("The dog").input_ids[0] == 1


def test_training_is_reproducible(trained: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 340, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_an_existing_folder_is_kept_unless_asked(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "precious").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        train_tokenizer(TEXTS, 340, tmp_path / "here")
    assert [f.name for f in (tmp_path / "here").iterdir()] == ["precious"]
    train_tokenizer(TEXTS, 340, tmp_path / "here", overwrite=True)
    assert load_tokenizer(tmp_path / "here") and [f.name for f in tmp_path.iterdir()] == ["here"]


def test_a_tokenizer_is_found_by_folder_or_file(trained: Path, tmp_path: Path) -> None:
    assert load_tokenizer(trained / "tokenizer.json").get_vocab() == load_tokenizer(str(trained)).get_vocab()
    for source, message in (
        (tmp_path / "nowhere", "expected a folder, or a file named tokenizer.json or tokenizer.model"),
        (tmp_path, "no tokenizer.json or tokenizer.model in this folder"),
    ):
        with pytest.raises(UserError) as caught:
            load_tokenizer(source)
        assert message in str(caught.value)
    shutil.copy(trained / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match="no tokenizer_config.json beside"):
        load_tokenizer(tmp_path)
    shutil.copy(trained / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match=r"^[^\n]*cannot be read[^\n]*$"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_file_alone_is_llamas(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    corpus = tmp_path / "corpus"
    corpus.write_text("\n".join(TEXTS * 4))
    (tmp_path / "meta").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "meta" / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "meta" / "tokenizer.model"))
    tok = load_tokenizer(tmp_path / "meta" / "tokenizer.model")
    assert (tok.bos_token_id, tok.eos_token_id) == (1, 2)
    for text in ("The quick fox", "über 你好\n\n x  y"):
        assert tok.encode(text, add_special_tokens=False) == reference.encode(text)


def test_a_vocabulary_larger_than_the_model_is_refused(trained: Path) -> None:
    needed = len(load_tokenizer(trained))
    assert load_tokenizer(trained, needed)
    with pytest.raises(
        UserError, match=rf"has {needed} tokens, the model's vocab_size is {needed - 1}; .*vocab_size={needed}"
    ):
        load_tokenizer(trained, needed - 1)
    with pytest.raises(UserError, match="vocab_size=259: must be above 259"):
        train_tokenizer(TEXTS, 259, trained.parent / "small")


@pytest.mark.parametrize("workers", [0, 2])
def test_documents_are_framed_and_text_cannot_spell_special_tokens(
    trained: Path, tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "The </s> fox <s> " * 3
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "dog"}))
    tok = load_tokenizer(trained)
    tok.model_max_length = 8
    tok([text, text], verbose=False)  # its threads have run before workers are forked

    def batch() -> Any:
        data = TextData(path=str(tmp_path), sequence_length=200, shuffle=False, workers=workers)
        return next(iter(PackedText(data, tok, global_batch=2, micro_batch=2, seed=0, rank=0, ranks=1)))[0]

    one, _ = batch()["tokens"].view(2, -1).tolist()
    assert one[0] == 1 and one.index(2) == batch()["lengths"][0] - 1
    inner = one[1 : one.index(2)]
    assert 1 not in inner and tok.decode(inner) == text
    # Neither the tokenizer's warning of forks nor transformers' of long texts is for the user's eyes.
    assert capfd.readouterr().err == "" and not tok.deprecation_warnings


def test_metas_release_keeps_its_tokenizer_one_folder_up(tmp_path: Path) -> None:
    release = tmp_path / "llama-2-7b"
    release.mkdir()
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert find_tokenizer(release) is None
    (release / "params.json").write_text("{}")
    assert find_tokenizer(release) == tmp_path


def test_a_run_remembers_its_tokenizer(trained: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    rest = {"model": "llama2", "config": {}, "digest": "", "step": 2, "data": {}}
    for fields, found in (
        ({"data": {"tokenizer": str(trained)}, "init_from": None}, trained),
        ({"data": {"tokenizer": None}, "init_from": str(trained)}, trained),
        ({"data": {"tokenizer": None}, "init_from": None}, None),
    ):
        recipe = {"seed": 0, "precision": "bf16", "global_batch": 8, **fields}
        (checkpoint / "run.json").write_text(json.dumps({**rest, "recipe": recipe}))
        assert find_tokenizer(checkpoint) == find_tokenizer(tmp_path / "run") == found
    keep_tokenizer(trained, tmp_path / "run")
    keep_tokenizer(tmp_path, tmp_path / "run")  # the first stays
    assert find_tokenizer(checkpoint) == find_tokenizer(tmp_path / "run") == tmp_path / "run" / "tokenizer"
    assert load_tokenizer(tmp_path / "run" / "tokenizer").get_vocab() == load_tokenizer(trained).get_vocab()
