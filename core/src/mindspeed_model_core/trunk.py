"""A network cut into embed, alike blocks and finish, so that core can spread it without knowing it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import device as devices
from . import ops
from .errors import UserError
from .parallel.context import ContextParallel
from .parallel.tensor import even_share
from .recipe import NOTHING_TO_KEEP

GRAPHS = 8
"""How many kinds of batches have graphs of their own: what compiles anew each time takes longer than it saves."""
Batch = dict[str, Any]
State = dict[str, Tensor]
Context = dict[str, Any]


class Noise:
    """What layers draw random numbers from: the same under every layout, and when a block runs again.

    ``seed`` is the micro-batch's, ``tokens`` are how many it has before ranks share them out.
    """

    seed: int = 0
    tokens: int = 0

    def uniform(self, shape: Sequence[int], name: str, device: torch.device) -> Tensor:
        """Draw numbers between 0 and 1 for a layer, by its name in the whole network."""
        if device.type == "meta":
            return torch.empty(shape, device=device)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(shape, device=device, generator=generator)


class Trunk(nn.Module, ABC):
    """A network as embed, a list of alike blocks, finish: core recomputes, compiles, shards and cuts it by these names.

    ``blocks`` holds the repeated modules; ``first`` names the children only ``embed`` uses, ``last`` those only
    ``finish`` uses, ``tied`` those both use: of pipeline stages, the first and the last hold them alike. Everything
    that carries a gradient from block to block is in the State; what can be computed from the batch alone is in the
    Context, made anew on every pipeline stage. ``compiles`` says that blocks may be compiled, ``compiled`` that they
    are, or with ``graph`` all that comes after the Context. ``streams`` says that tokens are of several kinds (text,
    image) with layers of their own, so that what a layer sees is not always a run of all tokens. ``recompute`` is how
    many of the blocks held here run again in backward, but for what ``recompute_keep`` says: their attention, or that
    and their matrix products.
    ``sequence_ranks`` ranks share the tokens between tensor-parallel regions, those of ``cp`` share them over whole
    blocks. ``noise`` is set where layers draw random numbers in training.
    """

    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    blocks: nn.ModuleList
    compiles: bool = False
    compiled: bool = False
    graph: Callable[..., Tensor | State] | None = None
    streams: bool = False
    recompute: int = 0
    recompute_keep: str = "nothing"
    sequence_ranks: int = 1
    cp: ContextParallel | None = None
    noise: Noise | None = None

    def __init__(self) -> None:
        super().__init__()
        self._graphs: set[tuple[int, ...]] = set()

    @abstractmethod
    def context(self, batch: Batch) -> Context:
        """Return what blocks and finish need beside the State and needs no gradient."""

    @abstractmethod
    def embed(self, batch: Batch, context: Context) -> State:
        """Return the State that enters the first block."""

    @abstractmethod
    def step(self, index: int, block: nn.Module, state: State, context: Context) -> State:
        """Run one block; ``index`` is its place in ``blocks`` on this process."""

    @abstractmethod
    def finish(self, state: State, context: Context) -> Tensor:
        """Return the network's output from the State that leaves the last block."""

    @abstractmethod
    def tokens(self, batch: Batch) -> int:
        """Return how many tokens a batch's activations have along dim 0, before ranks share them out."""

    @abstractmethod
    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the State between two blocks on this process, known from the batch alone."""

    @abstractmethod
    def initialise(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        """Fill one whole parameter, given its name, with its random initial value."""

    def constants(self, context: Context) -> tuple[int, ...] | None:
        """Return the numbers of a batch that are constants of its blocks' graphs, as lengths of documents.

        Of more than ``GRAPHS`` kinds the later ones run uncompiled, and always where it returns None.
        """
        return ()

    def _has_graphs(self, context: Context) -> bool:
        key = self.constants(context)
        if key is None or (key not in self._graphs and len(self._graphs) >= GRAPHS):
            return False
        self._graphs.add(key)
        return True

    @property
    def is_last(self) -> bool:
        """Whether this stage holds the head."""
        return all(hasattr(self, name) for name in self.last)

    def held(self, batch: Batch) -> int:
        """Return how many of a batch's tokens this process holds between tensor-parallel regions."""
        return self.share(self.tokens(batch))

    def share(self, tokens: int) -> int:
        """Return how many of some tokens this process holds between tensor-parallel regions."""
        if self.cp is not None:
            tokens = self.cp.share(tokens)[1]
        return even_share(tokens, self.sequence_ranks)

    def forward(self, batch: Batch, state: State | None = None, context: Context | None = None) -> Tensor | State:
        """Run the blocks this process holds: from ``state`` if given, to the output if the head is here.

        ``context`` is the batch's, where it is made already.
        """
        if context is None:
            context = self.context(batch)
        step = self.step
        if self.noise is not None and self.training:
            # Once a micro-batch and on the host, whatever part of the network is here: all ranks draw alike.
            drawn = (int(torch.randint(2**62, ())), self.tokens(batch))
            self.noise.seed, self.noise.tokens = drawn
            step = partial(self._step_with, drawn)
        run = self.run
        if self.compiled and not self._has_graphs(context):
            step = partial(_uncompiled, step)
        elif self.graph is not None:
            run = self.graph
        return run(step, batch, context, state)

    def run(self, step: Callable[..., State], batch: Batch, context: Context, state: State | None) -> Tensor | State:
        """Run what this process holds, its blocks by ``step``, given a batch's Context."""
        if state is None:
            state = self.embed(batch, context)
        for index, block in enumerate(self.blocks.children()):
            if index < self.recompute and torch.is_grad_enabled():
                how = {"use_reentrant": False, **_policy(self.recompute_keep)}
                if devices.is_recording():  # the generator cannot be asked, and nothing that is recorded draws from it
                    how["preserve_rng_state"] = False
                state = checkpoint(step, index, block, state, context, **how)
            else:
                state = step(index, block, state, context)
        return self.finish(state, context) if self.is_last else state

    def _step_with(self, drawn: tuple[int, int], index: int, block: nn.Module, state: State, context: Context) -> State:
        """Run one block with its micro-batch's noise: others may have come between forward and recomputation."""
        if self.noise is not None:
            self.noise.seed, self.noise.tokens = drawn
        return self.step(index, block, state, context)


def _uncompiled(step: Callable[..., State], index: int, block: nn.Module, state: State, context: Context) -> State:
    # Not by torch.compiler.set_stance: ops that are compiled one by one stay so.
    held, block._compiled_call_impl = block._compiled_call_impl, None
    try:
        return step(index, block, state, context)
    finally:
        block._compiled_call_impl = held


def _policy(keep: str) -> dict[str, Any]:
    if keep == "nothing":
        return {}
    if keep == "attention" and not ops.level():
        raise UserError(NOTHING_TO_KEEP)
    names = ops.ATTENTION if keep == "attention" else ops.ATTENTION | ops.PRODUCTS
    return {"context_fn": partial(ops.checkpointed, names)}
