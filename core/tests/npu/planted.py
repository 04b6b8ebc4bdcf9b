"""Mistakes planted into the calls of torch_npu's operators, and which checks catch each.

Three checks stand before hardware: the schemas on file, which need no torch_npu; the emulator's refusals, by
torch_npu's own code and the rules of its documentation; and conformance, that values and gradients are the formula's,
the reference gets what no entry takes, as all fp64, and every call is made. The products with their collectives are
left out: they need two devices, and test_overlap.py holds them. What would change nothing is no mistake: attention's
mode 2 for 3 where there are as many keys as queries, or the two sides of a merge exchanged. Limits that no case
reaches, as of 1024 documents, are test_op_table.py's. Run with emulated NPUs, this prints a table; with words, of the
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
from mindspeed_model_core.testing.op_cases import CASES, CHECKS, check
from mindspeed_model_core.testing.op_cases.case import in_types, serving

BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Mistake:
    """A text of one of ``ops``'s files, found there once, and what stands in its place."""

    name: str
    file: str
    old: str
    new: str


MISTAKES = (
    Mistake("keyword unknown", "norm", "(x, weight, epsilon=eps)", "(x, weight, eps=eps)"),
    Mistake("eps dropped", "norm", "(x, weight, epsilon=eps)", "(x, weight)"),
    Mistake("eps and gamma exchanged", "norm", "(x, weight, epsilon=eps)", "(x, eps, weight)"),
    Mistake("gamma detached", "norm", "npu_rms_norm(x, weight,", "npu_rms_norm(x, weight.detach(),"),
    Mistake("gamma forgotten", "norm", "npu_rms_norm(x, weight, epsilon", "npu_rms_norm(x, epsilon"),
    Mistake("second output taken", "norm", "epsilon=eps)[0]", "epsilon=eps)[1]"),
    Mistake("fp64 let in", "norm", "eps: x.dtype in FLOATS and weight.dtype == x.dtype", "eps: True"),
    Mistake("eps of a sum dropped", "norm", "residual, weight, epsilon=eps)", "residual, weight)"),
    Mistake("sum and rstd exchanged", "norm", "normed, rstd, total = torch", "normed, total, rstd = torch"),
    Mistake("norm of one term", "norm", "ctx.save_for_backward(total, weight, rstd)",
            "ctx.save_for_backward(x, weight, rstd)"),
    Mistake("rms for 1 / rms", "norm", "(grad_normed, total, weight, rstd)",
            "(grad_normed, total, weight, 1 / rstd)"),
    Mistake("rstd and gamma exchanged", "norm", "(grad_normed, total, weight, rstd)",
            "(grad_normed, total, rstd, weight)"),
    Mistake("gradient of the sum lost", "norm", "        grad = grad + grad_total\n", ""),
    Mistake("gradient of one term lost", "norm", "return grad, grad, grad_weight", "return grad, None, grad_weight"),
    Mistake("gradient of gamma lost", "norm", "grad_weight.to(weight.dtype), None", "None, None"),
    Mistake("no derivative of a sum", "norm", "return _AddRMSNorm.apply(x, residual, weight, eps)",
            "return torch.ops.npu.npu_add_rms_norm(x, residual, weight, epsilon=eps)[::2]"),
    Mistake("spread term let in", "norm", "weight.dtype == x.dtype == residual.dtype and residual.shape == x.shape",
            "weight.dtype == x.dtype == residual.dtype"),
    Mistake("eps of LayerNorm dropped", "norm", "bias, eps, True)", "bias, additional_output=True)"),
    Mistake("sum not asked for", "norm", "bias, eps, True)", "bias, eps)"),
    Mistake("gamma and beta exchanged", "norm", "weight, bias, eps, True)", "bias, weight, eps, True)"),
    Mistake("mean taken for the sum", "norm", "normed, _, _, total = torch", "normed, total, _, _ = torch"),
    Mistake("dropout forgotten", "norm", "npu_add_layer_norm(dropped, ", "npu_add_layer_norm(x, "),
    Mistake("dropout out of training", "norm", "dropped = _dropped(x, dropout, training)",
            "dropped = _dropped(x, dropout, True)"),
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
    Mistake("betas exchanged", "adamw", "beta1=low, beta2=high", "beta1=high, beta2=low"),
    Mistake("eps left out", "adamw", "beta2=high, eps=update.eps,", "beta2=high, eps=0,"),
    Mistake("gradient's sign", "adamw", "maximize=False", "maximize=True"),
    Mistake("moments exchanged", "adamw", "grads, firsts, seconds, [], steps", "grads, seconds, firsts, [], steps"),
    Mistake("average not updated", "adamw", "    torch._foreach_lerp_(averages, new, 1 - decay)\n", ""),
    Mistake("heads of k called heads", "attention", 'a, b, c, q.shape[1], "BSND"', 'a, b, c, k.shape[1], "BSND"'),
    Mistake("heads before tokens", "attention", '"BSND"', '"BNSD"'),
    Mistake("layout of joined heads", "attention", '"BSND"', '"BSH"'),
    Mistake("scale dropped", "attention", '"BSND", scale=q.shape[-1] ** -0.5, ', '"BSND", '),
    Mistake("scale inverted", "attention", '"BSND", scale=q.shape[-1] ** -0.5', '"BSND", scale=q.shape[-1] ** 0.5'),
    Mistake("q and k exchanged", "attention", 'attention(a, b, c, q.shape[1]', 'attention(b, a, c, q.shape[1]'),
    Mistake("k and v exchanged", "attention", 'attention(a, b, c, q.shape[1]', 'attention(a, c, b, q.shape[1]'),
    Mistake("mask without mode", "attention", '_triangle(device), "sparse_mode": 3}', "_triangle(device)}"),
    Mistake("mode without mask", "attention", '{"atten_mask": _triangle(device), "sparse_mode": 3}',
            '{"sparse_mode": 3}'),
    Mistake("causal in mode 4", "attention", '"sparse_mode": 3', '"sparse_mode": 4'),
    Mistake("band in mode 3", "attention", '"sparse_mode": 4', '"sparse_mode": 3'),
    Mistake("band in mode 0", "attention", '"sparse_mode": 4', '"sparse_mode": 0'),
    Mistake("before and after exchanged", "attention", '"pre_tockens": before, "next_tockens": after',
            '"pre_tockens": after, "next_tockens": before'),
    Mistake("keyword of version 2", "attention", '"pre_tockens": before', '"pre_tokens": before'),
    Mistake("all tokens called -1", "attention", "(_EVERY if reach < 0 else reach for reach in band)", "band"),
    Mistake("mask of what is seen", "attention", ".triu(1)", ".tril()"),
    Mistake("mask with its diagonal", "attention", ".triu(1)", ".triu()"),
    Mistake("mask too small", "attention", "torch.ones(2048, 2048", "torch.ones(1024, 1024"),
    Mistake("mask of numbers", "attention", "dtype=torch.bool, device=device).triu", "device=device).triu"),
    Mistake("unlike documents as alike", "attention", "npu_takes(q, k, v) and _alike(lengths)", "npu_takes(q, k)"),
    Mistake("lengths given as ends", "attention", "ends.append(at)", "ends.append(length)"),
    Mistake("ends of k forgotten", "attention", '"actual_seq_kvlen": ends, ', ""),
    Mistake("ends forgotten", "attention", '"actual_seq_qlen": ends, "actual_seq_kvlen": ends, ', ""),
    Mistake("heads of k called heads, packed", "attention", 'k, v, q.shape[1], "TND"', 'k, v, k.shape[1], "TND"'),
    Mistake("scale dropped, packed", "attention", '"TND", scale=q.shape[-1] ** -0.5, ', '"TND", '),
    Mistake("mask dropped, packed", "attention", "ends, **npu_mask(_band(causal, window), q.device)}", "ends}"),
    Mistake("batch before tokens", "attention", '"SBH", scale', '"BSH", scale'),
    Mistake("scale dropped, all to all", "attention", '"SBH", scale=q.shape[-1] ** -0.5)', '"SBH")'),
    Mistake("scale by position", "attention", '"SBH", scale=q.shape[-1] ** -0.5)', '"SBH", q.shape[-1] ** -0.5)'),
    Mistake("scale by backward's name", "attention", '"SBH", scale=q', '"SBH", scale_value=q'),
    Mistake("nothing attended to let in", "attention", "min(len(q), len(k)) > 0 and ", ""),
    Mistake("fp64 let into attention", "attention", "return sizes and q.dtype in FLOATS and", "return sizes and"),
    Mistake("maximum and sum exchanged", "ring", "out, largest, total, *_ = torch", "out, total, largest, *_ = torch"),
    Mistake("sum without logarithm", "ring", "q.shape[2:]), largest[..., 0] + total[..., 0].log()",
            "q.shape[2:]), largest[..., 0] + total[..., 0]"),
    Mistake("scale dropped, in a ring", "ring", '"SBH", scale=q.shape[-1] ** -0.5, **how', '"SBH", **how'),
    Mistake("mask dropped, in a ring", "ring", '"SBH", scale=q.shape[-1] ** -0.5, **how',
            '"SBH", scale=q.shape[-1] ** -0.5'),
    Mistake("kept statistics exchanged", "ring", "softmax_max=largest, softmax_sum=total,",
            "softmax_max=total, softmax_sum=largest,"),
    Mistake("statistics forgotten", "ring", "softmax_max=largest, softmax_sum=total, ", ""),
    Mistake("statistics written once", "ring", "expand(*lse.shape, 8)", "expand(*lse.shape, 1)"),
    Mistake("sum of zeros", "ring", "torch.ones_like(largest)", "torch.zeros_like(largest)"),
    Mistake("output forgotten", "ring", " attention_in=o,", ""),
    Mistake("output called softmax", "ring", " attention_in=o,", " softmax_in=o,"),
    Mistake("output and gradient exchanged", "ring", "(q, k, v, grad, out))", "(q, k, v, out, grad))"),
    Mistake("scale dropped in backward", "ring", " scale_value=q.shape[-1] ** -0.5,", ""),
    Mistake("scale by forward's name", "ring", "scale_value=q", "scale=q"),
    Mistake("mask dropped in backward", "ring", "scale_value=q.shape[-1] ** -0.5, **how,",
            "scale_value=q.shape[-1] ** -0.5,"),
    Mistake("layout wrong in backward", "ring", '"SBH",\n        softmax', '"BSH",\n        softmax'),
    Mistake("heads of k in backward", "ring", "a, b, c, g, q.shape[2]", "a, b, c, g, k.shape[2]"),
    Mistake("gradients of k and v exchanged", "ring", "dq, dk, dv = (x.unflatten", "dq, dv, dk = (x.unflatten"),
    Mistake("statistics of one chunk twice", "ring", "*_statistics(other_lse)", "*_statistics(lse)"),
    Mistake("statistics exchanged, merging", "ring", "*_statistics(other_lse)", "*_statistics(other_lse)[::-1]"),
    Mistake("outputs exchanged, merging", "ring", "made, largest, total = torch", "made, total, largest = torch"),
    Mistake("outputs of 4 dims merged", "ring", "(out.flatten(2), *_statistics(lse)), (other_out.flatten(2), ",
            "(out, *_statistics(lse)), (other_out, "),
    Mistake("packed layout, merging", "ring", 'input_layout="SBH"', 'input_layout="TND"'),
    Mistake("layout by position", "ring", '*before, *now, input_layout="SBH"', '*before, *now, "SBH"'),
    Mistake("pairs side by side", "rope", '"half")', '"interleave")'),
    Mistake("mode forgotten", "rope", ', "interleave")', ")"),
    Mistake("mode misspelt", "rope", '"interleave")', '"interleaved")'),
    Mistake("cos and sin exchanged", "rope", 'x[None], cos, sin, "half"', 'x[None], sin, cos, "half"'),
    Mistake("sine's sign", "rope", 'x[None], cos, sin, "half"', 'x[None], cos, -sin, "half"'),
    Mistake("tables not cast", "rope", "table.to(x.dtype)[None, :, None]", "table[None, :, None]"),
    Mistake("tables along heads", "rope", "table.to(x.dtype)[None, :, None]", "table.to(x.dtype)[None, None]"),
    Mistake("rotated x detached", "rope", "npu_rotary_mul(x[None],", "npu_rotary_mul(x.detach()[None],"),
    Mistake("x not widened", "rope", "x.float() if x.dim() == 4 else x.float()[:, None]",
            "x if x.dim() == 4 else x[:, None]"),
    Mistake("result left wide", "rope", "turned.view(x.shape).to(x.dtype)", "turned.view(x.shape)"),
    Mistake("a thousand heads let in", "rope", " and x.shape[1] < 1000", ""),
    Mistake("a thousand in all let in", "rope", " and math.prod(x.shape[1:-1]) < 1000", ""),
    Mistake("width 896 let in", "rope", " and x.shape[-1] < 896", ""),
    Mistake("two dims let in", "rope", "x.dim() in (3, 4) and ", ""),
    Mistake("products' operands exchanged", "linear", "(total[None], a, b, ends)", "(total[None], b, a, ends)"),
    Mistake("operand transposed", "linear", "(total[None], a, b, ends)", "(total[None], a.T, b, ends)"),
    Mistake("transposes stated", "linear", "a, b, ends)", "a, b, ends, transpose_x=False)"),
    Mistake("groups forgotten in the sum", "linear", "(total[None], a, b, ends)", "(total, a, b, ends)"),
    Mistake("sum of a copy", "linear", "(total[None], a, b, ends)", "(total.clone()[None], a, b, ends)"),
    Mistake("ends in int32", "linear", "dtype=torch.int64, device=a.device", "dtype=torch.int32, device=a.device"),
    Mistake("ends from 0", "linear", "torch.full((1,), len(a),", "torch.full((1,), 0,"),
    Mistake("ends in a list", "linear", "a, b, ends)", "a, b, [len(a)])"),
    Mistake("fp32 into fp32", "linear", "takes=lambda total, a, b: _widens(total, a, b) and len(a) > 0",
            "takes=lambda total, a, b: len(a) > 0"),
    Mistake("width 65536 let in", "linear", " <= max(total.shape) < 65536", ""),
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
    for name in renewed:
        setattr(ops, name, ops.TABLE[name])
    mistaken = [dataclasses.replace(c, op=ops.TABLE[c.op.name]) for c in CASES if c.op.name in renewed]
    device = torch.device("npu:0")
    refusal, value = "", next((f"{c} is served in fp64" for c in mistaken if serving(c, "npu", torch.float64)), "")
    del CALLS[:]
    for case, dtype in (each.values for each in in_types(mistaken, BOUND)):
        try:
            entry = check(case, device, dtype, BOUND[dtype]).entry
            fused = bool(case.op.entries.get("npu")) and "npu" not in case.reference_on
            assert (entry is not None) == fused, f"is served by {'the reference' if entry is None else entry.calls}"
        except AssertionError as error:
            value = value or f"{case}: {_line(error)}"
        except Exception as error:
            refusal = refusal or _line(error)
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
    print(f"{'file':<11}{'mistake':<34}{'schema':<8}{'refusal':<9}{'value':<7}first words of what was said")
    for v in verdicts:
        marks = [said and "x" for said in (v.schema, v.refusal, v.value)]
        said = next((s for s in (v.schema, v.refusal, v.value) if s), "NOT CAUGHT")
        print(f"{v.mistake.file:<11}{v.mistake.name:<34}{marks[0]:<8}{marks[1]:<9}{marks[2]:<7}{said[:100]}")
    sums = [sum(map(bool, said)) for said in zip(*((v.schema, v.refusal, v.value) for v in verdicts), strict=True)]
    missed = sum(not v.caught for v in verdicts)
    print(f"{len(verdicts)} mistakes: schema {sums[0]}, refusal {sums[1]}, value {sums[2]}; not caught: {missed}")
    return missed


if __name__ == "__main__":
    try:
        sys.exit(min(main(sys.argv[1:]), 1))
    except UserError as error:
        sys.exit(f"error: {error}")
