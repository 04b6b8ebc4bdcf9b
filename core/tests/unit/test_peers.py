"""Ours beside a peer, here the toy's twin in plain PyTorch."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mindspeed_model_core import breakdown, perf
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.parallel import apply
from mindspeed_model_core.peak import Peak
from mindspeed_model_core.perf import baseline, peers, provenance, sides
from mindspeed_model_core.perf.peers import Comparison, Peer, Report
from mindspeed_model_core.testing import toy
from mindspeed_model_core.train import Session
from mindspeed_model_core.weights.layout import Cat, Row, Table
from rich.console import Console
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

CPU = torch.device("cpu")
TABLE = Table(
    Row("table.weight", "embedding.weight"),
    Row("blocks.*.norm.weight", "layers.*.norm.weight"),
    Row("blocks.*.up.weight", ("layers.*.wide.weight", "layers.*.narrow.weight"), Cat(sizes=(20, 4))),
    Row("blocks.*.up.bias", ("layers.*.wide.bias", "layers.*.narrow.bias"), Cat(sizes=(20, 4))),
    Row("blocks.*.down.weight", "layers.*.down.weight"),
    Row("blocks.*.down.bias", "layers.*.down.bias"),
    Row("blocks.*.side.weight", "layers.*.side.weight"),
    Row("blocks.*.side.bias", "layers.*.side.bias"),
    Row("head.weight", "head.weight"),
)
HUB: Any = SimpleNamespace(name="hub", table=lambda config: TABLE, extra=lambda config, dtype: {})
MODEL = replace(toy.TOY, package="toy_zoo", layouts=(HUB,))
BATCH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(6, 1e-6)
        self.wide, self.narrow = nn.Linear(6, 20), nn.Linear(6, 4)
        self.down, self.side = nn.Linear(20, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self.wide(y).tanh()) + self.side(self.narrow(y))


class Twin(nn.Module):
    """The toy as its library might have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(6, 12, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build(config: Any, recipe: Any) -> nn.Module:
    return Twin()


def loss(net: nn.Module, batch: dict[str, Any], count: int) -> Tensor:
    return F.cross_entropy(net(batch["ids"]), batch["labels"], reduction="sum") / count


TWIN = Peer("torch", build, loss)


def comparison(*others: Peer, **options: Any) -> Comparison:
    return Comparison("small", "base", (TWIN, *others), **options)


def compare(what: Comparison, steps: int = 5, **options: Any) -> Report:
    return peers.compare(MODEL, what, device=CPU, steps=steps, **options)


def printed(report: Report) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(peers.table(report))
    for line in peers.notes(report):
        console.print(line, soft_wrap=True)
    return console.export_text()


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    """A matrix product need not be timed at its size here, nor any commit be looked up."""
    monkeypatch.setattr(peers, "measured_peak", lambda device, precision: Peak(1e12, "measured matmul"))
    monkeypatch.setattr(provenance, "commit", lambda *packages, files=(): "0123456789ab")
    monkeypatch.setattr(peers, "gc", SimpleNamespace(collect=lambda: None))  # takes longer than all else
    monkeypatch.setenv("MINDSPEED_MODEL_DEVICE", "cpu")


# --- the same work ---


@pytest.mark.parametrize("tiny", [False, True])
def test_both_sides_do_the_same_steps(tiny: bool) -> None:
    ours, twin = compare(comparison(tiny=tiny)).sides
    assert len(ours.done) == len(twin.done) == 8 and len(ours.seconds) == len(twin.seconds) == 5
    for one, other in zip(ours.done, twin.done, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4) and other.norm == pytest.approx(one.norm, rel=1e-3)
        assert one.work == other.work and one.work.samples == BATCH
    assert ours.done[0].loss != pytest.approx(ours.done[-1].loss, rel=1e-3), "nothing was learnt"


def test_adapters_start_from_the_same_factors() -> None:
    ours, twin = compare(comparison(overrides=("lora={rank: 2, alpha: 6}",))).sides
    assert (ours.said, twin.said) == ("", "")
    assert ours.done[0].norm and twin.done[0].norm == pytest.approx(ours.done[0].norm, rel=1e-4)
    assert twin.done[-1].loss == pytest.approx(ours.done[-1].loss, rel=1e-4)
    assert "rank 2" in twin.settings


def test_a_matrix_of_zeros_is_filled_on_both_sides(monkeypatch) -> None:
    """Or a frozen network before a head of zeros would hand back no gradient to compare."""
    normal = toy.Toy.initialise

    def initialise(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        weight.zero_() if name == "head.weight" else normal(self, name, weight, generator)

    monkeypatch.setattr(toy.Toy, "initialise", initialise)
    ours, twin = compare(comparison(overrides=("lora={rank: 2}",)), steps=1).sides
    assert (ours.said, twin.said) == ("", "") and ours.done[0].norm and ours.done[0].norm > 1e-3


def test_another_loss_is_refused() -> None:
    wrong = replace(TWIN, library="rich", loss=lambda *given: 1.05 * loss(*given))
    report = compare(comparison(wrong))
    side = report.sides[2]
    assert side.measured is None and side.broken and report.broken == [side]
    assert side.said.startswith("does other work: loss ") and "in step 1, ours " in side.said
    assert report.best is report.sides[1]
    assert "does other work" in printed(report)


def test_another_gradient_is_refused() -> None:
    def halved(net: nn.Module, batch: dict[str, Any], count: int) -> Tensor:
        whole = loss(net, batch, count)
        return whole.detach() / 2 + whole / 2

    side = compare(comparison(replace(TWIN, loss=halved))).sides[2]
    assert side.broken and side.said.startswith("does other work: gradient norm ")


def test_a_loss_that_is_not_a_number_is_refused() -> None:
    side = compare(comparison(replace(TWIN, loss=lambda *given: float("nan") * loss(*given)))).sides[2]
    assert side.broken and "loss nan" in side.said


def test_other_weights_are_refused() -> None:
    def wider(config: Any, recipe: Any) -> nn.Module:
        net = Twin()
        net.more = nn.Linear(2, 2, bias=False)
        return net

    side = compare(comparison(replace(TWIN, build=wider))).sides[2]
    assert side.broken and "not those of layout 'hub': 1, first 'more.weight'" in side.said


def test_a_batch_can_be_split() -> None:
    def halves(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for part in (slice(None, 3), slice(3, None)):
            yield {key: value[part] for key, value in batch.items()}

    side = compare(comparison(replace(TWIN, split=halves))).sides[2]
    assert not side.said and side.measured is not None


# --- what goes wrong ---


def raising(error: Exception) -> Callable[..., Tensor]:
    def fail(*given: Any) -> Tensor:
        raise error

    return fail


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_no_room_is_said_and_the_rest_goes_on(error: Exception, tiny: bool) -> None:
    full, after = replace(TWIN, loss=raising(error)), replace(TWIN, library="rich")
    report = compare(comparison(full, after, tiny=tiny))
    assert [s.said for s in report.sides] == ["", "", "out of memory", ""]
    assert not report.broken and report.sides[3].measured is not None
    assert "out of memory" in printed(report)


def test_ours_may_have_no_room_either(monkeypatch) -> None:
    monkeypatch.setattr(Session, "start", raising(torch.OutOfMemoryError("none left")))
    ours, twin = compare(comparison()).sides
    assert ours.said == "out of memory" and twin.measured is not None and twin.ratio == 1


def test_a_peer_that_fails_is_named_and_ours_that_fails_ends_it(monkeypatch) -> None:
    report = compare(comparison(replace(TWIN, loss=raising(RuntimeError("\nno kernel\nfor it")))))
    assert [(s.name, s.said) for s in report.broken] == [("torch eager", "RuntimeError: no kernel")]
    monkeypatch.setattr(Session, "start", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        compare(comparison())


def test_what_is_not_here_is_said() -> None:
    missing = replace(TWIN, mode="liger", needs=("no-such-library", "rich"))
    asks = replace(TWIN, mode="fast", accelerator=True)
    report = compare(comparison(missing, asks))
    assert [s.said for s in report.sides[2:]] == ["no-such-library not installed", "needs an accelerator"]
    assert not report.broken


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps=0, warmup=3"),
        ({"warmup": 0}, "steps=5, warmup=0"),
        ({"overrides": ("precision=bf16",)}, "no master weights"),
        ({"overrides": ("recompute=2",)}, "recompute=2: peers recompute all blocks or none"),
        ({"overrides": ("stesp=3",)}, "stesp"),
    ],
)
def test_what_cannot_be_compared_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compare(comparison(), **options)


def test_quick_keeps_the_first_of_each() -> None:
    fast, slow = replace(TWIN, mode="fast"), replace(TWIN, settings="slowly")
    report = compare(comparison(slow, fast, replace(fast, settings="too"), ours=((), ("seed=1",))), steps=1, quick=True)
    assert [(s.name, s.settings.endswith("fp32")) for s in report.sides] == [
        ("ours", True),
        ("torch eager", True),
        ("torch fast", True),
    ]


@pytest.mark.parametrize(("kind", "rows"), [("cuda", [True, False]), ("cpu", [False])])
def test_rows_of_ours_that_replay_steps_are_cudas(kind: str, rows: list[bool]) -> None:
    both = comparison(ours=(("cuda_graph=true",), ()))
    sides = peers._sides(MODEL, both, torch.device(kind), (), (), False)
    assert [side.recipe.cuda_graph for side in sides if side.peer is None] == rows and len(sides) == len(rows) + 1


def test_works_are_chosen_by_name_or_device() -> None:
    small, large = comparison(tiny=True), replace(comparison(), name="large")
    assert peers.chosen((small, large), (), CPU) == [small]
    assert peers.chosen((small, large), (), torch.device("cuda")) == [large]
    assert peers.chosen((small, large), ("large",), CPU) == [large]
    with pytest.raises(UserError, match="--work=larg: no such comparison; did you mean 'large'"):
        peers.chosen((small, large), ("larg",), CPU)


def test_patches_are_put_back() -> None:
    class Space:
        kept, changed = 1, 2

    with pytest.raises(KeyError), sides.restored(Space):
        Space.changed, Space.new = 3, 4
        raise KeyError
    assert (Space.kept, Space.changed, hasattr(Space, "new")) == (1, 2, False)


def test_around_holds_for_the_life_of_a_side() -> None:
    from contextlib import contextmanager

    lives: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        lives.append("in")
        yield
        lives.append("out")

    def seen(*given: Any) -> Tensor:
        assert lives == ["in"]
        return loss(*given)

    report = compare(comparison(replace(TWIN, around=around, loss=seen), TWIN))
    assert not report.broken and lives == ["in", "out"]


@pytest.mark.parametrize("failing", [False, True])
def test_a_side_is_freed_before_the_next_is_built(failing: bool, monkeypatch) -> None:
    """Two networks of 7 billion parameters have no room in one device."""
    monkeypatch.setattr(peers, "gc", gc)
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    start = Session.start

    def started(self: Any) -> None:
        assert not alive
        start(self)
        alive.add(self.parallel.net)

    def alone(config: Any, recipe: Any) -> nn.Module:
        assert not alive
        net = Twin()
        alive.add(net)
        return net

    monkeypatch.setattr(Session, "start", started)

    def fail(*given: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")  # a new one: an error that stays would hold the frames it came through

    others = [replace(TWIN, build=alone, loss=fail if failing else loss), replace(TWIN, build=alone)]
    report = compare(Comparison("small", "base", tuple(others), ours=((), ("seed=0",))), steps=2)
    assert [s.said for s in report.sides] == ["", "", "out of memory" if failing else "", ""]
    assert not alive


def test_a_peer_that_breaks_the_device_leaves_what_was_measured(monkeypatch) -> None:
    calls = []

    def break_at_the_second(device: torch.device) -> None:
        calls.append(device)
        if len(calls) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(peers, "_free", break_at_the_second)
    report = compare(Comparison("small", "base", (TWIN, replace(TWIN, mode="other"))), steps=2)
    ours, twin, other = report.sides
    assert ours.measured is not None and twin.measured is not None and len(calls) == 2
    assert other.measured is None and "not run, torch eager broke the device: CUDA error" in other.said
    assert report.broken == [other]


# --- figures ---


@pytest.fixture
def seconds(monkeypatch) -> dict[str, float]:
    """Seconds a step takes, by who does it: ``ours``, or the peer's library."""
    now, took = [0.0], {"ours": 2.0, "torch": 3.0, "rich": 4.0}
    step = Session.step

    def ours(self: Any) -> Any:
        now[0] += took["ours"]
        return step(self)

    monkeypatch.setattr(Session, "step", ours)
    monkeypatch.setattr(peers, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(breakdown, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def timed(peer: Peer) -> Peer:
        def slow(*given: Any) -> Tensor:
            now[0] += took[peer.library] / BATCH
            return loss(*given)

        return replace(peer, loss=slow)

    took["timed"] = timed  # type: ignore[assignment]
    return took


@pytest.mark.parametrize("tiny", [False, True])
def test_ratios_are_over_the_fastest_peer(seconds, tiny: bool) -> None:
    timed: Any = seconds["timed"]
    what = Comparison("small", "base", (timed(replace(TWIN, library="rich")), timed(TWIN)), tiny=tiny)
    report = compare(what)
    assert report.best is report.sides[2]
    assert [s.ratio for s in report.sides] == pytest.approx([1.5, 0.75, 1.0])
    ours = report.sides[0].measured
    assert ours is not None and ours.step_s == 2 and ours.value() == BATCH * toy.ROWS / 2
    text = printed(report)
    row = next(line for line in text.splitlines() if line.strip().startswith("ours"))
    assert all(cell in row for cell in ("micro batch 1, no recompute, fp32", "2 s", "32", "1.500")), row
    assert "only the ratios matter" in text and "torch " in text and "tokens/s/device" in text
    assert ("in pairs" if tiny else "one after another") in text


def test_ours_of_another_precision_stands_beside_without_a_ratio() -> None:
    report = compare(comparison(ours=((), ("precision=bf16",))))
    assert [s.ratio is None for s in report.sides] == [False, True, False] and not report.broken


def test_the_share_of_the_ceiling_is_of_what_was_measured(seconds) -> None:
    report = compare(Comparison("small", "base", (seconds["timed"](TWIN),)))  # type: ignore[operator]
    # 8 batches of 1e6 FLOPs in 2 s, of 1e12 FLOP/s.
    assert "0.0%" in printed(report)
    report = replace(report, ceiling=Peak(8e6, "measured matmul"))
    assert "50.0%" in printed(report) and "33.3%" in printed(report)


# --- records ---


@pytest.fixture
def where(tmp_path: Path) -> Path:
    folder = tmp_path / "perf_baselines"
    folder.mkdir()
    (folder / baseline.PUBLISHED).write_text(",".join(baseline.Published.__dataclass_fields__) + "\n")
    return folder


def test_ours_and_peers_are_recorded(seconds, where: Path) -> None:
    timed: Any = seconds["timed"]
    what = Comparison("small", "base", (timed(TWIN), timed(replace(TWIN, library="rich"))), ours=((), ("seed=3",)))
    # Another seed starts from other weights, which is other work.
    report = compare(what)
    assert report.sides[1].broken
    report = compare(replace(what, ours=((), ("optim.clip=0.9",))))
    assert peers.keep(report, where) == ["toy.csv", "peers.csv"]
    plain, changed = baseline.read(where, "toy")
    assert plain.note == "0.0% of a measured matmul" and plain.step_s == 2 and plain.commit == "0123456789ab"
    assert changed.note.startswith("with optim.clip=0.9; ") and changed.digest != plain.digest
    first, second = baseline.read_peers(where)
    assert (first.libraries, second.libraries) == (f"torch {torch.__version__}", f"rich {peers._version('rich')}")
    assert (first.ratio, second.ratio) == (1.5, 2.0) and first.ours == pytest.approx(plain.value, rel=1e-5)
    assert (first.recipe, first.digest, first.work, first.mode) == ("base", plain.digest, "small", "eager")
    assert first.settings == "micro batch 1, no recompute, fp32" and first.peak_gib and first.stack == plain.stack


def test_sides_that_were_refused_are_not_recorded(where: Path) -> None:
    peers.keep(compare(comparison(replace(TWIN, library="rich", loss=lambda *g: 2 * loss(*g)))), where)
    assert [row.libraries.split()[0] for row in baseline.read_peers(where)] == ["torch"]


def test_memory_is_no_sides_own_where_all_are_held(where: Path) -> None:
    peers.keep(compare(comparison(tiny=True)), where)
    assert baseline.read_peers(where)[0].peak_gib is None
    assert baseline.read(where, "toy")[0].note.startswith("memory of all sides; ")


def test_changed_sources_are_not_recorded(where: Path, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "commit", lambda *packages, files=(): "0123456789ab+dirty")
    report = compare(comparison())
    with pytest.raises(UserError, match=r"commit=0123456789ab\+dirty"):
        peers.keep(report, where)
    assert {f.name for f in where.iterdir()} == {baseline.PUBLISHED}
    peers.keep(report, where, allow_dirty=True)
    assert baseline.read_peers(where)[0].commit.endswith("+dirty")


def test_a_record_appears_whole_or_not_at_all(where: Path, monkeypatch) -> None:
    report = compare(comparison(replace(TWIN, library="rich")))
    peers.keep(report, where)
    before = (where / baseline.PEERS).read_bytes()
    replaced = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == baseline.PEERS:
            raise OSError(28, "No space left on device")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        peers.keep(report, where)
    assert (where / baseline.PEERS).read_bytes() == before
    assert {f.name for f in where.iterdir()} == {baseline.PUBLISHED, "toy.csv", baseline.PEERS}


def test_a_changed_script_makes_the_commit_dirty(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(provenance, "_version", lambda package: head())
    script = tmp_path / "peers.py"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]

    def head() -> str:
        run = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True)
        return run.stdout.strip()

    script.write_text("1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    assert perf.commit("toy_zoo", files=[script]) == head()
    script.write_text("2\n")
    assert perf.commit("toy_zoo", files=[script]) == f"{head()}+dirty"


# --- the command ---


def call(monkeypatch, capfd, *args: str, comparisons: tuple[Comparison, ...] = ()) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["peers.py", *args])
    with pytest.raises(SystemExit) as ended:
        peers.main(MODEL, comparisons or (comparison(tiny=True),), __file__)
    out, err = capfd.readouterr()
    return ended.value.code, out, err  # type: ignore[return-value]


def test_the_command_prints_and_changes_nothing(monkeypatch, capfd, where: Path) -> None:
    status, out, err = call(monkeypatch, capfd, "--steps", "2", "--baselines", str(where))
    assert (status, err) == (0, "") and "torch eager" in out and "x best peer" in out
    assert {f.name for f in where.iterdir()} == {baseline.PUBLISHED}
    status, out, _ = call(monkeypatch, capfd, "--help")
    assert status == 0 and "small (base, a CPU will do)" in " ".join(out.split())


def test_the_command_records_when_asked(monkeypatch, capfd, where: Path) -> None:
    args = ("--steps", "5", "--baselines", str(where))
    status, out, err = call(monkeypatch, capfd, *args, "--record")
    assert status == 2 and "--record: on a CPU only the ratios matter; --record-cpu" in err and not out
    status, out, err = call(monkeypatch, capfd, *args, "--record-cpu")
    assert (status, err) == (0, "") and f"recorded in {where / 'peers.csv'}" in out
    status, out, err = call(monkeypatch, capfd, *args)
    assert status == 0 and "ours, micro batch 1, no recompute, fp32: baseline:" in out
    assert len(baseline.read_peers(where)) == 1


@pytest.mark.parametrize(
    ("args", "commit", "said"),
    [
        (("--steps", "5"), "0123456789ab+dirty", "the sources hold changes; commit them, or pass --allow-dirty"),
        (("--steps", "4"), "0123456789ab", "--steps=4: 5 or more timed steps"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_it_is_measured(
    monkeypatch, capfd, where: Path, args: tuple[str, ...], commit: str, said: str
) -> None:
    monkeypatch.setattr(provenance, "commit", lambda *packages, files=(): commit)
    monkeypatch.setattr(peers, "compare", raising(AssertionError("measured")))
    status, out, err = call(monkeypatch, capfd, *args, "--record-cpu", "--baselines", str(where))
    assert status == 2 and said in err and not out


def test_what_a_later_comparison_refuses_is_told_before_the_first(monkeypatch, capfd) -> None:
    monkeypatch.setattr(peers, "compare", raising(AssertionError("measured")))
    later = replace(comparison(tiny=True), name="later", overrides=("precision=bf16",))
    both = (comparison(tiny=True), later)
    status, _, err = call(monkeypatch, capfd, comparisons=both)
    assert status == 2 and "no master weights" in err
    status, _, err = call(monkeypatch, capfd, "--mode", "eagre", comparisons=both)
    assert status == 2 and "--mode=eagre: no peer of small or later has it; did you mean 'eager'" in err


def test_a_comparison_without_the_mode_is_left_out(monkeypatch, capfd) -> None:
    fast = replace(comparison(tiny=True), name="fast", peers=(replace(TWIN, mode="fast"),))
    status, out, err = call(
        monkeypatch, capfd, "--steps", "1", "--mode", "fast", comparisons=(comparison(tiny=True), fast)
    )
    assert (status, err) == (0, "") and "fast: base" in out and "small: base" not in out


def test_the_command_fails_where_a_peer_is_not_comparable(monkeypatch, capfd) -> None:
    wrong = comparison(replace(TWIN, library="rich", loss=lambda *given: 2 * loss(*given)), tiny=True)
    status, out, err = call(monkeypatch, capfd, "--steps", "2", comparisons=(wrong,))
    assert status == 2 and "does other work" in out
    assert err.splitlines() == [
        "error: no fair comparison with small: rich eager: see the table; --mode leaves modes out"
    ]


def test_first_values_are_those_of_training() -> None:
    """What a peer is given is what ``initialise`` writes, by the seed and the name alone."""
    recipe = toy.recipe(seed=5)
    from mindspeed_model_core.parallel.mesh import Mesh
    from mindspeed_model_core.train import Session

    session = Session(recipe, MODEL, Mesh(CPU))
    session.start()
    for name, shard in session.parallel.shards.items():
        assert torch.equal(apply.initial(session.parallel.net, name, tuple(shard.shape), 5, CPU), shard.master)
