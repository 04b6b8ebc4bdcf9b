"""Every call of torch_npu's operators fits the schema on file, without torch_npu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mindspeed_model_core.testing import npu_schemas

MODELS = sorted((Path(__file__).resolve().parents[3] / "models").glob("*/src"))
SCHEMAS = {
    name: text
    for name, text in npu_schemas.read().items()
    if name in ("npu_rms_norm", "npu_rms_norm_backward", "npu_grouped_matmul")
}
SCHEMAS["npu_update.out"] = torch._C.parse_schema(
    "npu::npu_update.out(Tensor grad, Scalar lr, *, Tensor[] out) -> Tensor"
)


def test_the_sources_fit_the_file_and_the_file_the_sources() -> None:
    found = npu_schemas.find(npu_schemas.sources(MODELS))
    assert len(found.operators) > 9
    assert not list(npu_schemas.mistakes(found, npu_schemas.read()))


def said(tmp_path: Path, *lines: str, schemas: dict[str, object] | None = None) -> list[str]:
    (tmp_path / "some.py").write_text("\n".join(lines) + "\n")
    found = npu_schemas.find([tmp_path / "some.py"])
    known = SCHEMAS if schemas is None else schemas
    return [s for s in npu_schemas.mistakes(found, known) if "called nowhere" not in s]


@pytest.mark.parametrize(
    "call",
    [
        "npu_rms_norm(x, g)",
        "npu_rms_norm(x, gamma=g, epsilon=1)",
        "npu_rms_norm.default(x, g, eps)",
        "npu_rms_norm(*operands, epsilon=eps)",
        "npu_rms_norm(**operands)",
        "npu_grouped_matmul(x, w, group_type=None, split_item=3)",
        "npu_update.out(g, 2.0, out=o)",
    ],
)
def test_right_calls_pass(tmp_path: Path, call: str) -> None:
    assert said(tmp_path, f"y = torch.ops.npu.{call}[0]") == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("npu_rms_norm(x, g, eps=1e-5)", "some.py:1: npu_rms_norm: has no argument eps"),
        ("npu_rms_norm(*operands, eps=1e-5)", "has no argument eps"),
        ("npu_rms_norm(x)", "npu_rms_norm: lacks gamma"),
        ("npu_rms_norm(x, g, 1e-5, 2)", "takes 3 arguments by position, not 4"),
        ("npu_rms_norm(x, g, gamma=g)", "is given gamma twice"),
        ("npu_rms_norm(x, None)", "gamma is Tensor, not None"),
        ("npu_rms_norm(x, g, 'small')", "epsilon is float, not 'small'"),
        ("npu_grouped_matmul(x, w, None, s)", "takes 2 arguments by position, not 4"),
        ("npu_grouped_matmul(x, w, split_item=3.0)", "split_item is Optional[int], not 3.0"),
        ("npu_update.out(g, 1)", "npu_update.out: lacks out"),
        ("npu_update(g, 1)", "npu_update is not in torch_npu.schemas"),
        ("npu_rms_norms(x, g)", "npu_rms_norms is not in torch_npu.schemas"),
    ],
)
def test_wrong_calls_are_named(tmp_path: Path, call: str, words: str) -> None:
    (line,) = said(tmp_path, f"torch.ops.npu.{call}")
    assert words in line


def test_an_entry_names_operators_of_the_file(tmp_path: Path) -> None:
    lines = ['@f.on("npu", "npu_rms_norm npu_rms_norm_backwards")', "def g(): ...", 'f.on("cuda", "other")']
    (line,) = said(tmp_path, *lines)
    assert line == "some.py:1: npu_rms_norm_backwards is not in torch_npu.schemas"
    assert said(tmp_path, 'f.on("npu", "npu_update")(g)') == []


@pytest.mark.parametrize("line", ["npu = torch.ops.npu", "getattr(torch.ops.npu, name)(x)"])
def test_an_operator_is_not_hidden(tmp_path: Path, line: str) -> None:
    assert "without an operator's name" in said(tmp_path, line)[0]


def test_what_nobody_calls_leaves_the_file(tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text("torch.ops.npu.npu_rms_norm(x, g)\n")
    found = npu_schemas.find([tmp_path / "some.py"])
    lines = list(npu_schemas.mistakes(found, {n: SCHEMAS[n] for n in ("npu_rms_norm", "npu_grouped_matmul")}))
    assert lines == ["torch_npu.schemas: npu_grouped_matmul is called nowhere"]
