"""FLUX.1 beside diffusers, eager and compiled, whole and with peft's adapters: ``python peers.py --help``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from mindspeed_model_core.flow import velocity_loss
from mindspeed_model_core.perf.peers import Comparison, main
from mindspeed_model_core.perf.sides import COMPILE, Peer
from mindspeed_model_core.trunk import Batch
from mindspeed_model_flux import MODEL
from mindspeed_model_flux.model import pack, unpack
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def build(config: Any, recipe: Any) -> nn.Module:
    """Return diffusers' network."""
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(**config.model_dump(exclude={"kontext"}))
    if recipe.recompute == "all":
        net.enable_gradient_checkpointing()
    return net


def loss(net: nn.Module, batch: Batch, count: int) -> Tensor:
    """Return the mean over samples of our objective: the weighted error of the velocity."""
    kind, device = next(net.parameters()).dtype, batch["x"].device
    rows, columns = (side // 2 for side in batch["x"].shape[2:])
    cells = (torch.arange(size, device=device) for size in (1, rows, columns))
    out = net(
        hidden_states=pack(batch["x"].to(kind)).transpose(0, 1).contiguous(),
        encoder_hidden_states=batch["text"].to(kind),
        pooled_projections=batch["pooled"].to(kind),
        timestep=batch["time"] / 1000,
        guidance=batch["guidance"],
        img_ids=torch.cartesian_prod(*cells).to(kind),
        txt_ids=torch.zeros(batch["text"].shape[1], 3, device=device, dtype=kind),
        return_dict=False,
    )[0]
    velocity = unpack(out.transpose(0, 1), (2 * rows, 2 * columns))
    return velocity_loss(velocity, batch["velocity"], batch["weight"]) / count


def without_cudnn() -> AbstractContextManager[None]:
    """Keep PyTorch from cuDNN's attention: in this network it ended in an illegal memory access on an H200."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def peer(mode: str, *overrides: str) -> Peer:
    """Return diffusers in a mode."""
    return Peer("diffusers", build, loss, mode=mode, overrides=overrides, around=without_cudnn)


COMPILED, ONE_GRAPH, REPLAYED = "compile=true", "compile=whole", "cuda_graph=true"
WHOLE, AGAIN = "recompute=none", "recompute=all"
ATTENTION, PRODUCTS = "recompute_keep=attention", "recompute_keep=products"
ONE_DEVICE = ("global_batch=16", "micro_batch=16", "precision=bf16-pure", "parallel.shard=none")
SMALL = ("data.height=256", "data.width=256", "data.synthetic=[256,256]")
PEERS = tuple(peer(mode, how) for mode in ("eager", COMPILE) for how in (AGAIN, WHOLE))

COMPARISONS = (
    # All weights with their moments are 96 GB in bf16: not every block of ours can keep all, and none of a peer's.
    Comparison(
        "dev",
        "dev-256",
        overrides=ONE_DEVICE,
        ours=((AGAIN, PRODUCTS, REPLAYED), (AGAIN, PRODUCTS), (AGAIN, ATTENTION), (AGAIN,), (AGAIN, COMPILED)),
        peers=PEERS,
    ),
    Comparison(
        "dev-lora",
        "dev-lora",
        overrides=(*ONE_DEVICE, *SMALL),
        ours=((WHOLE, REPLAYED), (WHOLE,), (AGAIN, PRODUCTS), (AGAIN,), (WHOLE, COMPILED)),
        peers=PEERS,
    ),
    Comparison("tiny", "tiny", ours=((), (ONE_GRAPH,)), peers=(peer("eager"), peer(COMPILE)), tiny=True),
    Comparison(
        "tiny-lora", "tiny", overrides=("lora={rank: 4, targets: [blocks.*]}",), peers=(peer("eager"),), tiny=True
    ),
)

if __name__ == "__main__":
    main(MODEL, COMPARISONS, __file__)
