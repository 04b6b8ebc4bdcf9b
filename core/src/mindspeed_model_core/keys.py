"""The keys that a recipe may set, what each may be, and what it does: read off the recipe's own classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

NAMES = {int: "int", float: "float", str: "text", dict: "values", NoneType: "null"}


@dataclass(frozen=True)
class Key:
    """A key of a recipe as it is written on a command line, and in words what it takes, is by default, and does."""

    name: str
    takes: str
    default: str
    meaning: str


def keys(kind: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a recipe's class, those of its sections after a dot."""
    for name, field in kind.model_fields.items():
        section = _section(field.annotation)
        if section is None or field.default is None:
            yield Key(prefix + name, _takes(field.annotation), _default(field), field.description or "")
        if section is not None:
            yield from keys(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    found = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
    return found[0] if found else None


def _takes(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes(arguments[0])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return ", ".join(_takes(each) for each in arguments)
    if origin is tuple:
        several = arguments[-1] is Ellipsis
        return f"[{_takes(arguments[0])}, ...]" if several else f"[{', '.join(_takes(each) for each in arguments)}]"
    if annotation is bool:
        return "true, false"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return NAMES.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value)
