"""What a model package gives: a network cut into blocks, and a record of its parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import recipe as recipes
from .errors import UserError, nearest
from .recipe import Recipe, Section

if TYPE_CHECKING:
    from .task import Task
    from .weights import Layout

Batch = dict[str, Any]
State = dict[str, Tensor]
Context = dict[str, Any]


class Trunk(nn.Module, ABC):
    """A network as embed, a list of alike blocks, finish: core recomputes, compiles, shards and cuts it by these names.

    ``blocks`` holds the repeated modules; ``first`` names the children only ``embed`` uses, ``last`` those only
    ``finish`` uses. Everything that carries a gradient from block to block is in the State; what can be computed from
    the batch alone is in the Context, made anew on every pipeline stage. ``recompute`` is how many of the blocks held
    here run again in backward; ``sequence_ranks`` how many ranks share the tokens between tensor-parallel regions.
    """

    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    blocks: nn.ModuleList
    recompute: int = 0
    sequence_ranks: int = 1

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
    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the State between two blocks on this process, known from the batch alone."""

    @abstractmethod
    def initialise(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        """Fill one whole parameter, given its name, with its random initial value."""

    @property
    def is_first(self) -> bool:
        """Whether this stage holds the embedding."""
        return all(hasattr(self, name) for name in self.first)

    @property
    def is_last(self) -> bool:
        """Whether this stage holds the head."""
        return all(hasattr(self, name) for name in self.last)

    def forward(self, batch: Batch, state: State | None = None) -> Tensor | State:
        """Run the blocks this process holds: from ``state`` if given, to the output if the head is here."""
        context = self.context(batch)
        if state is None:
            state = self.embed(batch, context)
        for index, block in enumerate(self.blocks.children()):
            if index < self.recompute and torch.is_grad_enabled():
                state = checkpoint(self.step, index, block, state, context, use_reentrant=False)
            else:
                state = self.step(index, block, state, context)
        return self.finish(state, context) if self.is_last else state


@dataclass(frozen=True)
class Model:
    """A model package's record: what core needs to train, convert, measure and describe it."""

    name: str
    package: str
    presets: Mapping[str, Section]
    build: Callable[[Any], Trunk]
    task: Callable[[Any, Any], Task]
    recipe: type[Recipe]
    layouts: tuple[Layout, ...]
    commands: tuple[Callable[..., None], ...] = ()

    def config(self, recipe: Recipe) -> Any:
        """Return the preset's configuration with the recipe's ``config`` changes applied."""
        base = self.preset(recipe.preset)
        kind, changes = type(base), recipe.config
        return recipes.validate(kind, {**base.model_dump(), **changes}, "config") if changes else base  # type: ignore[type-var]

    def preset(self, name: str) -> Section:
        """Return a preset by name; UserError names the known ones."""
        if name not in self.presets:
            raise UserError(f"preset={name!r}: {self.name} has no such preset{nearest(name, self.presets)}")
        return self.presets[name]

    def load_recipe(self, name: str, overrides: tuple[str, ...] | list[str] = ()) -> Any:
        """Return a recipe of this package by name or path, overrides applied."""
        recipe = recipes.load(self.recipe, self.package, name, overrides)
        self.config(recipe)
        return recipe


def installed() -> dict[str, str]:
    """Return model name to distribution version of every installed model package, without importing them."""
    found = entry_points(group="mindspeed_model")
    return {e.name: (e.dist.version if e.dist else "?") for e in sorted(found, key=lambda e: e.name)}


def find(name: str) -> Model:
    """Import and return an installed model's record."""
    for entry in entry_points(group="mindspeed_model"):
        if entry.name == name:
            return entry.load()
    raise UserError(f"model {name!r}: not installed{nearest(name, installed())}; pip install mindspeed-model-{name}")
