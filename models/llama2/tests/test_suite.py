"""Llama-2 against core's suite and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core.data import train_tokenizer
from mindspeed_model_core.testing.equivalence import assert_equivalent
from mindspeed_model_core.testing.suite import COMPILED, ModelSuite
from mindspeed_model_core.testing.tolerance import FP64
from mindspeed_model_core.trunk import Batch, Trunk
from mindspeed_model_llama2 import MODEL
from mindspeed_model_llama2.task import Llama2Recipe
from torch import Tensor, nn

LENGTH = 24
WORDS = "the model learns to read a little text and each line is a document of its own".split()


def corpus(folder: Path) -> dict[str, Any]:
    """Write a small text and a tokenizer trained on it; return the ``data`` fields that name them."""
    text = folder / "text.jsonl"
    if not text.exists():
        lines = [" ".join(WORDS[i % 5 : 5 + i % 11] * (1 + i % 4)) for i in range(40)]
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        train_tokenizer(lines, 320, folder / "tokenizer")
    return {"path": str(text), "tokenizer": str(folder / "tokenizer")}


class TestSuite(ModelSuite):
    model = MODEL
    variants = ({}, {"num_key_value_heads": 4})
    spread = {"num_key_value_heads": 4}
    compiled = {name: how for name, how in COMPILED.items() if name != "one-whole"}  # two ranks do the same
    parameter_counts = {"7b": 6738415616, "13b": 13015864320, "70b": 68976648192, "tiny": 250432}

    @pytest.mark.dist
    @pytest.mark.parametrize("grouped", ["tp2", "tp2-sequence", "tp2-sequence-pp2-dp2-zero3"])
    def test_grouped_queries_equal_one_process(self, grouped: str) -> None:
        """Ranks that hold fewer key and value heads than query heads; ``spread`` leaves as many."""
        config = self.config(num_key_value_heads=2)
        assert config.num_attention_heads > config.num_key_value_heads
        world, fields = self.layouts[grouped]
        assert_equivalent(self.job(build=lambda: MODEL.build(config)), world, fields, FP64)

    def recipe(self, folder: Path, **changes: Any) -> Llama2Recipe:
        fields: dict[str, Any] = {
            "preset": "tiny",
            "precision": "fp32",
            "steps": 4,
            "global_batch": 4,
            "data": {**({} if folder == Path(".") else corpus(folder)), "sequence_length": LENGTH},
            "metrics": {"trackers": ()},
        }
        return Llama2Recipe(**{**fields, **changes})

    def batch(self, config: Any, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, config.vocab_size, (LENGTH,), generator=generator)
        first = int(torch.randint(5, LENGTH - 5, (), generator=generator))
        labels = tokens.roll(-1)
        labels[first - 1] = labels[-1] = -100
        if seed % 3 == 0:
            labels[: first // 2] = -100
        positions = torch.cat((torch.arange(first), torch.arange(LENGTH - first)))
        return {"tokens": tokens, "labels": labels, "positions": positions, "lengths": (first, LENGTH - first)}

    def flops_batch(self, config: Any) -> Batch:
        return self._of_one_document(self.batch(config, 0))

    def _of_one_document(self, batch: Batch) -> Batch:
        return {**batch, "positions": torch.arange(LENGTH), "lengths": (LENGTH,)}

    def compiled_batches(self, step: int) -> list[Batch]:
        """Return half of the batches of documents of unlike lengths, which run uncompiled."""
        batches = super().compiled_batches(step)
        return [batch if i // 2 % 2 else self._of_one_document(batch) for i, batch in enumerate(batches)]

    def reference(self, config: Any) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        fields = config.model_dump(exclude={"rope_theta"})
        theirs = LlamaConfig(
            **fields, rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, use_cache=False
        )
        return LlamaForCausalLM._from_config(theirs, attn_implementation="eager")

    def reference_run(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run each document alone: what packing must equal."""
        logits, loss = [], torch.zeros(())
        documents = zip(batch["tokens"].split(batch["lengths"]), batch["labels"].split(batch["lengths"]), strict=True)
        for tokens, labels in documents:
            out = network(input_ids=tokens[None]).logits[0]
            logits.append(out)
            loss = loss + nn.functional.cross_entropy(out.float(), labels, ignore_index=-100, reduction="sum")
        return torch.cat(logits), loss

    def outputs(self, net: Trunk, batch: Batch) -> Tensor:
        return net({key: value for key, value in batch.items() if key != "labels"})  # type: ignore[return-value]


def test_recipes_have_the_published_learning_rates() -> None:
    """MindSpeed-LLM's for pretraining; the others are this package's own."""
    from mindspeed_model_core import recipe as recipes

    rates = {name: MODEL.load_recipe(name).optim.lr for name in recipes.names(MODEL.package)}
    assert rates == {
        "7b-pretrain": 1.25e-6,
        "7b-one-device": 1.25e-6,
        "13b-pretrain": 1e-6,
        "70b-pretrain": 1e-6,
        "7b-zero3": 3e-5,
        "tiny-text": 1.5e-3,
    }
