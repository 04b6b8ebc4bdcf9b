"""Wan2.1 against core's suite and diffusers: text-to-video, image-to-video, first and last frame to video."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import lora
from mindspeed_model_core.recipe import LoraConfig
from mindspeed_model_core.testing.equivalence import LAYOUTS, Job, assert_equivalent
from mindspeed_model_core.testing.suite import COMPILED, ModelSuite
from mindspeed_model_core.testing.tolerance import FP64
from mindspeed_model_core.trunk import Batch, Trunk
from mindspeed_model_wan21 import MODEL
from mindspeed_model_wan21.task import Wan21Recipe
from torch import Tensor, nn

from .random_features import write_features

# 2 x 3 x 5 = 30 tokens for layouts that need an even number; 45, of which neither 2 nor 4 ranks hold equal shares.
EVEN, ODD = (2, 6, 10), (3, 6, 10)
# Six clips in two shapes.
GRIDS = ((1, 6, 8), EVEN, EVEN) * 2
CONTEXT = {
    "cp2": (2, {"cp": 2}),
    "cp4": (4, {"cp": 4}),
    "tp2-cp2": (4, {"tp": 2, "cp": 2}),
    "cp2-dp2-zero3": (4, {"cp": 2, "shard": "zero3"}),
    "tp2-cp2-pp2": (8, {"tp": 2, "cp": 2, "pp": 2}),
}


class Wan21Suite(ModelSuite):
    model = MODEL
    # The gradient of a scale that norms a whole width is a sum that nearly cancels.
    bf16 = 0.3
    reference_options = {"subfolder": "transformer"}
    parameter_counts = {
        "t2v-1.3b": 1_418_996_800,
        "t2v-14b": 14_288_491_584,
        "i2v-1.3b": 1_564_428_608,
        "i2v-14b": 16_394_878_784,
        "flf2v-14b": 16_395_536_704,
        "tiny-t2v": 231_936,
        "tiny-i2v": 272_524,
    }

    def recipe(self, folder: Path, **changes: Any) -> Wan21Recipe:
        data = {} if folder == Path(".") else {"path": str(write_features(folder / "features", self.config(), GRIDS))}
        fields: dict[str, Any] = {
            "preset": self.preset,
            "precision": "fp32",
            "steps": 4,
            "global_batch": 4,
            "data": data,
            "metrics": {"trackers": ()},
        }
        return Wan21Recipe(**{**fields, **changes})

    def batch(self, config: Any, seed: int, grid: tuple[int, int, int] = EVEN) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        samples = 2 - seed % 2
        batch = {
            "x": torch.randn(samples, config.in_channels, *grid, generator=draw),
            "time": 1000 * torch.rand(samples, generator=draw),
            "text": torch.randn(samples, 512, config.text_dim, generator=draw),
            "velocity": torch.randn(samples, config.out_channels, *grid, generator=draw),
            "weight": torch.rand(samples, generator=draw),
        }
        if config.image_dim is not None:
            tokens = config.pos_embed_seq_len or 5
            batch["image"] = torch.randn(samples, tokens, config.image_dim, generator=draw)
        return batch

    def job(self, **changes: Any) -> Job:
        """Train with short texts: 512 tokens would be most of the work."""
        job = super().job(**changes)
        return replace(job, batches=lambda step: [{**b, "text": b["text"][:, :9]} for b in job.batches(step)])

    def reference(self, config: Any) -> nn.Module:
        from diffusers import WanTransformer3DModel

        added = config.width if config.image_dim else None
        return WanTransformer3DModel(**config.model_dump(), added_kv_proj_dim=added)

    def reference_run(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        image = batch.get("image")
        if image is not None and network.config.pos_embed_seq_len:
            # diffusers takes the tokens of the two frames as two images.
            image = image.unflatten(1, (2, -1)).flatten(0, 1)
        out = network(
            hidden_states=batch["x"],
            timestep=batch["time"],
            encoder_hidden_states=batch["text"],
            encoder_hidden_states_image=image,
            return_dict=False,
        )[0]
        losses = ((out - batch["velocity"]) ** 2).mean((1, 2, 3, 4)) * batch["weight"]
        return out, losses.sum()

    def outputs(self, net: Trunk, batch: Batch) -> Tensor:
        return net(batch)  # type: ignore[return-value]


class TestTextToVideo(Wan21Suite):
    preset = "tiny-t2v"
    compiled = {"cp2-recomputed": (2, {"cp": 2}, {"recompute": "all"})}

    @pytest.mark.dist
    @pytest.mark.parametrize("spread", CONTEXT)
    def test_context_parallelism_equals_one_process(self, spread: str) -> None:
        """Tokens that the ranks cannot share evenly, alone and with the other axes."""
        job = self.job(batches=lambda step: [self.batch(self.config(), 8 * step + i, ODD) for i in range(8)])
        assert_equivalent(job, *CONTEXT[spread], FP64)

    def compiled_batches(self, step: int) -> list[Batch]:
        """Return a step's batch, of tokens that ranks do not share evenly."""
        return [self.batch(self.config(), step, ODD)]

    @pytest.mark.dist
    @pytest.mark.parametrize("shard", ["none", "zero2"])
    def test_adapters_under_context_parallelism_equal_one_process(
        self, shard: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # B begins at zero, and A then has no gradient in the first step.
        monkeypatch.setattr(
            lora, "initialise", lambda name, whole, generator: whole.normal_(0, 0.1, generator=generator)
        )
        config = self.config()
        job = self.job(
            build=lambda: lora.attach(MODEL.build(config), LoraConfig(rank=3, alpha=5.0)),
            batches=lambda step: [self.batch(config, 8 * step + i, ODD) for i in range(8)],
        )
        assert_equivalent(job, 4, {"cp": 2, "shard": shard}, FP64)

    @pytest.mark.dist
    @pytest.mark.parametrize(
        "fields",
        [{"cp": 2}, {"tp": 2, "sequence": True, "cp": 2}, {"cp": 2, "pp": 2}, {"tp": 2, "sequence": True}],
        ids=str,
    )
    def test_dropout_is_the_same_under_every_layout(self, fields: dict[str, Any], monkeypatch: Any) -> None:
        """Adapters of inputs that are shared out by token, or by feature, and of those that every rank has whole."""
        monkeypatch.setattr(
            lora, "initialise", lambda name, whole, generator: whole.normal_(0, 0.1, generator=generator)
        )
        config, grid = self.config(), (2, 8, 12) if "sequence" in fields else ODD

        def batches(step: int) -> list[Batch]:
            torch.manual_seed(step)
            return [{**b, "text": b["text"][:, :9]} for b in (self.batch(config, 2 * step + i, grid) for i in range(2))]

        targets = ("blocks.*", "patches.*", "time.*", "text.*", "head.*")
        job = self.job(
            build=lambda: lora.attach(MODEL.build(config), LoraConfig(rank=3, dropout=0.3, targets=targets)),
            recompute="all",
        )
        world = math.prod(fields.get(axis, 1) for axis in ("tp", "cp", "pp"))
        assert_equivalent(replace(job, batches=batches), world, fields, FP64)


class TestImageToVideo(Wan21Suite):
    compiled = {"dp2-zero3": COMPILED["dp2-zero3"]}
    preset = "tiny-i2v"
    variants = ({}, {"pos_embed_seq_len": 10})
    layouts = {
        "tp2-sequence": LAYOUTS["tp2-sequence"],
        "pp2": LAYOUTS["pp2"],
        "cp2": CONTEXT["cp2"],
        "tp2-sequence-pp2-dp2-zero3": LAYOUTS["tp2-sequence-pp2-dp2-zero3"],
    }
    # What these hold does not depend on the conditioning; they are TestTextToVideo's.
    test_resumes_under_other_layouts = None  # type: ignore[assignment]
    test_recompute_and_bf16_under_every_axis = None  # type: ignore[assignment]
    test_recompute_changes_nothing = None  # type: ignore[assignment]
    test_resume_equals_an_uninterrupted_run = None  # type: ignore[assignment]
    test_a_deterministic_run_repeats_bit_for_bit = None  # type: ignore[assignment]
    test_bf16_keeps_fp32_masters = None  # type: ignore[assignment]
    test_a_checkpoint_of_another_network_is_refused = None  # type: ignore[assignment]
    test_a_run_folder_in_use_is_refused = None  # type: ignore[assignment]
    test_every_recipe_is_valid = None  # type: ignore[assignment]
    test_presets_have_their_published_size = None  # type: ignore[assignment]
    test_the_command_line_trains_on_two_emulated_npus = None  # type: ignore[assignment]
