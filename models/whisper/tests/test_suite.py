"""Whisper against core's suite and transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core.testing.dist import run_dist
from mindspeed_model_core.testing.equivalence import LAYOUTS
from mindspeed_model_core.testing.suite import COMPILED, ModelSuite
from mindspeed_model_core.testing.tolerance import FP64
from mindspeed_model_core.trunk import Batch, Trunk
from mindspeed_model_whisper import MODEL
from mindspeed_model_whisper.task import WhisperRecipe
from torch import Tensor, nn

from .speech import write_speech

LENGTH = 12


class TestSuite(ModelSuite):
    model = MODEL
    preset = "mini"
    variants = ({}, {"decoder_layers": 1, "decoder_attention_heads": 2, "encoder_ffn_dim": 80})
    # What cuts products and all at once hold is core's to show; the table at both ends of a pipeline is ours.
    layouts = {
        name: value
        for name, value in LAYOUTS.items()
        if name not in ("tp4", "tp2-sequence-chunks", "tp2-pp2-dp2-zero1")
    }
    compiled = {name: COMPILED[name] for name in ("one-recomputed", "one-whole")}
    # transformers' numbers less the sinusoids, 1500 x d_model, which it has among its parameters.
    parameter_counts = {
        "tiny": 37_760_640 - 1500 * 384,
        "base": 72_593_920 - 1500 * 512,
        "small": 241_734_912 - 1500 * 768,
        "medium": 763_857_920 - 1500 * 1024,
        "tiny.en": 37_760_256 - 1500 * 384,
        "base.en": 72_593_408 - 1500 * 512,
        "small.en": 241_734_144 - 1500 * 768,
        "medium.en": 763_856_896 - 1500 * 1024,
        "large-v2": 1_543_304_960 - 1500 * 1280,
        "large-v3": 1_543_490_560 - 1500 * 1280,
        "large-v3-turbo": 808_878_080 - 1500 * 1280,
        "mini": 74_496,
    }

    def recipe(self, folder: Path, **changes: Any) -> WhisperRecipe:
        fields: dict[str, Any] = {
            "preset": self.preset,
            "precision": "fp32",
            "steps": 4,
            "global_batch": 4,
            "data": {} if folder == Path(".") else write_speech(folder / "speech"),
            "metrics": {"trackers": ()},
        }
        return WhisperRecipe(**{**fields, **changes})

    def batch(self, config: Any, seed: int, length: int = LENGTH) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        samples = 2
        labels = torch.randint(config.vocab_size, (samples, length), generator=draw)
        labels[0, length - seed % length :] = -100
        return {
            "mel": torch.randn(samples, config.num_mel_bins, config.frames, generator=draw),
            # transformers passes back nothing to the row of its padding, which no label sees.
            "tokens": torch.randint(config.pad_token_id, (samples, length), generator=draw),
            "labels": labels,
        }

    def reference(self, config: Any) -> nn.Module:
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        theirs = WhisperConfig(**config.model_dump(), suppress_tokens=None, begin_suppress_tokens=None)
        net = WhisperForConditionalGeneration._from_config(theirs, attn_implementation="eager")
        # What is not trained is not a parameter, so that nothing makes it random.
        positions = net.model.encoder.embed_positions
        fixed = positions.weight.detach()
        del positions.weight
        positions.register_buffer("weight", fixed)
        return net

    def reference_run(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        out = network(input_features=batch["mel"], decoder_input_ids=batch["tokens"], labels=None).logits
        loss = nn.functional.cross_entropy(out.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        return out, loss

    def outputs(self, net: Trunk, batch: Batch) -> Tensor:
        return net({key: value for key, value in batch.items() if key != "labels"})  # type: ignore[return-value]

    def compiled_batches(self, step: int) -> list[Batch]:
        """Return batches of texts of two lengths."""
        return [self.batch(self.config(), 8 * step + i, (12, 16)[i // 2 % 2]) for i in range(8)]

    @pytest.mark.dist
    def test_resumes_under_other_layouts(self, tmp_path: Path) -> None:  # type: ignore[override]
        """What two stages hold alike is saved once, and read by each."""
        fields: dict[str, Any] = {"precision": "fp64", "checkpoint": {"every": 2, "keep": 9}}
        recipe = self.recipe(tmp_path, **fields, parallel={"pp": 2, "shard": "zero2"})
        losses = run_dist(self._train, 4, recipe, tmp_path / "run")[0]
        for world, layout in [(1, {}), (2, {"pp": 2}), (2, {"tp": 2, "sequence": True})]:
            folder = tmp_path / f"{world}-{len(layout)}"
            shutil.copytree(tmp_path / "run", folder)
            shutil.rmtree(folder / "checkpoints" / "step-00000004")
            other = self.recipe(tmp_path, **fields, parallel=layout)
            got = run_dist(self._train, world, other, folder, resume=True)[0]
            assert len(got) == 2
            assert all(abs(a - b) <= FP64 * abs(b) for a, b in zip(got, losses[2:], strict=True)), (layout, got, losses)

    @pytest.mark.dist
    def test_three_ranks_share_tokens(self, tmp_path: Path) -> None:
        """Their texts are padded until they can: the numbers are those of one process."""
        sizes = {"d_model": 24, "encoder_attention_heads": 3, "decoder_attention_heads": 3, "vocab_size": 321}
        sizes |= {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_source_positions": 48}
        fields: dict[str, Any] = {"precision": "fp64", "config": sizes, "steps": 2}
        one = self._train(self.recipe(tmp_path, **fields), tmp_path / "one")
        shared = self.recipe(tmp_path, **fields, parallel={"tp": 3, "sequence": True})
        got = run_dist(self._train, 3, shared, tmp_path / "three")[0]
        assert len(got) == 2 and all(abs(a - b) <= FP64 * abs(b) for a, b in zip(got, one, strict=True)), (got, one)
