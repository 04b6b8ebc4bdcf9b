"""Mistakes planted into the calls of torch_npu's operators, and which checks catch each.

Three checks stand before hardware: the schemas on file, which need no torch_npu; the emulator's refusals, by
torch_npu's own code and the rules of its documentation; and conformance, that values and gradients are the formula's,
fp64 is left to the reference and every call is made. Run with emulated NPUs, this prints a table; with words, of the
mistakes whose names hold one of them:

    python -m mindspeed_model_core.testing.npu_emulator SITE 1 planted [WORD ...]      (from this folder)
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from mindspeed_model_core import ops
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing import npu_schemas
from mindspeed_model_core.testing.dist import run_on
from mindspeed_model_core.testing.op_cases import CASES, CHECKS
from mindspeed_model_core.testing.op_cases.case import in_types, run, serving, wanted
from mindspeed_model_core.testing.tolerance import assert_close

BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Mistake:
    """A text of one of ``ops``'s files, found there once, and what stands in its place."""

    name: str
    file: str
    old: str
    new: str


MISTAKES = (
    Mistake("keyword unknown", "norm", "weight, epsilon=eps)", "weight, eps=eps)"),
    Mistake("eps dropped", "norm", "x, weight, epsilon=eps)", "x, weight)"),
    Mistake("eps and gamma exchanged", "norm", "(x, weight, epsilon=eps)", "(x, eps, weight)"),
    Mistake("gamma detached", "norm", "npu_rms_norm(x, weight,", "npu_rms_norm(x, weight.detach(),"),
    Mistake("gamma forgotten", "norm", "npu_rms_norm(x, weight, epsilon", "npu_rms_norm(x, epsilon"),
    Mistake("second output taken", "norm", "epsilon=eps)[0]", "epsilon=eps)[1]"),
    Mistake("fp64 let in", "norm", "x.dtype in FLOATS and weight.dtype == x.dtype", "True"),
    Mistake("operator misspelt", "swiglu", "torch.ops.npu.npu_swiglu(", "torch.ops.npu.npu_swi_glu("),
    Mistake("halves of another dim", "swiglu", "npu_swiglu(x, dim=-1)", "npu_swiglu(x, dim=0)"),
    Mistake("halves exchanged", "swiglu", "npu_swiglu(x, dim=-1)", "npu_swiglu(x.roll(x.shape[-1] // 2, -1), dim=-1)"),
    Mistake("sizes called ends", "experts", "group_type=axis, group_list_type=1", "group_type=axis, group_list_type=0"),
    Mistake("ends called sizes", "experts", "group_list=counts,", "group_list=counts.cumsum(0),"),
    Mistake("groups by position", "experts", "[a], [b], group_list=counts,", "[a], [b], counts,"),
    Mistake("groups in int32", "experts", "group_list=counts,", "group_list=counts.int(),"),
    Mistake("outputs not joined", "experts", "split_item=3", "split_item=0"),
    Mistake("axis forgotten", "experts", "group_type=axis, ", ""),
    Mistake("weights not transposed", "experts", "rows(grad, weight.mT, counts)", "rows(grad, weight, counts)"),
    Mistake("gradient's operands exchanged", "experts", "columns(x.mT, grad, counts)", "columns(grad.mT, x, counts)"),
    Mistake("no derivative written", "experts", "class _Grouped(torch.autograd.Function):\n",
            "class _Grouped:\n    apply = staticmethod(lambda x, w, n, rows, _: rows(x, w, n))\n"),
    Mistake("one expert by its size", "experts", "and len(weight) > 1\n", "\n"),
    Mistake("probabilities dropped", "experts", "rows, places, probs=weights)", "rows, places)"),
    Mistake("probabilities called weights", "experts", "places, probs=weights)", "places, weights=weights)"),
    Mistake("experts in rows of k", "experts", "token_permute(tokens, experts)", "token_permute(tokens, experts.T)"),
    Mistake("padded mode", "experts", "permute(tokens, experts)", "permute(tokens, experts, padded_mode=True)"),
    Mistake("rows dropped", "experts", "token_permute(tokens, experts)", "token_permute(tokens, experts, len(tokens))"),
    Mistake("powers after the step", "adamw", "before = float(update.step) - 1", "before = float(update.step)"),
    Mistake("betas exchanged", "adamw", "low, high, update.eps,\n", "high, low, update.eps,\n"),
    Mistake("decay and rate exchanged", "adamw", "lr, update.weight_decay, low", "weight_decay, update.lr, low"),
    Mistake("eps left out", "adamw", "low, high, update.eps,\n", "low, high,\n"),
    Mistake("out by position", "adamw", "None, False, False, out=[weight", "None, False, False, [weight"),
    Mistake("gradient's sign", "adamw", "grad, None, False, False,", "grad, None, False, True,"),
    Mistake("moments exchanged", "adamw", "out=[weight, first, second]", "out=[weight, second, first]"),
    Mistake("average not updated", "adamw", "    torch._foreach_lerp_(averages, new, 1 - decay)\n", ""),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What each check said of a mistake; empty: nothing. ``value`` is not known where the call was refused."""

    mistake: Mistake
    schema: str
    refusal: str
    value: str

    @property
    def caught(self) -> bool:
        """Whether any check saw it."""
        return any((self.schema, self.refusal, self.value))


def module(mistake: Mistake) -> str:
    """Return the name of the module that a mistake is planted into."""
    return f"{ops.__name__}.{mistake.file}"


def planted(mistake: Mistake) -> str:
    """Return the file's text with the mistake in it. Raises UserError unless its old text is there, and once."""
    path = Path(importlib.import_module(module(mistake)).__file__ or "")
    source = path.read_text()
    if source.count(mistake.old) != 1:
        found = source.count(mistake.old)
        raise UserError(f"{mistake.name!r}: its old text is {found} times in {path.name}, not once: {mistake.old!r}")
    return source.replace(mistake.old, mistake.new)


def by_schema(source: str) -> str:
    """Return what the schemas on file say against a source."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "planted.py"
        path.write_text(source)
        found = npu_schemas.find([path])
    # Of the file as a whole: an operator that another source calls, and this one not, is no mistake here.
    said = (s for s in npu_schemas.mistakes(found, npu_schemas.read()) if "called nowhere" not in s)
    return next(said, "")


def by_running(mistake: Mistake) -> tuple[str, str]:
    """Plant it into this process, run every case of the file's ops on an NPU: what refused a call, what differed."""
    from mindspeed_model_core.testing.npu_emulator.operators import CALLS

    before = dict(ops.TABLE)
    exec(compile(planted(mistake), mistake.file, "exec"), importlib.import_module(module(mistake)).__dict__)
    renewed = {name for name, each in ops.TABLE.items() if before.get(name) is not each}
    mistaken = [dataclasses.replace(c, op=ops.TABLE[c.op.name]) for c in CASES if c.op.name in renewed]
    device = torch.device("npu:0")
    refusal, value = "", next((f"{c} is served in fp64" for c in mistaken if serving(c, "npu", torch.float64)), "")
    del CALLS[:]
    for case, dtype in (each.values for each in in_types(mistaken, BOUND)):
        try:
            tensors = run(case, device, dtype).tensors
        except Exception as error:
            refusal = refusal or _line(error)
            continue
        try:
            assert_close(tensors, wanted(case, dtype), BOUND[dtype])
        except AssertionError as error:
            value = value or f"{case.name}: {_line(error)}"
    for name in sorted(renewed & set(CHECKS)):
        for dtype, bound in BOUND.items():
            try:
                CHECKS[name](device, dtype, bound)
            except AssertionError as error:
                value = value or _line(error)
            except Exception as error:
                refusal = refusal or _line(error)
    promised = {call for name in renewed for entry in ops.TABLE[name].entries.get("npu", ()) for call in entry.calls}
    unmade = sorted(promised - {call.name.partition(".")[0] for call in CALLS})
    return refusal, value or (f"never called: {', '.join(unmade)}" if unmade and not refusal else "")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def judge(mistakes: Iterable[Mistake]) -> list[Verdict]:
    """Try every mistake, each in a process of its own with an emulated NPU."""
    out = []
    for mistake in mistakes:
        schema = by_schema(planted(mistake))
        out.append(Verdict(mistake, schema, *run_on("npu", by_running, 1, mistake)[0]))
    return out


def main(words: list[str]) -> int:
    """Print which check catches what; return how many mistakes none does."""
    chosen = [m for m in MISTAKES if not words or any(w in f"{m.file} {m.name}" for w in words)]
    if not chosen:
        raise UserError(f"{' '.join(words)}: no mistake is named so")
    verdicts = judge(chosen)
    print(f"{'file':<9}{'mistake':<31}{'schema':<8}{'refusal':<9}{'value':<7}first words of what was said")
    for v in verdicts:
        marks = [said and "x" for said in (v.schema, v.refusal, v.value)]
        said = next((s for s in (v.schema, v.refusal, v.value) if s), "NOT CAUGHT")
        print(f"{v.mistake.file:<9}{v.mistake.name:<31}{marks[0]:<8}{marks[1]:<9}{marks[2]:<7}{said[:100]}")
    sums = [sum(map(bool, said)) for said in zip(*((v.schema, v.refusal, v.value) for v in verdicts), strict=True)]
    missed = sum(not v.caught for v in verdicts)
    print(f"{len(verdicts)} mistakes: schema {sums[0]}, refusal {sums[1]}, value {sums[2]}; not caught: {missed}")
    return missed


if __name__ == "__main__":
    try:
        sys.exit(min(main(sys.argv[1:]), 1))
    except UserError as error:
        sys.exit(f"error: {error}")
