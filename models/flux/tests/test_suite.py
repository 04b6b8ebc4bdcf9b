"""FLUX.1 against core's suite and diffusers: text to image, with and without guidance, and Kontext."""

from __future__ import annotations

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
from mindspeed_model_flux import MODEL
from mindspeed_model_flux.model import pack
from mindspeed_model_flux.task import FluxRecipe
from torch import Tensor, nn

from .random_features import write_features

# 8 + 4 x 6 tokens for layouts that need an even number of each; 7 + 3 x 5, which no two ranks hold equal shares of.
EVEN, ODD = (8, (8, 12)), (7, (6, 10))
# More text than a rank of two or four holds: the first ones have no image at all.
WORDY = (17, (4, 6))
GRIDS = ((6, 8), (8, 12), (8, 12)) * 2
CONTEXT = {
    "cp2": (2, {"cp": 2}, ODD),
    "cp4": (4, {"cp": 4}, WORDY),
    "tp2-sequence-cp2": (4, {"tp": 2, "sequence": True, "cp": 2}, EVEN),
    "cp2-dp2-zero3": (4, {"cp": 2, "shard": "zero3"}, WORDY),
    "tp2-cp2-pp2": (8, {"tp": 2, "cp": 2, "pp": 2}, ODD),
}


class FluxSuite(ModelSuite):
    model = MODEL
    preset = "tiny"
    # The gradient of a scale that norms each head is a sum that nearly cancels.
    bf16 = 0.3
    reference_options = {"subfolder": "transformer"}
    parameter_counts = {"dev": 11_901_408_320, "kontext": 11_901_408_320, "schnell": 11_891_178_560, "tiny": 488_960}

    def recipe(self, folder: Path, **changes: Any) -> FluxRecipe:
        config = self.config(**self.spread)
        data = {} if folder == Path(".") else {"path": str(write_features(folder / "features", config, GRIDS))}
        fields: dict[str, Any] = {
            "preset": self.preset,
            "precision": "fp32",
            "steps": 4,
            "global_batch": 4,
            "data": data,
            "metrics": {"trackers": ()},
        }
        return FluxRecipe(**{**fields, **changes})

    def batch(self, config: Any, seed: int, size: tuple[int, tuple[int, int]] = EVEN) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        samples = 2 - seed % 2
        texts, grid = size
        shape = (samples, config.channels, *grid)
        batch = {
            "x": torch.randn(shape, generator=draw),
            "time": 1000 * torch.rand(samples, generator=draw),
            "text": torch.randn(samples, texts, config.joint_attention_dim, generator=draw),
            "pooled": torch.randn(samples, config.pooled_projection_dim, generator=draw),
            "velocity": torch.randn(shape, generator=draw),
            "weight": torch.rand(samples, generator=draw),
        }
        if config.guidance_embeds:
            batch["guidance"] = 1 + 3 * torch.rand(samples, generator=draw)
        if config.kontext:
            batch["reference"] = torch.randn(samples, config.channels, 4, grid[1], generator=draw)
        return batch

    def job(self, **changes: Any) -> Job:
        """Train with four micro-batches a step: no layout has more data ranks than two."""
        config = self.config(**self.spread)
        batches: dict[str, Any] = {"batches": lambda step: [self.batch(config, 4 * step + i) for i in range(4)]}
        return super().job(**{**batches, **changes})

    def compiled_batches(self, step: int) -> list[Batch]:
        """Return a step's batch: tokens change from step to step."""
        return [self.batch(self.config(), step, (ODD, EVEN)[step])]

    def reference(self, config: Any) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(**config.model_dump(exclude={"kontext"}))

    def reference_run(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        images = [batch["x"], *([batch["reference"]] if "reference" in batch else [])]
        out = network(
            hidden_states=torch.cat([pack(image) for image in images]).transpose(0, 1),
            encoder_hidden_states=batch["text"],
            pooled_projections=batch["pooled"],
            timestep=batch["time"] / 1000,
            guidance=batch.get("guidance"),
            img_ids=torch.cat([_ids(image, number) for number, image in enumerate(images)]),
            txt_ids=torch.zeros(batch["text"].shape[1], 3),
            return_dict=False,
        )[0]
        samples, channels, height, width = batch["x"].shape
        out = out[:, : height * width // 4].view(samples, height // 2, width // 2, channels, 2, 2)
        out = out.permute(0, 3, 1, 4, 2, 5).reshape(batch["x"].shape)
        losses = ((out - batch["velocity"]) ** 2).mean((1, 2, 3)) * batch["weight"]
        return out, losses.sum()

    def outputs(self, net: Trunk, batch: Batch) -> Tensor:
        return net(batch)  # type: ignore[return-value]


def _ids(latents: Tensor, number: int) -> Tensor:
    rows, columns = (side // 2 for side in latents.shape[2:])
    return torch.cartesian_prod(torch.tensor([number]), torch.arange(rows), torch.arange(columns)).float()


class TestTextToImage(FluxSuite):
    variants = ({}, {"guidance_embeds": False})
    # What is left out cuts nothing of this network that others do not.
    layouts = {
        name: layout for name, layout in LAYOUTS.items() if name not in ("tp2-sequence-chunks", "tp2-pp2-dp2-zero1")
    }
    compiled = {"one-recomputed": COMPILED["one-recomputed"]}

    @pytest.mark.dist
    @pytest.mark.parametrize("spread", CONTEXT)
    def test_context_parallelism_equals_one_process(self, spread: str) -> None:
        """Tokens that the ranks cannot share evenly, alone and with the other axes."""
        world, fields, size = CONTEXT[spread]
        job = self.job(batches=lambda step: [self.batch(self.config(), 4 * step + i, size) for i in range(4)])
        assert_equivalent(job, world, fields, FP64)

    @pytest.mark.dist
    @pytest.mark.parametrize(
        ("world", "fields", "dropout"),
        [(2, {"tp": 2}, 0.3), (4, {"tp": 2, "sequence": True, "cp": 2}, 0.0)],
        ids=["tp2-dropout", "tp2-sequence-cp2"],
    )
    def test_adapters_equal_one_process(
        self, world: int, fields: dict[str, Any], dropout: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On all layers: those before and behind what is shared out in parts, and those of modulation."""
        # B begins at zero, and A then has no gradient in the first step.
        monkeypatch.setattr(
            lora, "initialise", lambda name, whole, generator: whole.normal_(0, 0.1, generator=generator)
        )
        config = self.config()

        def batches(step: int) -> list[Batch]:
            torch.manual_seed(step)
            return [self.batch(config, 2 * step + i) for i in range(2)]

        targets = ("blocks.*", "image", "text", "time.*", "pooled.*", "guidance.*", "head.*")
        choice = LoraConfig(rank=3, alpha=5.0, dropout=dropout, targets=targets)
        job = self.job(build=lambda: lora.attach(MODEL.build(config), choice))
        assert_equivalent(replace(job, batches=batches), world, fields, FP64)


class TestKontext(FluxSuite):
    variants = ({"kontext": True},)
    spread = {"kontext": True}
    layouts = {"tp2-sequence": LAYOUTS["tp2-sequence"], "cp2": (2, {"cp": 2})}
    # What these hold does not depend on a reference; they are TestTextToImage's.
    test_resumes_under_other_layouts = None  # type: ignore[assignment]
    test_compiled_blocks_equal_plain_ones = None  # type: ignore[assignment]
    test_recompute_and_bf16_under_every_axis = None  # type: ignore[assignment]
    test_recompute_changes_nothing = None  # type: ignore[assignment]
    test_resume_equals_an_uninterrupted_run = None  # type: ignore[assignment]
    test_a_deterministic_run_repeats_bit_for_bit = None  # type: ignore[assignment]
    test_bf16_keeps_fp32_masters = None  # type: ignore[assignment]
    test_layouts_round_trip = None  # type: ignore[assignment]
    test_a_checkpoint_of_another_network_is_refused = None  # type: ignore[assignment]
    test_a_run_folder_in_use_is_refused = None  # type: ignore[assignment]
    test_every_recipe_is_valid = None  # type: ignore[assignment]
    test_presets_have_their_published_size = None  # type: ignore[assignment]
    test_the_command_line_trains_on_two_emulated_npus = None  # type: ignore[assignment]
    test_the_command_trains_on_two_accelerators = None  # type: ignore[assignment]
