"""What a recipe may set, as the command line tells it."""

from typing import Literal

import pytest
from mindspeed_model_core.keys import Key, keys
from mindspeed_model_core.recipe import Recipe, Section
from pydantic import Field, PositiveInt


class Inner(Section):
    """A section."""

    sides: tuple[int, ...] = Field((1, 2), description="of a thing")
    pair: tuple[float, float] = (0.5, 1.0)


class Outer(Section):
    """A recipe."""

    name: str
    count: PositiveInt | None = Field(None, description="how many")
    kind: Literal["one", "other"] = "one"
    whole: bool | Literal["more"] = False
    inner: Inner = Inner()
    apart: Inner | None = Field(None, description="may be left out")


def test_keys_tell_what_they_take_their_default_and_what_they_do() -> None:
    assert list(keys(Outer)) == [
        Key("name", "text", "required", ""),
        Key("count", "int, null", "null", "how many"),
        Key("kind", "one, other", "one", ""),
        Key("whole", "true, false, more", "false", ""),
        Key("inner.sides", "[int, ...]", "[1, 2]", "of a thing"),
        Key("inner.pair", "[float, float]", "[0.5, 1.0]", ""),
        Key("apart", "section, null", "null", "may be left out"),
        Key("apart.sides", "[int, ...]", "[1, 2]", "of a thing"),
        Key("apart.pair", "[float, float]", "[0.5, 1.0]", ""),
    ]


@pytest.mark.parametrize("key", list(keys(Recipe)), ids=lambda key: key.name)
def test_every_key_of_a_recipe_says_what_it_does(key: Key) -> None:
    assert key.meaning and key.takes
