"""The two sides of a comparison: our trainer, and a plain loop around another library's network of equal weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from .. import device as devices
from .. import lora, weights
from ..model import Model
from ..optim import learning_rate
from ..parallel.apply import COMPUTE, initial
from ..parallel.mesh import Mesh
from ..recipe import Recipe
from ..task import Work
from ..train import Session
from ..trunk import Batch, Trunk
from ..weights.layout import Bound
from ..weights.source import on_meta
from .measurement import from_random

COMPILE = "compile"


@dataclass(frozen=True)
class Peer:
    """One way in which another library does a comparison's work.

    ``build(config, recipe)`` returns its network, on the device and in the dtype that are the defaults meanwhile; its
    parameters have the names of ``layout``, the model's first unless named. ``loss(net, batch, count)`` returns the
    part of a batch, encoded by our task, in the mean of a step's ``count`` terms; ``split`` cuts a batch first, where
    the network takes less at once or in another form. ``mode`` is eager, or what ``around`` and ``build`` make of it;
    one with ``compile`` in it is compiled. ``overrides`` change the recipe, its micro-batch
    or recomputation; ``settings`` say what no recipe does. ``needs`` are distributions beside the library's, and
    ``accelerator`` says that the CPU will not do.
    """

    library: str
    build: Callable[[Any, Any], nn.Module]
    loss: Callable[[nn.Module, Batch, int], Tensor]
    mode: str = "eager"
    split: Callable[[Batch], Iterable[Batch]] = lambda batch: (batch,)
    overrides: tuple[str, ...] = ()
    settings: str = ""
    needs: tuple[str, ...] = ()
    accelerator: bool = False
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    layout: str | None = None


@dataclass(frozen=True)
class Done:
    """What a step was: its mean loss, the gradient's norm before clipping (None: not taken), its work."""

    loss: float
    norm: float | None
    work: Work


Step = Callable[[], Callable[[], Done]]
"""Queues a step on the device and returns what reads it once the device was waited for."""


@contextmanager
def open_ours(recipe: Recipe, model: Model, device: torch.device) -> Iterator[Step]:
    """Give a step of our trainer: data, forward, backward, clipping, AdamW, totals."""
    session = Session(from_random(recipe), model, Mesh(device), synthetic=True)
    session.start()
    for name, shard in session.parallel.shards.items():
        if not lora.is_factor(name) and _is_blank(shard.master):
            shard.write(_first(session.parallel.net, name, tuple(shard.shape), recipe.seed, device))

    def step() -> Callable[[], Done]:
        totals = session.step()

        def read() -> Done:
            loss, samples, units, flops, _, count, norm = totals.read()
            return Done(loss / count, norm, Work(round(samples), round(units), flops))

        return read

    yield step


