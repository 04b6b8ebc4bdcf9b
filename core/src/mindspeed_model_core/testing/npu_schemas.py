"""Calls of torch_npu's operators, held against their schemas without torch_npu.

``ops/torch_npu.schemas`` holds the schema of every operator that the sources name. Where torch_npu is, as on the
emulator, ``python -m mindspeed_model_core.testing.npu_schemas [FOLDER ...]`` writes it anew from what is loaded; the
folders are sources beside core's own.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import write_text

PACKAGE = Path(__file__).resolve().parents[1]
FILE = PACKAGE / "ops" / "torch_npu.schemas"
"""First the version, after a sharp, then a schema a line, as torch prints it."""
LITERALS = {str: "StringType", bool: "BoolType", int: "IntType", float: "FloatType"}


@dataclass(frozen=True)
class Use:
    """An operator that a source names: where, and its call unless only its name is there."""

    where: str
    operator: str
    call: ast.Call | None


@dataclass(frozen=True)
class Found:
    """What sources have: uses, and places that hide which operator they use."""

    uses: tuple[Use, ...]
    hidden: tuple[str, ...]

    @property
    def operators(self) -> set[str]:
        """Return the names of operators, with an overload where one is called; an entry's name is any of them."""
        called = {use.operator for use in self.uses if use.call is not None}
        bases = {name.partition(".")[0] for name in called}
        return called | {use.operator for use in self.uses if use.operator.partition(".")[0] not in bases}


def sources(folders: Iterable[Path] = ()) -> list[Path]:
    """Return core's own files, without what emulates torch_npu, and those of more folders."""
    own = (path for path in PACKAGE.rglob("*.py") if "testing" not in path.relative_to(PACKAGE).parts)
    return sorted([*own, *(path for folder in folders for path in folder.rglob("*.py"))])


def find(files: Iterable[Path]) -> Found:
    """Return the operators of ``torch.ops.npu`` that files use or name as what an entry on an NPU calls."""
    uses: list[Use] = []
    hidden: list[str] = []
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _dotted(node) == "torch.ops.npu":
                where = f"{path.name}:{node.lineno}"
                use = _used(where, node, parents)
                uses += [use] if use is not None else []
                hidden += [] if use is not None else [where]
            elif isinstance(node, ast.Call):
                uses += (Use(f"{path.name}:{node.lineno}", name, None) for name in _promised(node))
    return Found(tuple(uses), tuple(hidden))


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _used(where: str, node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Use | None:
    names: list[str] = []
    above = parents[node]
    while isinstance(above, ast.Attribute):
        names.append(above.attr)
        node, above = above, parents[above]
    if not names or len(names) > 2:
        return None
    call = above if isinstance(above, ast.Call) and above.func is node else None
    return Use(where, ".".join(names).removesuffix(".default"), call)


def _promised(node: ast.Call) -> list[str]:
    """Return the names in ``.on("npu", "name name")`` but for PyTorch's own operators, which torch_npu serves."""
    if not (isinstance(node.func, ast.Attribute) and node.func.attr == "on" and len(node.args) > 1):
        return []
    kind, calls = node.args[:2]
    if not (isinstance(kind, ast.Constant) and kind.value == "npu" and isinstance(calls, ast.Constant)):
        return []
    return [name for name in str(calls.value).split() if "npu" in name]


def read(path: Path = FILE) -> dict[str, Any]:
    """Return the schemas of a file by operator, parsed by torch."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {line.partition("(")[0].removeprefix("npu::"): torch._C.parse_schema(line) for line in lines}


def text(operators: Iterable[str]) -> str:
    """Return what the file holds for the torch_npu that is loaded. Raises AttributeError where it lacks one."""
    lines = [f"# torch_npu {version('torch_npu').partition('+')[0]}"]
    for name in sorted(operators):
        base, _, overload = name.partition(".")
        lines.append(str(getattr(getattr(torch.ops.npu, base), overload or "default")._schema))
    return "\n".join(lines) + "\n"


def mistakes(found: Found, schemas: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the sources, and with the file for them, a sentence each."""
    for where in found.hidden:
        yield f"{where}: calls torch.ops.npu without an operator's name: write torch.ops.npu.NAME(...)"
    for name in sorted(set(schemas) - found.operators):
        yield f"{FILE.name}: {name} is called nowhere"
    for use in found.uses:
        known = use.operator in schemas
        if not known and (use.call is not None or use.operator not in {n.partition(".")[0] for n in schemas}):
            yield f"{use.where}: {use.operator} is not in {FILE.name}"
        elif known and use.call is not None:
            yield from (f"{use.where}: {use.operator}: {said}" for said in _of_call(use.call, schemas[use.operator]))


def _of_call(call: ast.Call, schema: Any) -> Iterator[str]:
    arguments = {a.name: a for a in schema.arguments}
    positional = [a for a in schema.arguments if not a.kwarg_only]
    spread = any(isinstance(a, ast.Starred) for a in call.args)
    plain = [] if spread else call.args
    if len(plain) > len(positional):
        yield f"takes {len(positional)} arguments by position, not {len(plain)}"
    given = {a.name: value for a, value in zip(positional, plain, strict=False)}
    for keyword in call.keywords:
        if keyword.arg is None:
            spread = True
        elif keyword.arg not in arguments:
            yield f"has no argument {keyword.arg}"
        elif keyword.arg in given:
            yield f"is given {keyword.arg} twice"
        else:
            given[keyword.arg] = keyword.value
    missing = [n for n, a in arguments.items() if n not in given and not a.has_default_value()]
    if missing and not spread:
        yield f"lacks {', '.join(missing)}"
    for name, value in given.items():
        if isinstance(value, ast.Constant) and not _fits(value.value, arguments[name].type):
            yield f"{name} is {arguments[name].type}, not {value.value!r}"


def _fits(value: Any, kind: Any) -> bool:
    """Whether a literal is of an argument's type, as far as names tell; numbers may widen."""
    name = kind.kind()
    if name == "OptionalType":
        return value is None or _fits(value, kind.getElementType())
    wider = {int: {"FloatType", "NumberType", "SymIntType"}, float: {"NumberType"}, bool: {"NumberType", "IntType"}}
    taken = {LITERALS.get(type(value))} | wider.get(type(value), set())
    return name in taken


def main(folders: Sequence[str]) -> None:
    """Write the file for core's sources and those in more folders."""
    write_text(FILE, text(find(sources(map(Path, folders))).operators))


if __name__ == "__main__":
    main(sys.argv[1:])
