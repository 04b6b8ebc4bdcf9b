"""How much memory a recipe needs on each device, told from the network on meta before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import lora, ops
from .model import Model
from .parallel.apply import COMPUTE, MASTER, absent, check, recomputed
from .parallel.context import ContextParallel, ContextShared
from .parallel.placement import placements
from .parallel.tensor import TensorParallel
from .recipe import ParallelConfig, Recipe
from .trunk import Batch, State, Trunk

GIB = 2**30
SPARE = 0.15
"""The share of a device's free memory that is left for what is not estimated."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    ``weights`` is what the forward pass computes with, ``optimizer`` AdamW's two moments and, where they are not the
    weights themselves, the master weights. ``activations`` is what blocks keep for backward over the micro-batches in
    flight, ``head`` the same for what follows the last block, with one fp32 gradient of its largest tensor. ``overlap``
    is what of all this is not there at once: gradients of a single micro-batch come while its activations go.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    overlap: int = 0

    @property
    def total(self) -> int:
        """Return the most that is there at once."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head - self.overlap


@dataclass(frozen=True)
class Estimate:
    """What a recipe needs on ``world`` devices; ``memory`` is of pipeline stage ``stage``, the one that needs most."""

    parameters: int
    trainable: int
    world: int
    tp: int
    cp: int
    pp: int
    dp: int
    stage: int
    memory: Memory
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """What the memory is of: devices, layout and stage."""
        where = f", stage {self.stage} of 0-{self.pp - 1}, which needs most" if self.pp > 1 else ""
        plural = "s" if self.world > 1 else ""
        return f"memory per device on {self.world} device{plural}: {self._layout}{where}"

    @property
    def _layout(self) -> str:
        cp = f"cp {self.cp} x " if self.cp > 1 else ""
        return f"tp {self.tp} x {cp}pp {self.pp} x dp {self.dp}"

    def table(self) -> Table:
        """Return the memory as a table for people."""
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        for name in ("weights", "gradients", "optimizer", "activations", "head", "overlap", "total"):
            size = getattr(self.memory, name) / GIB
            if name != "overlap":
                table.add_row(name, f"{size:,.2f} GiB")
            elif size:
                table.add_row("not at once", f"-{size:,.2f} GiB")
        return table


def estimate(recipe: Recipe, model: Model, world: int) -> Estimate:
    """Return the parameter count, exact, and the memory per device, estimated, of a recipe on ``world`` devices.

    Weights, gradients and optimizer states follow the parameters' placements and shapes exactly. Activations are the
    bytes one block saves for backward on a micro-batch of the task's synthetic data, run on meta as tensor-parallel
    rank 0, taken to hold for every block. Raises UserError where the network cannot be cut this way.
    """
    parallel = recipe.parallel
    net = _whole(recipe, model, world)
    parameters, trainable = _count(net.parameters()), _count(p for p in net.parameters() if p.requires_grad)
    dp = world // parallel.model
    steps = recipe.micro_batches(dp)
    _narrow(net, parallel)
    stages = _stages(net, recipe, world, _activations(net, recipe, model))
    worst = max(range(parallel.pp), key=lambda stage: stages[stage].total)
    return Estimate(
        parameters,
        trainable,
        world,
        parallel.tp,
        parallel.cp,
        parallel.pp,
        dp,
        worst,
        stages[worst],
        tuple(_notes(recipe, world, steps)),
    )


def fewest_recomputed(recipe: Recipe, model: Model, world: int, free: int) -> tuple[int, int]:
    """Return how few of each stage's blocks must run again in backward for a recipe to fit, and the bytes it needs.

    Of the ``free`` bytes a share is left for what is not estimated. All blocks, if even that is too much.
    """
    net = _whole(recipe, model, world)
    held = len(net.blocks) // recipe.parallel.pp
    _narrow(net, recipe.parallel)
    activations = _activations(net, recipe, model)
    for count in range(held + 1):
        with_count = recipe.model_copy(update={"recompute": count})
        needed = max(stage.total for stage in _stages(net, with_count, world, activations))
        if needed <= (1 - SPARE) * free:
            break
    return count, needed


def _whole(recipe: Recipe, model: Model, world: int) -> Trunk:
    """Return the recipe's whole network on meta; UserError if it cannot be cut this way."""
    with torch.device("meta"):
        net = model.build(model.config(recipe))
    if recipe.lora is not None:
        lora.attach(net, recipe.lora)
    check(net, recipe.parallel, world)
    return net


