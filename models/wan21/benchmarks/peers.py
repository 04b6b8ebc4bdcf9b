"""Wan2.1 beside diffusers, eager and compiled, whole and with peft's adapters: ``python peers.py --help``."""

from __future__ import annotations

from typing import Any

from mindspeed_model_core.flow import velocity_loss
from mindspeed_model_core.perf.peers import Comparison, main
from mindspeed_model_core.perf.sides import COMPILE, Peer
from mindspeed_model_core.trunk import Batch
from mindspeed_model_wan21 import MODEL
from torch import Tensor, nn


def build(config: Any, recipe: Any) -> nn.Module:
    """Return diffusers' network."""
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(**config.model_dump(), added_kv_proj_dim=config.width if config.image_dim else None)
    if recipe.recompute == "all":
        net.enable_gradient_checkpointing()
    return net


def loss(net: nn.Module, batch: Batch, count: int) -> Tensor:
    """Return the mean over samples of our objective: the weighted error of the velocity."""
    kind = next(net.parameters()).dtype
    out = net(
        hidden_states=batch["x"].to(kind),
        timestep=batch["time"],
        encoder_hidden_states=batch["text"].to(kind),
        return_dict=False,
    )[0]
    return velocity_loss(out, batch["velocity"], batch["weight"]) / count


def peer(mode: str, *overrides: str) -> Peer:
    """Return diffusers in a mode."""
    return Peer("diffusers", build, loss, mode=mode, overrides=overrides)


WHOLE, AGAIN, KEEP = "recompute=none", "recompute=all", "recompute_keep=attention"
MASTERS, ONE_GRAPH = "precision=bf16", "compile=whole"
ONE_DEVICE = ("global_batch=1", "precision=bf16-pure", "parallel.shard=none")
PEERS = tuple(peer(mode, how) for mode in ("eager", COMPILE) for how in (WHOLE, AGAIN))

COMPARISONS = (
    Comparison(
        "t2v-1.3b",
        "t2v-1.3b-one-device",
        ours=((), (WHOLE,), (AGAIN, KEEP), (WHOLE, MASTERS)),
        peers=PEERS,
    ),
    Comparison(
        "t2v-1.3b-lora",
        "t2v-1.3b-lora",
        overrides=ONE_DEVICE,
        ours=((WHOLE,), (AGAIN,), (AGAIN, KEEP)),
        peers=PEERS,
    ),
    Comparison("tiny", "tiny-t2v", ours=((), (ONE_GRAPH,)), peers=(peer("eager"), peer(COMPILE)), tiny=True),
    Comparison("tiny-lora", "tiny-t2v", overrides=("lora={rank: 4}",), peers=(peer("eager"),), tiny=True),
)

if __name__ == "__main__":
    main(MODEL, COMPARISONS, __file__)
