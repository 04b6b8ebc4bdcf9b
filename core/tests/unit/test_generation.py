"""Choosing tokens and turning them into text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mindspeed_model_core.data import train_tokenizer
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.generation import Sampler, TextStream, begin

TEXT = "The little model reads a text, and says what it has read: naïve café 你好 \U0001f600!"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tokenizer([TEXT] * 4, 340, tmp_path_factory.mktemp("words") / "tokenizer")


def test_sampling_probabilities_equal_transformers() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 3
    for temperature, top_k, top_p in ((0.7, 0, 1.0), (1.3, 7, 1.0), (1.0, 0, 0.8), (0.6, 10, 0.9), (1.0, 99, 0.01)):
        theirs = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
        theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
        theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs
        ours = Sampler(temperature, top_k, top_p).probabilities(logits)
        torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), theirs.softmax(-1))


def test_draws_follow_probabilities_and_the_seed() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(4000, 1)
    sampler = Sampler(temperature=1.0, seed=3)
    first = sampler(logits)
    seen = first.bincount(minlength=4) / 4000
    torch.testing.assert_close(seen, logits[0].softmax(-1), atol=0.03, rtol=0)
    assert torch.equal(Sampler(temperature=1.0, seed=3)(logits), first) and not torch.equal(sampler(logits), first)
    assert not torch.equal(Sampler(temperature=1.0, seed=4)(logits), first)
    assert Sampler()(logits[:1]).tolist() == [2] == Sampler(temperature=5.0, top_k=1)(logits[:1]).tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"seed": 2**63}, "seed=9223372036854775808: must be from 0 to 9223372036854775807"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_sampling_is_refused(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampler(**values)


def test_streamed_text_never_breaks_a_character(words: Any) -> None:
    for before, text in (("Say:", f" {TEXT} Ω"), ("", f"Ω{TEXT}"), ("Ω", "好\n\n  \U0001f389\U0001f389 Ωé")):
        ids = begin(words, before)
        both = begin(words, before + text)
        assert both[: len(ids)] == ids
        stream = TextStream(words, ids)
        pieces = [stream.push(token) for token in both[len(ids) :]]
        assert "".join(pieces) == text and stream.flush() == ""
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert sum(bool(piece) for piece in pieces) > 5
        assert "" in pieces, "no character of several tokens was met"


def test_a_character_cut_off_by_the_end_is_shown_as_missing(words: Any) -> None:
    stream = TextStream(words)
    first, *_ = (words.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "好".encode())
    assert stream.push(first) == "" and stream.flush() == "\N{REPLACEMENT CHARACTER}" and stream.flush() == ""