def _stages(net: Trunk, recipe: Recipe, world: int, activations: _Activations) -> list[Memory]:
    """Return the memory of each pipeline stage of a network already cut by tensor parallelism."""
    parallel = recipe.parallel
    dp = world // parallel.model
    steps = recipe.micro_batches(dp)
    return [
        _stage(net, recipe, stage, dp * parallel.cp, world > 1, min(parallel.pp - stage, steps), activations)
        for stage in range(parallel.pp)
    ]


def _notes(recipe: Recipe, world: int, steps: int) -> Iterable[str]:
    how = "as the fused kernels keep them" if recipe.optimization_level else "by plain formulas, which keep all"
    yield (
        "Parameters are counted exactly. Activations are what one block of a kind keeps for backward, times the blocks "
        f"held and the micro-batches in flight, with attention and norms {how} and each sequence as one document."
    )
    left_out = "the device's runtime and communication buffers, short-lived temporaries, and memory lost to gaps"
    yield f"Not counted: {left_out}; leave 10-20 % free."
    if recipe.recompute == "auto":
        yield "recompute=auto: this is with no block recomputed; as many will be as the device's free memory asks for."
    if recipe.parallel.shard != "none" and world == 1:
        yield f"parallel.shard={recipe.parallel.shard} has no effect on one device; plan for more with --nproc."
    if recipe.parallel.pp > 1 and steps < recipe.parallel.pp:
        yield f"{steps} micro-batches a step do not fill {recipe.parallel.pp} pipeline stages; raise global_batch."


def _narrow(net: Trunk, parallel: ParallelConfig) -> None:
    """Cut the network on meta to what rank 0 of tp and cp holds, its layers to run without other ranks."""
    if parallel.cp > 1:
        net.cp = _AloneContext(None, 0, parallel.cp)
        for module in net.modules():
            if isinstance(module, ContextShared):
                module.cp = net.cp
    if parallel.tp == 1:
        return
    modules = dict(net.named_modules())
    for name, placement in list(placements(net)):
        owner, _, leaf = name.rpartition(".")
        whole = modules[owner].get_parameter(leaf)
        share = placement.narrow(whole.detach(), 0, parallel.tp)
        setattr(modules[owner], leaf, nn.Parameter(share, requires_grad=whole.requires_grad))
    alone = _Alone(None, 0, parallel.tp, parallel.sequence)
    for module in net.modules():
        if hasattr(module, "placements"):
            module.tp = alone  # type: ignore[assignment]
    net.sequence_ranks = parallel.tp if parallel.sequence else 1


