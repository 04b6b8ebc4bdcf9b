"""The memory estimate against formulas written out by hand."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import train
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.estimate import SPARE, Estimate, Saved, estimate, fewest_recomputed
from mindspeed_model_core.ops import loss
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.testing import toy

sys.path.insert(0, str(Path(__file__).parent))
from toy_zoo import MODEL, ToyConfig, ToyRecipe

C = ToyConfig()
QKV = C.width + 2 * C.width * C.kv_heads // C.heads
BLOCK = C.width + QKV * C.width + C.width * C.width + 3 * C.hidden * C.width
ENDS = 2 * C.vocab * C.width + C.width
WHOLE = C.layers * BLOCK + ENDS
TOKENS = 2 * 16


def plan(world: int = 1, **changes: Any) -> Estimate:
    fields: dict[str, Any] = {"preset": "tiny", "precision": "fp32", "global_batch": 8, "micro_batch": 2}
    return estimate(ToyRecipe(**{**fields, **changes}), MODEL, world)


def block_bytes(item: int, tp: int = 1, sequence: bool = False) -> int:
    """What one block keeps: see the comments; a column-cut layer keeps its input as it came."""
    around = TOKENS * C.width // (tp if sequence else 1)
    inside = (
        QKV  # the projection, of which v is a view
        + C.width + C.width * C.kv_heads // C.heads  # q and k, rotated
        + C.width  # attention's output
        + 2 * C.hidden + C.hidden + C.hidden  # gate and up, silu(gate), the product
    )  # fmt: skip
    rows = TOKENS // (tp if sequence else 1) * 4 + TOKENS * C.heads // tp * 4  # of the norm and of attention, in fp32
    return item * (3 * around + TOKENS * inside // tp) + rows  # block input, normed input, input of the feed-forward


def test_parameters_are_exact() -> None:
    assert plan().parameters == WHOLE
    assert plan(2, parallel={"tp": 2}).parameters == WHOLE
    assert plan(4, parallel={"pp": 4}).parameters == WHOLE


@pytest.mark.parametrize(
    ("precision", "weights", "gradients", "optimizer"),
    [("fp32", 4, 4, 8), ("bf16", 2, 4, 12), ("bf16-pure", 2, 2, 4), ("fp64", 8, 8, 16)],
)
def test_states_by_precision(precision: str, weights: int, gradients: int, optimizer: int) -> None:
    memory = plan(2, precision=precision).memory
    assert (memory.weights, memory.gradients, memory.optimizer) == (
        weights * WHOLE, gradients * WHOLE, optimizer * WHOLE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shard", "gathered", "whole_gradients"),
    [("zero1", WHOLE, WHOLE), ("zero2", WHOLE, 0), ("zero3", 2 * BLOCK + ENDS, 0)],
)
def test_states_by_zero_stage(shard: str, gathered: int, whole_gradients: int) -> None:
    dp = 4
    memory = plan(dp, precision="bf16", parallel={"shard": shard}, global_batch=16).memory
    own = WHOLE // dp
    assert memory.weights == 2 * gathered
    assert memory.gradients == 4 * own + 4 * whole_gradients
    assert memory.optimizer == 12 * own


def test_zero1_gathers_no_gradients_without_accumulation() -> None:
    assert plan(4, precision="bf16", parallel={"shard": "zero1"}).memory.gradients == WHOLE


def test_rows_that_do_not_divide_are_rounded_up() -> None:
    memory = plan(3, parallel={"shard": "zero2"}, global_batch=6, config={"layers": 1}).memory
    rows = [(C.width, 1), (QKV, C.width), (C.width, C.width), (2 * C.hidden, C.width), (C.width, C.hidden)]
    rows += [(C.vocab, C.width), (C.width, 1), (C.vocab, C.width)]
    assert memory.optimizer == 12 * sum(math.ceil(n / 3) * width for n, width in rows)


@pytest.mark.parametrize(("tp", "sequence"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(("precision", "item"), [("fp32", 4), ("bf16", 2)])
def test_a_block_keeps_what_its_formula_says(tp: int, sequence: bool, precision: str, item: int) -> None:
    parallel = {"tp": tp, "sequence": sequence}
    four, two = (
        plan(tp, parallel=parallel, precision=precision, config={"layers": n}).memory.activations for n in (4, 2)
    )
    # Rotary tables are fp32; a block may keep its own copies of cos and sin for q and k in another compute dtype.
    tables = 0 if item == 4 else 4 * TOKENS * C.width // C.heads * item
    assert 0 <= (four - two) // 2 - block_bytes(item, tp, sequence) <= tables


def test_recomputed_blocks_keep_their_input_and_one_runs_again() -> None:
    kept, some, none = (plan(recompute=r).memory.activations for r in ("none", 3, "all"))
    entry, block = 4 * TOKENS * C.width, block_bytes(4)
    assert some == kept - 3 * (block - entry) + block
    assert none == kept - 4 * (block - entry) + block
    with pytest.raises(UserError, match="recompute=5: a pipeline stage holds 4 blocks; nearest: 4, or all"):
        plan(recompute=5)
    with pytest.raises(UserError, match="recompute=3: a pipeline stage holds 2 blocks; nearest: 2"):
        plan(2, parallel={"pp": 2}, recompute=3)


@pytest.mark.parametrize("tp", [1, 2])
def test_what_is_kept_of_recomputed_blocks_is_counted(tp: int) -> None:
    def activations(keep: str) -> int:
        return plan(tp, recompute="all", recompute_keep=keep, parallel={"tp": tp}).memory.activations

    nothing, attention, products = (activations(keep) for keep in ("nothing", "attention", "products"))
    # While a block runs again, what it kept is there once.
    attended = 4 * TOKENS * (C.width + C.heads) // tp
    assert attention - nothing == (C.layers - 1) * attended
    # With tensor parallelism the products that are summed in place are not kept.
    rows = QKV // tp + 2 * C.hidden // tp + (2 * C.width if tp == 1 else 0)
    assert products - attention == (C.layers - 1) * 4 * TOKENS * rows


@pytest.mark.parametrize(("recompute", "micro"), [("none", 8), ("all", 8), ("all", 1)])
def test_gradients_of_one_micro_batch_come_as_its_activations_go(recompute: str, micro: int) -> None:
    memory = plan(recompute=recompute, micro_batch=micro, global_batch=micro).memory
    block, entry = micro * block_bytes(4) // 2, 4 * micro * TOKENS // 2 * C.width  # TOKENS are those of two samples
    kept = C.layers * [block if recompute == "none" else entry]
    tables = memory.activations - sum(kept) - (block - entry if recompute == "all" else 0)
    most = sum(kept) + memory.head
    for at in range(C.layers):
        behind = 4 * ((C.layers - at) * BLOCK + ENDS)  # the gradients there are once block ``at`` is done
        most = max(most, sum(kept[:at]) + block + behind)
    assert memory.overlap > 0 and tables >= 0
    assert memory.total - memory.weights - memory.optimizer == most + tables


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {"global_batch": 4}),
        (1, {"global_batch": 2, "precision": "bf16"}),
        (2, {"global_batch": 4}),
        (2, {"global_batch": 8, "parallel": {"shard": "zero2"}}),
    ],
)
def test_gradients_that_are_added_up_are_there_all_along(world: int, changes: dict[str, Any]) -> None:
    assert plan(world, **changes).memory.overlap == 0


def test_shards_of_gradients_come_late() -> None:
    assert plan(2, global_batch=4, parallel={"shard": "zero2"}).memory.overlap > 0


def test_memory_that_no_recomputation_makes_enough_is_said_to_be_too_little(monkeypatch, capsys) -> None:
    mesh = Mesh(torch.device("cpu"))
    said = {}
    for free in (1, 2**40):
        monkeypatch.setattr(train.devices, "free_memory", lambda _, free=free: free)
        for keep in ("nothing", "products"):
            train._fitting(ToyRecipe(preset="tiny", recompute="auto", recompute_keep=keep), MODEL, mesh)
            said[free, keep] = capsys.readouterr().err
    assert "that is too much: try a smaller micro_batch" in said[1, "nothing"]
    assert "that is too much: try recompute_keep=nothing, a smaller micro_batch" in said[1, "products"]
    assert "too much" not in said[2**40, "nothing"] + said[2**40, "products"]


def test_as_few_blocks_run_again_as_memory_lets() -> None:
    recipe = ToyRecipe(preset="tiny", precision="fp32", global_batch=8, micro_batch=2, recompute="auto")
    needs = [plan(recompute=count).memory.total for count in range(C.layers + 1)]
    assert needs[2] > needs[3] > needs[4]
    # One alone saves nothing: while it runs again, its activations are there.
    for count, following in {0: 2, 2: 3, 3: 4, 4: 4}.items():
        least = math.ceil(needs[count] / (1 - SPARE))
        assert fewest_recomputed(recipe, MODEL, 1, least) == (count, needs[count])
        assert fewest_recomputed(recipe, MODEL, 1, least - 1) == (following, needs[following])
    assert fewest_recomputed(recipe, MODEL, 1, 0) == (C.layers, needs[C.layers])
    halves = ToyRecipe(**recipe.model_dump(exclude={"parallel"}), parallel={"pp": 2})
    assert fewest_recomputed(halves, MODEL, 2, 0)[0] == C.layers // 2
    # The last stage, with the head, is the fullest.
    fields = {
        "config": {"vocab": 4096},
        "parallel": {"pp": 2},
        "precision": "fp32",
        "global_batch": 8,
        "micro_batch": 2,
    }
    heavy = [plan(2, **fields, recompute=count) for count in (0, 2)]
    assert [each.stage for each in heavy] == [1, 1]
    auto = ToyRecipe(preset="tiny", recompute="auto", **fields)
    assert fewest_recomputed(auto, MODEL, 2, int(heavy[0].memory.total / (1 - SPARE)) - 1)[0] > 0
    assert fewest_recomputed(auto, MODEL, 2, int(heavy[0].memory.total / (1 - SPARE)) + 1)[0] == 0
    assert any("recompute=auto: this is with no block recomputed" in note for note in plan(recompute="auto").notes)


def test_head_keeps_logits_and_one_fp32_gradient_of_them() -> None:
    logits = TOKENS * C.vocab
    rest = 4 * TOKENS * C.width * 2 + 4 * TOKENS * 2  # norm's input and output; two fp32 numbers a token
    assert plan().memory.head == 4 * logits + 4 * logits + rest
    half = plan(2, parallel={"tp": 2}).memory.head
    assert half == 4 * logits + rest


def test_head_keeps_no_logits_that_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.AT_ONCE, "meta", TOKENS * C.vocab // 2 - 1)
    rows = TOKENS * C.width
    # The norm's input and output, a number of each, of the loss too; then a gradient of its output.
    assert plan().memory.head == 4 * (2 * rows + 2 * TOKENS) + 4 * rows


def test_the_first_stage_keeps_most_micro_batches() -> None:
    four = plan(4, parallel={"pp": 4}, global_batch=16)
    one = plan(4, parallel={"pp": 4}, global_batch=2)
    assert four.stage == 0
    assert four.memory.activations == 4 * one.memory.activations
    assert four.memory.weights == 4 * (BLOCK + C.vocab * C.width)
    assert four.memory.head == 0
    assert any("do not fill" in note for note in one.notes)
    assert not any("do not fill" in note for note in four.notes)


def test_a_large_vocabulary_makes_the_last_stage_worst() -> None:
    got = plan(2, parallel={"pp": 2}, config={"vocab": 4096})
    assert got.stage == 1
    assert got.memory.head > 0


def test_a_batch_that_training_would_refuse_is_refused() -> None:
    with pytest.raises(UserError, match="global_batch=8: not a multiple of .* 3 data ranks = 6; nearest: 6"):
        plan(3)


@pytest.mark.parametrize(
    ("world", "parallel", "part"),
    [
        (4, {"tp": 4}, "valid: 1, 2"),  # two key/value heads
        (3, {"pp": 3}, "does not divide the 4 blocks"),
        (3, {"tp": 2}, "does not divide the 3 processes"),
    ],
)
def test_what_does_not_divide_is_refused(world: int, parallel: dict[str, int], part: str) -> None:
    with pytest.raises(UserError, match=part):
        plan(world, parallel=parallel)


def test_nothing_is_allocated_for_a_huge_network() -> None:
    got = plan(config={"width": 8192, "heads": 64, "kv_heads": 8, "hidden": 28672, "layers": 80, "vocab": 32000})
    assert got.parameters > 60e9


def test_networks_without_attention_or_documents() -> None:
    got = estimate(toy.recipe(), toy.TOY, 1)
    assert got.parameters == sum(p.numel() for p in toy.Toy(toy.ToyConfig()).parameters())
    assert got.memory.activations > 0 and got.memory.head > 0


def test_saved_counts_each_storage_once_and_parameters_never() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    x = torch.ones(4, 8, requires_grad=True)
    with Saved([weight]) as saved:
        y = torch.nn.functional.linear(x, weight)
        (y[:2] * y[2:]).sum()
    assert saved.bytes == x.nbytes + y.nbytes
    assert len(saved.tensors) == 2


def test_title_and_table_say_what_it_is_for() -> None:
    got = plan(8, parallel={"tp": 2, "pp": 2})
    assert got.title.startswith("memory per device on 8 devices: tp 2 x pp 2 x dp 2, stage 0 of 0-1")
    assert got.table().row_count == 6
    assert got.memory.total == sum(vars(got.memory).values()) - 2 * got.memory.overlap


def test_plain_formulas_are_estimated_as_such() -> None:
    """Attention then keeps its probabilities."""
    probabilities = 4 * 2 * C.heads * 16 * 16
    assert plan(optimization_level=0).memory.activations >= plan().memory.activations + C.layers * probabilities


def test_each_kind_of_block_is_measured() -> None:
    """Of blocks twice as wide inside, the second stage holds two, the first none."""

    class Wide(toy.Block):
        pass

    def build(config: toy.ToyConfig) -> toy.Toy:
        net = toy.Toy(config)
        with torch.device("meta"):
            for number in (2, 3):
                net.blocks[number] = Wide(toy.ToyConfig(hidden=2 * config.hidden))
        return net

    def kept(model: Any, **changes: Any) -> int:
        return estimate(toy.recipe(micro_batch=1, **changes), model, 1).memory.activations

    mixed = replace(toy.TOY, build=build)
    wide = replace(toy.TOY, build=lambda config: toy.Toy(toy.ToyConfig(hidden=2 * config.hidden)))
    assert 2 * kept(mixed) == kept(toy.TOY) + kept(wide)
    # Of the blocks that run again, the largest is there whole.
    assert kept(mixed, recompute="all") == kept(wide, recompute="all")