@contextmanager
def open_peer(peer: Peer, recipe: Recipe, model: Model, device: torch.device) -> Iterator[Step]:
    """Give a step of the plain loop around a peer's network, on the batches ours sees, from ours' weights."""
    config = model.config(recipe)
    task = model.task(recipe, config)
    with peer.around():
        with _defaults(device, COMPUTE[recipe.precision]):
            net = peer.build(config, recipe)
        copy_weights(net, recipe, model, device, layout=peer.layout)
        net.train()
        if COMPILE in peer.mode:
            net.compile()
        optimizer = _adamw(net, recipe, device)
        trained = [p for p in net.parameters() if p.requires_grad]
        loader = iter(task.synthetic(0, 1))
        number = 0

        def step() -> Callable[[], Done]:
            nonlocal number
            number += 1
            batches = next(loader)
            count = max(sum(task.count(batch) for batch in batches), 1)
            work = sum((task.work(batch) for batch in batches), Work(0, 0, 0.0))
            total = torch.zeros((), device=device)
            for batch in batches:
                moved = {k: devices.send(v, device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                for part in peer.split(task.encode(moved)):
                    loss = peer.loss(net, part, count)
                    loss.backward()
                    total += loss.detach()
            norm = None
            if recipe.optim.clip is not None or number == 1:
                norm = clip_grad_norm_(trained, float("inf") if recipe.optim.clip is None else recipe.optim.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.optim, number, recipe.steps)
            optimizer.step()
            optimizer.zero_grad()
            return lambda: Done(float(total), None if norm is None else float(norm), work)

        yield step


def _first(net: Trunk, name: str, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Return a parameter's first value, whole: as the model starts it, but a matrix of zeros is filled at random.

    A network with such a matrix before its loss passes back no gradient: nothing could be compared, and a device that
    multiplies zeros is faster than one at work.
    """
    value = initial(net, name, shape, seed, device)
    return value.normal_(0, 0.02, generator=torch.Generator(device).manual_seed(seed)) if _is_blank(value) else value


def _is_blank(value: Tensor) -> bool:
    return value.dim() > 1 and not bool(value.any())


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _adamw(net: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Return torch's AdamW, fused where it can be, with the recipe's settings; vectors do not decay."""
    optim, trained = recipe.optim, [p for p in net.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused or None)


def copy_weights(
    net: nn.Module, recipe: Recipe, model: Model, device: torch.device, *, layout: str | None = None
) -> None:
    """Give a peer's network the values ours starts from, parameter by parameter, and peft's adapters if it has any.

    ValueError unless its parameters are those of the layout.
    """
    config = model.config(recipe)
    ours = on_meta(model.build, config)
    chosen = model.layouts[0] if layout is None else weights.find_layout(model, layout)
    table = chosen.table(config)
    bounds = table.bind({name: tuple(p.shape) for name, p in ours.named_parameters()})
    # A parameter may have several names there, where weights are tied.
    theirs = dict(net.named_parameters(remove_duplicate=False))
    wanted = {part.name for bound in bounds.values() for part in bound.parts}
    if odd := sorted(name for name in wanted ^ theirs.keys() if not table.ignored(name)):
        raise ValueError(f"the peer's parameters are not those of layout {chosen.name!r}: {len(odd)}, first {odd[0]!r}")
    with torch.no_grad():
        for name, bound in bounds.items():
            for part, value in bound.split(_first(ours, name, bound.shape, recipe.seed, device)):
                theirs[part].copy_(value)
        for name, value in chosen.extra(config, torch.float32).items():
            if name in theirs:  # what ours computes and theirs keeps
                theirs[name].copy_(value)
    if recipe.lora is not None:
        _adapt(net, recipe, lora.attach(ours, recipe.lora), bounds, device)


def _adapt(net: nn.Module, recipe: Recipe, ours: Any, bounds: dict[str, Bound], device: torch.device) -> None:
    """Freeze a peer's network and add peft's adapters where ours has some, from the same factors; B starts at zero."""
    from peft import LoraConfig, inject_adapter_in_model

    rank, alpha, dropout = recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout  # type: ignore[union-attr]
    found: dict[str, Tensor] = {}
    for name, adapter in lora.adapters(ours):
        factor = initial(ours, f"{name}.{lora.CHILD}.a", tuple(adapter.a.shape), recipe.seed, device)
        parts = [part.name.removesuffix(".weight") for part in bounds[f"{name}.weight"].parts]
        if len(parts) == len(adapter.projections):
            parts = [parts[number] for number in adapter.adapted]
        if len(parts) * rank != len(factor):
            raise ValueError(
                f"{name}: {len(factor)} rows of factors of rank {rank} for {len(parts)} layers of the peer"
            )
        found |= dict(zip(parts, factor.split(rank), strict=True))
    net.requires_grad_(False)
    scale = rank if alpha is None else alpha
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=list(found)),  # type: ignore[arg-type]
        net,
    )
    with torch.no_grad():
        for module, factor in found.items():
            net.get_submodule(module).lora_A["default"].weight.copy_(factor)  # type: ignore[union-attr,index,operator]


@contextmanager
def restored(*spaces: Any) -> Iterator[None]:
    """Put back what is assigned meanwhile to modules or classes: for libraries that patch others."""
    before = [dict(vars(space)) for space in spaces]
    try:
        yield
    finally:
        for space, held in zip(spaces, before, strict=True):
            for name in [n for n in vars(space) if n not in held]:
                delattr(space, name)
            for name, value in held.items():
                if vars(space)[name] is not value:
                    setattr(space, name, value)