class _Alone(TensorParallel):
    """Rank 0 without its group: shapes and what is kept for backward are the real ones, values are nobody's."""

    def column(self, x: Tensor, weight: Tensor, bias: Tensor | None, sequence: bool) -> Tensor:
        F.linear(self.enter(x, sequence).detach(), weight.detach())  # to be counted; on meta it takes nothing
        return _Column.apply(x, weight, bias, self.size if sequence else 1)

    def row(self, x: Tensor, weight: Tensor, bias: Tensor | None, sequence: bool) -> Tensor:
        # What is summed in place is not kept as a product.
        y = self._reduce(F.linear(x, weight) if sequence else x @ weight.mT, sequence)
        return y if bias is None else y + bias

    def enter(self, x: Tensor, sequence: bool) -> Tensor:
        return x.repeat(self.size if sequence else 1, *[1] * (x.ndim - 1))

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        mine = tokens < len(weight)
        return self._reduce(F.embedding(tokens.clamp(0, len(weight) - 1), weight) * mine[:, None], self.sequence)

    def gather(self, x: Tensor) -> Tensor:
        return x.repeat(*[1] * (x.ndim - 1), self.size)

    def sum_features(self, x: Tensor) -> Tensor:
        return x

    def all_tokens(self, x: Tensor) -> Tensor:
        return _Reshaped.apply(x, (len(x) * self.size, *x.shape[1:])) if self.sequence else x

    def _reduce(self, y: Tensor, sequence: bool) -> Tensor:
        return y.narrow(0, 0, len(y) // self.size).clone() if sequence else y


class _AloneContext(ContextParallel):
    """Rank 0 without its group: nothing of an exchange is kept for backward."""

    def to_heads(self, x: Tensor, tokens: int) -> Tensor:
        return _Reshaped.apply(x, (tokens, *x.shape[1:-2], x.shape[-2] // self.size, x.shape[-1]))

    def to_tokens(self, x: Tensor, tokens: int) -> Tensor:
        mine = self.share(tokens)[1]
        return _Reshaped.apply(x, (mine, *x.shape[1:-2], x.shape[-2] * self.size, x.shape[-1]))

    def gather(self, x: Tensor, tokens: int, shares: list[int] | None = None) -> Tensor:
        return _Reshaped.apply(x, (tokens, *x.shape[1:]))


class _Reshaped(torch.autograd.Function):
    """What communication makes of a tensor: another shape, and nothing kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.new_empty(shape)


class _Column(torch.autograd.Function):
    """A linear layer that keeps its input as it came and gathers the other ranks' tokens anew in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ranks: int) -> Tensor:
        ctx.save_for_backward(*((x, weight) if weight.requires_grad else (weight,)))
        return x.new_empty(len(x) * ranks, *x.shape[1:-1], len(weight))


class _Attention(torch.autograd.Function):
    """Scaled dot-product attention as fused kernels keep it: q, k, v, the output and one number a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, rows = q.shape[:3]
        out = q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, rows, dtype=torch.float32))
        return out


class _Norm(torch.autograd.Function):
    """A norm as fused kernels keep it: the input and a number or two a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)


class Fused(TorchFunctionMode):
    """Within it, PyTorch's attention and norms keep what their fused kernels do; on meta they run decomposed.

    ``attention`` and ``products`` count the bytes of their results, which a block that runs again without them keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            out = _Attention.apply(*args[:3])
            self.attention += out.nbytes + 4 * out.numel() // out.shape[-1]
            return out
        if func is F.layer_norm:
            return _Norm.apply(args[0], args[2] if len(args) > 2 else (kwargs or {}).get("weight"))
        if func is F.rms_norm:
            return _Norm.apply(args[0], args[2] if len(args) > 2 else (kwargs or {}).get("weight"))
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.products += out.nbytes
        return out


class Saved:
    """Counts what autograd keeps for backward inside a ``with`` block: each storage once, ``known`` ones not at all."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self._known = {t.untyped_storage()._cdata: t for t in known}
        self._held: dict[int, tuple[Tensor, int]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Held, so that no later tensor is made at the same address.
        self._held[storage._cdata] = (tensor.detach(), storage.nbytes())
        return tensor

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def tensors(self) -> list[Tensor]:
        """One tensor of each storage counted."""
        return [tensor for key, (tensor, _) in self._held.items() if key not in self._known]

    @property
    def bytes(self) -> int:
        """The bytes of all storages counted."""
        return sum(size for key, (_, size) in self._held.items() if key not in self._known)


@dataclass(frozen=True)
class _Block:
    """Bytes that a block keeps for one micro-batch, those of its attention's results among them, and its products'."""

    kept: int
    attention: int
    products: int

    def spared(self, keep: str) -> int:
        """Return the bytes of what ``recompute_keep`` lets a block keep that runs again."""
        return {"nothing": 0, "attention": self.attention, "products": self.attention + self.products}[keep]


@dataclass(frozen=True)
class _Activations:
    """Bytes for one micro-batch: of each block, of a block's input alone, what all blocks share, the embedding's, the
    head's.
    """

    blocks: tuple[_Block, ...]
    entry: int
    shared: int
    first: int
    last: int


def _activations(net: Trunk, recipe: Recipe, model: Model) -> _Activations:
    one = recipe.model_copy(update={"global_batch": recipe.micro_batch})
    task = model.task(one, model.config(recipe))
    batch = _on_meta(task.encode(next(iter(task.synthetic(0, 1)))[0]))
    net.to(COMPUTE[recipe.precision])
    weights = net.parameters()
    with ops.at_level(recipe.optimization_level), Fused() as fused:
        context = net.context(batch)
        given = {t.untyped_storage()._cdata: t for t in [*weights, *_tensors(batch)]}
        shared = {t.untyped_storage()._cdata: t for t in _tensors(context)}
        shared = {key: t for key, t in shared.items() if key not in given}
        known = [*given.values(), *shared.values()]
        with Saved(known) as first:
            state = net.embed(batch, context)
        kinds: dict[type, _Block] = {}
        for index, block in enumerate(net.blocks.children()):
            if type(block) not in kinds:
                state, fused.attention, fused.products = _entering(state), 0, 0
                with Saved(known) as saved:
                    state = net.step(index, block, state, context)
                kinds[type(block)] = _Block(saved.bytes, fused.attention, fused.products)
        state = _entering(state)
        with Saved(known) as last:
            net.finish(state, context)
    logits = max((t.numel() for t in last.tensors), default=0)
    return _Activations(
        blocks=tuple(kinds[type(block)] for block in net.blocks.children()),
        entry=sum(t.nbytes for t in state.values()),
        shared=sum(t.untyped_storage().nbytes() for t in shared.values()),
        first=first.bytes,
        last=last.bytes + 4 * logits,
    )


def _entering(state: State) -> State:
    """Return a State as a block receives it: tensors of their own that want a gradient."""
    return {name: torch.empty_like(t).requires_grad_(t.is_floating_point()) for name, t in state.items()}


def _on_meta(batch: Batch) -> Batch:
    out = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in batch.items()}
    if "lengths" in out:
        out["lengths"] = (sum(out["lengths"]),)
    return out


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _stage(
    net: Trunk, recipe: Recipe, stage: int, replicas: int, spread: bool, flight: int, activations: _Activations
) -> Memory:
    """Return the memory of one pipeline stage of a network already cut by tensor parallelism."""
    pp = recipe.parallel.pp
    per = len(net.blocks) // pp
    blocks = [list(block.parameters()) for block in list(net.blocks.children())[stage * per : (stage + 1) * per]]
    first, last = stage == 0, stage == pp - 1
    elsewhere = (*absent(net, first=first, last=last), "blocks")
    rest = [p for name, p in net.named_parameters() if name.split(".")[0] not in elsewhere]
    again = recomputed(recipe.recompute, per)
    a = activations
    kinds = a.blocks[stage * per : (stage + 1) * per]
    spared = [kind.spared(recipe.recompute_keep) for kind in kinds[:again]]
    rerun = [kind.kept - held for kind, held in zip(kinds, spared, strict=False)] + [0] * (per - again)
    kept = [a.entry + held for held in spared] + [kind.kept for kind in kinds[again:]]
    ends = a.shared + (a.first if first else 0)
    memory = replace(
        _states(blocks, rest, recipe, replicas, spread),
        activations=flight * (sum(kept) + ends) + max(rerun),
        head=a.last if last else 0,
    )
    if not _gradients_come_late(recipe, replicas, spread):
        return memory
    # Backward goes from block to block: of those before it activations are there, of those behind it gradients.
    counts = [_count(p for p in block if p.requires_grad) for block in [*blocks, rest]]
    grads = [memory.gradients * count // max(sum(counts), 1) for count in counts]
    most = sum(kept) + memory.head
    for at in range(per):
        most = max(most, sum(kept[: at + 1]) + rerun[at] + sum(grads[at:]))
    return replace(memory, overlap=memory.activations + memory.head + memory.gradients - ends - most)


def _gradients_come_late(recipe: Recipe, replicas: int, spread: bool) -> bool:
    """Whether no gradient is there before backward: of one micro-batch, and not added up in memory of their own."""
    if _accumulates(recipe, replicas):
        return False
    if recipe.parallel.shard != "none" and spread:
        return True
    return replicas == 1 and COMPUTE[recipe.precision] == MASTER[recipe.precision]


def _states(
    blocks: list[list[nn.Parameter]], rest: list[nn.Parameter], recipe: Recipe, replicas: int, spread: bool
) -> Memory:
    """Return weights, gradients and optimizer states as ``parallel.apply`` and ``optim`` lay them out.

    Frozen parameters are weights in the compute dtype and nothing else; a moving average is one more fp32 master.

    Without ZeRO, weights are in the compute dtype, gradients in the master's, and a master of another dtype is apart.
    With it (FSDP2), masters, moments and reduced gradients are shards; zero1 and zero2 hold all weights gathered, zero1
    also all gradients, in fp32, while it accumulates; zero3 holds two blocks gathered and what is in no block.
    """
    compute, master = COMPUTE[recipe.precision].itemsize, MASTER[recipe.precision].itemsize
    everything = [p for block in blocks for p in block] + rest
    learning = [p for p in everything if p.requires_grad]
    whole, learned = _count(everything), _count(learning)
    average = max(master, 4) if recipe.optim.ema is not None else 0
    shard = recipe.parallel.shard
    if shard == "none" or not spread:
        apart = master if master != compute else 0
        return Memory(compute * whole, master * learned, (apart + 2 * master + average) * learned, 0, 0)
    own = _count_shares(learning, replicas)
    frozen = compute * _count_shares([p for p in everything if not p.requires_grad], replicas)
    gathered = whole
    if shard == "zero3":
        gathered = sum(sorted((_count(b) for b in blocks), reverse=True)[:2]) + _count(rest)
    gradients = master * own + (max(master, 4) * learned if shard == "zero1" and _accumulates(recipe, replicas) else 0)
    return Memory(compute * gathered + frozen, gradients, (3 * master + average) * own, 0, 0)


def _accumulates(recipe: Recipe, replicas: int) -> bool:
    return recipe.global_batch > recipe.micro_batch * replicas // recipe.parallel.cp


def _count_shares(parameters: Iterable[Tensor], replicas: int) -> int:
    return sum(-(-p.shape[0] // replicas) * (p.numel() // p.shape[0]) for p in parameters if p.numel())


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
