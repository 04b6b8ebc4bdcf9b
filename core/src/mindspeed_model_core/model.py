"""A model package's record of parts, and how it is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from . import recipe as recipes
from .errors import UserError, nearest
from .recipe import Recipe, Section

if TYPE_CHECKING:
    from .task import Task
    from .trunk import Trunk
    from .weights.layout import Layout


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
    hint = nearest(name, installed())
    raise UserError(
        f"model {name!r}: not installed{hint}" + ("" if "did you" in hint else f"; pip install mindspeed-model-{name}")
    )
