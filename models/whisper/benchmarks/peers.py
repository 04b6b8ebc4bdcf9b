"""Whisper beside transformers, eager and compiled: ``python peers.py --help``."""

from __future__ import annotations

from typing import Any

from mindspeed_model_core.perf.peers import Comparison, main
from mindspeed_model_core.perf.sides import COMPILE, Peer
from mindspeed_model_core.trunk import Batch
from mindspeed_model_whisper import MODEL
from torch import Tensor, nn


def build(config: Any, recipe: Any) -> nn.Module:
    """Return transformers' network, its attention by PyTorch's fused one, which is its default."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    net = WhisperForConditionalGeneration(WhisperConfig(**config.model_dump(), use_cache=False))
    if recipe.recompute == "all":
        net.gradient_checkpointing_enable()
    return net


def loss(net: nn.Module, batch: Batch, count: int) -> Tensor:
    """Return transformers' own loss; every text of the comparison has as many tokens, so means are alike."""
    kind = next(net.parameters()).dtype
    labels = batch["labels"]
    out = net(input_features=batch["mel"].to(kind), decoder_input_ids=batch["tokens"], labels=labels)
    return out.loss * (labels.numel() / count)


def peer(mode: str, *overrides: str) -> Peer:
    """Return transformers in a mode."""
    return Peer("transformers", build, loss, mode=mode, overrides=overrides)


ONE_DEVICE = ("global_batch=16", "micro_batch=16", "precision=bf16-pure", "parallel.shard=none")
AGAIN, COMPILED, ONE_GRAPH, REPLAYED = "recompute=all", "compile=true", "compile=whole", "cuda_graph=true"

COMPARISONS = (
    Comparison(
        "large-v3",
        "large-v3-pretrain",
        overrides=ONE_DEVICE,
        ours=((REPLAYED,), (), (COMPILED,), (ONE_GRAPH,), (AGAIN,), (REPLAYED, "precision=bf16")),
        peers=tuple(peer(mode, *how) for mode in ("eager", COMPILE) for how in ((), (AGAIN,))),
    ),
    Comparison("tiny", "mini", ours=((), (ONE_GRAPH,)), peers=(peer("eager"), peer(COMPILE)), tiny=True),
)

if __name__ == "__main__":
    main(MODEL, COMPARISONS, __file__)
