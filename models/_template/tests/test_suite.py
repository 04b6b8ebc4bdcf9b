"""The package against core's suite and a plain PyTorch network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mindspeed_model_core.testing.equivalence import LAYOUTS
from mindspeed_model_core.testing.suite import COMPILED, ModelSuite
from mindspeed_model_core.trunk import Batch, Trunk
from mindspeed_model_template import MODEL
from mindspeed_model_template.task import TemplateRecipe
from torch import Tensor, nn

from .reference import Reference, ReferenceConfig

LENGTH = 16


class TestSuite(ModelSuite):
    model = MODEL
    variants = ({}, {"window": 3})
    # Few: its layers are core's, whose toy network is cut in every way.
    layouts = {name: LAYOUTS[name] for name in ("tp2", "dp2-zero3", "tp2-sequence-pp2-dp2-zero3")}
    compiled = {"one-recomputed": COMPILED["one-recomputed"]}
    parameter_counts = {"tiny": 110752}

    def recipe(self, folder: Path, **changes: Any) -> TemplateRecipe:
        fields: dict[str, Any] = {
            "preset": "tiny",
            "precision": "fp32",
            "steps": 4,
            "global_batch": 4,
            "data": {"path": str(text(folder)), "sequence_length": LENGTH},
            "metrics": {"trackers": ()},
        }
        return TemplateRecipe(**{**fields, **changes})

    def batch(self, config: Any, seed: int) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        before = torch.randint(config.vocab_size, (config.window, LENGTH), generator=draw)
        labels = torch.randint(config.vocab_size, (LENGTH,), generator=draw)
        labels[: seed % LENGTH] = -100
        return {"before": before, "labels": labels}

    def reference(self, config: Any) -> nn.Module:
        return Reference(ReferenceConfig(**config.model_dump()))

    def reference_run(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = network(batch["before"])
        loss = nn.functional.cross_entropy(logits, batch["labels"], ignore_index=-100, reduction="sum")
        return logits, loss

    def outputs(self, net: Trunk, batch: Batch) -> Tensor:
        return net({"before": batch["before"]})  # type: ignore[return-value]


def text(folder: Path) -> Path:
    """Return a file of text that can be learned; made once in a folder."""
    path = folder / "text.txt"
    if folder.is_dir() and folder != Path(".") and not path.exists():
        path.write_text("".join(f"{n} and {n} make {2 * n}.\n" for n in range(100)))
    return path
