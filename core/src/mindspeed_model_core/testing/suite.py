"""The tests every model package passes: subclass ModelSuite in the package's tests and fill in the attributes."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import device as devices
from .. import metrics, ops, perf, train, weights
from .. import recipe as recipes
from ..errors import UserError
from ..model import Model
from ..parallel import apply
from ..parallel.mesh import Mesh
from ..recipe import ParallelConfig, Recipe
from ..trunk import Batch, Trunk
from . import npu_emulator
from .crew import TIMEOUT, Crew, crew, train_losses
from .dist import run_dist, run_on
from .equivalence import LAYOUTS, Job, assert_equivalent, trace
from .recomputation import Counted
from .tolerance import FP32, FP64, assert_close

CPU = torch.device("cpu")


def open_net(model: Model, config: Any, source: Path | None = None) -> Trunk:
    """Return a network on the CPU in fp32, with weights from a folder or random ones."""
    with torch.device("meta"):
        net = model.build(config)
    parallel = apply.parallelize(net, Mesh(CPU), ParallelConfig())
    if source is None:
        apply.initialise(parallel, seed=3)
    else:
        weights.load(net, source, model)
    return net


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter random values far from any special ones (norm scales too).

    Biases are around zero: were all near one, they would drown what tells one token from another.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            middle = 0.0 if name.endswith("bias") else 1.0
            parameter.copy_(middle + 0.3 * noise if noise.dim() == 1 else noise * noise[0].numel() ** -0.5)


needs_accelerator = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="needs an accelerator; none is here"
)


def needs_two_accelerators() -> None:
    """Skip the test, saying how many there are, where there are fewer than two."""
    count = torch.accelerator.device_count()
    if count < 2:
        pytest.skip(f"needs two accelerators, there {'is' if count == 1 else 'are'} {count}")


def _assert_same_losses(spread: list[float], alone: list[float]) -> None:
    assert len(alone) == 4
    assert all(abs(a / b - 1) < 1e-4 for a, b in zip(spread, alone, strict=True)), (spread, alone)


RECORDED: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "mixed": {"precision": "bf16", "recompute": "all"},
    "products kept": {"precision": "bf16-pure", "recompute": "all", "recompute_keep": "products"},
    "compiled": {"precision": "bf16-pure", "compile": True},
}
"""Ways of computing a step that is recorded."""
COMPILED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one-recomputed": (1, {}, {"recompute": "all"}),
    "one-whole": (1, {}, {"compile": "whole"}),
    "dp2-whole": (2, {}, {"compile": "whole"}),
    "dp2-zero3": (2, {"shard": "zero3"}, {}),
}
"""World, layout and changes to the job under which networks are compiled."""
EMULATED = ("tp2-sequence", "pp2", "cp2", "dp2-zero3")
"""Layouts that are also run on emulated NPUs: each kind of communication, and sharding, over two processes."""
needs_emulator = pytest.mark.skipif(
    not npu_emulator.installed(), reason="needs the NPU emulator, which nox -s npu installs"
)


class ModelSuite(ABC):
    """Subclass it as ``TestSuite`` and give the attributes and the four methods below."""

    model: Model
    preset: str = "tiny"
    """The preset the tests use, with changes."""
    variants: tuple[dict[str, Any], ...] = ({},)
    """Changes to the preset to check parity with."""
    spread: dict[str, Any] = {}
    """Changes to the preset so that every layout divides it."""
    layouts: dict[str, tuple[int, dict[str, Any]]] = LAYOUTS
    compiled: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = COMPILED
    bf16: float = 0.05
    """How far apart rounding may bring a gradient in bf16, as a share of its largest element."""
    reference_options: dict[str, Any] = {}
    """What the reference's ``from_pretrained`` needs beside the folder."""
    parameter_counts: dict[str, int] = {}
    """The published parameter count of each preset."""

    @abstractmethod
    def recipe(self, folder: Path, **changes: Any) -> Recipe:
        """Return a recipe that trains the tiny preset on real small data made in ``folder``."""

    @abstractmethod
    def batch(self, config: Any, seed: int) -> Batch:
        """Return a random batch of one size whose loss count depends on the seed."""

    @abstractmethod
    def reference(self, config: Any) -> nn.Module:
        """Return the reference library's network of this configuration."""

    @abstractmethod
    def reference_run(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the reference's output, in the shape of ours, and its loss sum."""

    @abstractmethod
    def outputs(self, net: Trunk, batch: Batch) -> Tensor:
        """Return our network's output for the batch, as ``reference_run`` gives it."""

    # ------------------------------------------------------------------ unit

    def config(self, **changes: Any) -> Any:
        """Return the preset with changes."""
        tiny = self.model.presets[self.preset]
        return type(tiny).model_validate({**tiny.model_dump(), **changes})

    def compiled_batches(self, step: int) -> list[Batch]:
        """Return a step's batches to run compiled networks on: of sizes and kinds that change."""
        return [self.batch(self.config(), 8 * step + i) for i in range(4)]

    def job(self, **changes: Any) -> Job:
        """Return four steps of eight micro-batches of the preset."""
        config = self.config(**self.spread)
        task = self.model.task(self.recipe(Path(".")), config)
        fields: dict[str, Any] = {
            "build": lambda: self.model.build(config),
            "task": task,
            "batches": lambda step: [self.batch(config, 8 * step + i) for i in range(8)],
        }
        return Job(**{**fields, **changes})

    def test_presets_have_their_published_size(self) -> None:
        assert set(self.parameter_counts) == set(self.model.presets)
        for name, count in self.parameter_counts.items():
            with torch.device("meta"):
                net = self.model.build(self.model.presets[name])
            assert sum(p.numel() for p in net.parameters()) == count, name

    def test_every_recipe_is_valid(self) -> None:
        names = recipes.names(self.model.package)
        assert names
        for name in names:
            recipe = self.model.load_recipe(name)
            assert recipe.description, f"{name} says nothing of itself"
            again = recipes.validate(self.model.recipe, json.loads(recipe.model_dump_json()), name)
            assert again == recipe and again.digest() == recipe.digest()
            with torch.device("meta"):
                net = self.model.build(self.model.config(recipe))
            world = recipe.parallel.model
            apply.check(net, recipe.parallel, world)

    def test_every_parameter_learns(self) -> None:
        net, config = open_net(self.model, self.config()), self.config()
        # A layer that starts at zero, as some heads do, would hide all behind it.
        randomise(net)
        task = self.model.task(self.recipe(Path(".")), config)
        batch = self.batch(config, 0)
        task.loss(net(batch), batch).backward()  # type: ignore[arg-type]
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{name} gets no gradient"

    def test_flops_are_those_executed(self) -> None:
        config = self.config()
        task = self.model.task(self.recipe(Path(".")), config)
        batch = self.flops_batch(config)
        net = open_net(self.model, config)
        # The counter knows attention by its products; the fused kernel for CPUs hides them.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            task.loss(net(batch), batch).backward()  # type: ignore[arg-type]
        executed = counter.get_total_flops()
        assert abs(task.work(batch).flops / executed - 1) < 0.1, (task.work(batch).flops, executed)

    def flops_batch(self, config: Any) -> Batch:
        """Return a batch of full-length samples, whose FLOPs ``Task.work`` states."""
        return self.batch(config, 0)

    def test_recomputation_keeps_what_it_is_told_to(self) -> None:
        """Attention and products run once where they are kept, and again where they are not; nothing else changes."""
        job = self.job(steps=1, precision="fp32")
        ran = {}
        for recompute, keep in (("none", "nothing"), ("all", "nothing"), ("all", "attention"), ("all", "products")):
            with Counted() as attention, Counted(ops.PRODUCTS) as products:
                got = trace(replace(job, recompute=recompute, recompute_keep=keep), {})
            ran[recompute, keep] = len(attention.calls), len(products.calls)
            if recompute == "none":
                plain = got
            assert got.losses == plain.losses
            want = {n: p[0][1] for n, p in plain.gradients.items()}
            assert_close({n: p[0][1] for n, p in got.gradients.items()}, want, 0.0)
        once = ran["none", "nothing"]
        assert ran["all", "products"] == once and ran["all", "attention"][0] == once[0]
        assert ran["all", "nothing"][0] == 2 * once[0]
        assert ran["all", "nothing"][1] == ran["all", "attention"][1] > once[1] > 0

    @pytest.mark.parametrize("recompute", ["all", 1])
    def test_recompute_changes_nothing(self, recompute: str | int) -> None:
        runs = 0

        def count(*_: Any) -> None:
            nonlocal runs
            runs += 1

        def build() -> Trunk:
            net = job.build()
            for block in net.blocks:
                block.register_forward_pre_hook(count)
            return net

        job = self.job(steps=1)
        plain = trace(replace(job, build=build), {})
        once, runs = runs, 0
        again = trace(replace(job, build=build, recompute=recompute), {})
        blocks = len(self.model.build(self.config(**self.spread)).blocks)
        assert runs == once * (1 + (blocks if recompute == "all" else 1) / blocks)
        assert plain.losses == again.losses
        want = {n: p[0][1] for n, p in plain.gradients.items()}
        assert_close({n: p[0][1] for n, p in again.gradients.items()}, want, 0.0)

    def test_bf16_keeps_fp32_masters(self) -> None:
        exact, mixed = trace(self.job(precision="fp32"), {}), trace(self.job(precision="bf16"), {})
        assert all(abs(a / b - 1) < 0.02 for a, b in zip(mixed.losses, exact.losses, strict=True))
        assert all(p[0][1].dtype == torch.float32 for p in mixed.parameters.values())
        pure = trace(self.job(precision="bf16-pure"), {})
        assert all(abs(a / b - 1) < 0.05 for a, b in zip(pure.losses, exact.losses, strict=True))
        assert all(p[0][1].dtype == torch.bfloat16 for p in pure.parameters.values())

    def test_resume_equals_an_uninterrupted_run(self, tmp_path: Path) -> None:
        fields: dict[str, Any] = {"steps": 6, "checkpoint": {"every": 3, "keep": 9}}
        recipe = self.recipe(tmp_path, **fields)
        losses = self._train(recipe, tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
        again = self._train(recipe, tmp_path / "cut", resume=True)
        assert len(losses) == 6 and again == losses[3:]

    def _train(self, recipe: Recipe, folder: Path, **options: Any) -> list[float]:
        losses: list[float] = []
        train.run(recipe, self.model, folder, watch=[lambda r: losses.append(r.loss)], **options)
        return losses

    def test_a_deterministic_run_repeats_bit_for_bit(self, tmp_path: Path) -> None:
        recipe = self.recipe(tmp_path, steps=3, deterministic=True)
        try:
            first, second = (self._train(recipe, tmp_path / name) for name in ("a", "b"))
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
        assert first == second

    def test_a_checkpoint_of_another_network_is_refused(self, tmp_path: Path) -> None:
        recipe = self.recipe(tmp_path, steps=1)
        train.run(recipe, self.model, tmp_path / "run")
        info = next((tmp_path / "run" / "checkpoints").glob("*/run.json"))
        info.write_text(info.read_text().replace(f'"model": "{self.model.name}"', '"model": "other"'))
        with pytest.raises(UserError, match="other"):
            train.run(recipe, self.model, tmp_path / "run", resume=True)

    def test_a_run_folder_in_use_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "precious").touch()
        with pytest.raises(UserError, match="--run-dir"):
            train.run(self.recipe(tmp_path, steps=1), self.model, tmp_path / "run")
        assert (tmp_path / "run" / "precious").exists()

    # ---------------------------------------------------------------- parity

    @pytest.mark.parity
    def test_equals_the_reference(self, tmp_path: Path) -> None:
        """Output, loss and every gradient equal the reference library's; weights and gradients pass through files."""
        for number, changes in enumerate(self.variants):
            config = self.config(**changes)
            theirs = self.reference(config)
            randomise(theirs)
            folder = tmp_path / f"weights-{number}"
            theirs.save_pretrained(folder)  # type: ignore[operator]
            net = open_net(self.model, config, folder)
            batch = self.batch(config, 1)
            want, loss = self.reference_run(theirs, batch)
            with torch.no_grad():
                assert_close({"output": self.outputs(net, batch)}, {"output": want}, FP32)
            ours = self.model.task(self.recipe(tmp_path), config).loss(net(batch), batch)  # type: ignore[arg-type]
            assert_close({"loss": ours.detach()}, {"loss": loss.detach()}, FP32)
            ours.backward()
            loss.backward()
            with torch.no_grad():
                for parameter in theirs.parameters():
                    assert parameter.grad is not None
                    parameter.copy_(parameter.grad)
            theirs.save_pretrained(tmp_path / f"gradients-{number}")  # type: ignore[operator]
            gradients = open_net(self.model, config, tmp_path / f"gradients-{number}")
            got = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
            assert_close(got, {n: p.detach() for n, p in gradients.named_parameters()}, FP32)

    @pytest.mark.parity
    def test_an_exported_folder_is_the_reference(self, tmp_path: Path) -> None:
        """Weights saved in the hub layout load into the reference with none missing, and give the same output."""
        config = self.config()
        net = open_net(self.model, config)
        randomise(net, seed=5)
        hub = self.model.layouts[0]
        weights.save(net.named_parameters(), config, hub, tmp_path / "hub")
        kind: Any = type(self.reference(config))
        theirs, report = kind.from_pretrained(tmp_path / "hub", output_loading_info=True, **self.reference_options)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        batch = self.batch(config, 2)
        with torch.no_grad():
            want, _ = self.reference_run(theirs.float(), batch)
            assert_close({"output": self.outputs(net, batch)}, {"output": want}, FP32)

    @pytest.mark.parity
    def test_layouts_round_trip(self, tmp_path: Path) -> None:
        """From each layout to each other and back, every byte of every weight returns."""
        config = self.config()
        net = open_net(self.model, config)
        randomise(net, seed=6)
        want = {n: p.detach().clone() for n, p in net.named_parameters()}
        for one, two in itertools.permutations(self.model.layouts, 2):
            base = tmp_path / f"{one.name}-{two.name}"
            weights.save(net.named_parameters(), config, one, base / "a")
            weights.convert(base / "a", base / "b", self.model, two.name, preset=self.preset)
            weights.convert(base / "b", base / "c", self.model, one.name, preset=self.preset)
            back = open_net(self.model, config, base / "c")
            assert_close({n: p.detach() for n, p in back.named_parameters()}, want, 0.0)

    # ------------------------------------------------------------------ dist

    @pytest.mark.dist
    def test_layouts_equal_one_process(self, layout: str) -> None:
        """Loss, all gradients and four clipped optimizer steps, with token counts that differ between ranks."""
        world, fields = self.layouts[layout]
        assert_equivalent(self.job(), world, fields, FP64)

    @pytest.mark.dist
    def test_recompute_and_bf16_under_every_axis(self) -> None:
        world, fields = self.layouts["tp2-sequence-pp2-dp2-zero3"]
        assert_equivalent(self.job(recompute=1, recompute_keep="products"), world, fields, FP64)
        assert_equivalent(self.job(precision="bf16", steps=1), world, fields, self.bf16, parameters=False)

    @pytest.mark.dist
    def test_compiled_blocks_equal_plain_ones(self, spread_compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The graphs, run as they are: what makes kernels of them is PyTorch's."""
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
        monkeypatch.setattr(apply, "BACKEND", "aot_eager")
        world, fields, changes = self.compiled[spread_compiled]
        job = self.job(**{"batches": self.compiled_batches, "steps": 2, "compile": True, **changes})
        with torch._dynamo.config.patch(disable=False):
            assert_equivalent(job, world, fields, FP64)

    @pytest.mark.dist
    @pytest.mark.parametrize("every", [True, False], ids=["tp2-dp2-zero2", "tp2-pp2-dp2-zero3"])
    def test_resumes_under_other_layouts(self, every: bool, tmp_path: Path) -> None:
        """A run saved under one layout goes on under five others as if it had not stopped; all cuts at once too."""
        saved = (4, {"tp": 2, "shard": "zero2"}) if every else (8, {"tp": 2, "pp": 2, "shard": "zero3"})
        others = [(1, {}), (2, {"pp": 2}), (2, {"tp": 2, "sequence": True}), (4, {"shard": "zero3"}),
                  (4, {"tp": 2, "pp": 2})]  # fmt: skip
        fields: dict[str, Any] = {
            "steps": 4,
            "precision": "fp64",
            "config": self.spread,
            "checkpoint": {"every": 2, "keep": 9},
        }
        recipe = self.recipe(tmp_path, **fields, parallel=saved[1])
        losses = run_dist(self._train, saved[0], recipe, tmp_path / "run")[0]
        for number, (world, layout) in enumerate(others if every else others[2:3]):
            folder = tmp_path / str(number)
            shutil.copytree(tmp_path / "run", folder)
            shutil.rmtree(folder / "checkpoints" / "step-00000004")
            other = self.recipe(tmp_path, **fields, parallel=layout)
            got = run_dist(self._train, world, other, folder, resume=True)[0]
            assert len(got) == 2
            assert all(abs(a - b) <= FP64 * abs(b) for a, b in zip(got, losses[2:], strict=True)), (layout, got, losses)

    # ------------------------------------------------------------------- npu

    @pytest.mark.npu
    @needs_emulator
    def test_emulated_npus_equal_the_cpu(self, emulated: str, tmp_path: Path) -> None:
        """Losses and gradient norms are the CPU's, and a run saved on the NPU goes on there and on the CPU alike."""
        world, layout = {"one": (1, {}), **self.layouts}[emulated]
        start, config = tmp_path / "start", self.config(**self.spread)
        # Each kind of device draws other random weights.
        weights.save(open_net(self.model, config).named_parameters(), config, self.model.layouts[0], start)
        saving = {"every": 2, "keep": 9}
        fields: dict[str, Any] = {"init_from": str(start), "steps": 4, "config": self.spread, "checkpoint": saving}
        here = self.recipe(tmp_path, **fields, parallel=layout)
        there = self.recipe(tmp_path, **fields)
        want = run_on("cpu", self._train_and_clip, 1, there, tmp_path / "cpu")[0]
        got = run_on("npu", self._train_and_clip, world, here, tmp_path / "npu")[0]
        assert len(want) == 4
        _assert_alike(got, want)
        for kind, ranks, recipe in (("npu", world, here), ("cpu", 1, there)):
            folder = tmp_path / f"from-npu-on-{kind}"
            shutil.copytree(tmp_path / "npu", folder)
            shutil.rmtree(folder / "checkpoints" / "step-00000004")
            _assert_alike(run_on(kind, self._train_and_clip, ranks, recipe, folder, resume=True)[0], want[2:])

    def _train_and_clip(self, recipe: Recipe, folder: Path, **options: Any) -> list[tuple[float, float]]:
        out: list[tuple[float, float]] = []
        train.run(
            recipe, self.model, folder, watch=[lambda r: out.append((r.loss, r.grad_norm or math.nan))], **options
        )
        return out

    @pytest.mark.npu
    @needs_emulator
    def test_bf16_and_recomputation_on_an_emulated_npu(self, tmp_path: Path) -> None:
        start, config = tmp_path / "start", self.config(**self.spread)
        weights.save(open_net(self.model, config).named_parameters(), config, self.model.layouts[0], start)
        fields: dict[str, Any] = {"init_from": str(start), "steps": 3, "config": self.spread, "precision": "bf16"}
        fields |= {"recompute": "all", "deterministic": True}
        recipe = self.recipe(tmp_path, **fields)
        want = run_on("cpu", self._train_and_clip, 1, recipe, tmp_path / "cpu")[0]
        got = [run_on("npu", self._train_and_clip, 1, recipe, tmp_path / name)[0] for name in ("one", "two")]
        assert len(want) == 3 and got[0] == got[1]
        assert all(abs(a / b - 1) < 0.02 for (a, _), (b, _) in zip(got[0], want, strict=True)), (got, want)

    @pytest.mark.npu
    @needs_emulator
    def test_the_command_line_trains_on_two_emulated_npus(self, tmp_path: Path) -> None:
        """Through the launcher, with its own processes, in bf16, and with buffers of HCCL as the recipe says."""
        parallel = {"shard": "zero3", "hccl_buffers": {"auto": True, "replicas": 16}}
        losses = self._launch(tmp_path, 2, parallel, precision="bf16", config=self.spread)
        assert len(losses) == 4 and all(0 < loss < 100 for loss in losses)

    # ---------------------------------------------------------------- device

    @pytest.mark.device
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, which tells of waits; it is not here")
    def test_a_step_never_waits_for_the_device(self, tmp_path: Path) -> None:
        session = train.Session(perf.from_random(self.recipe(tmp_path)), self.model, Mesh(devices.pick()))
        session.start()
        session.step()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            session.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.device
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, which records graphs; it is not here")
    @pytest.mark.parametrize("how", RECORDED)
    def test_a_recorded_step_is_the_step(self, how: str, tmp_path: Path) -> None:
        """Losses, norms and weights after six steps, of which the last four are replayed, are the same bit for bit."""
        recipe = self.recipe(tmp_path, deterministic=True, global_batch=4, micro_batch=2, **RECORDED[how])
        found = []
        try:
            for replayed in (False, True):
                changed = recipe.model_copy(update={"cuda_graph": replayed})
                session = train.Session(perf.from_random(changed), self.model, Mesh(devices.pick()), synthetic=True)
                session.start()
                totals = [session.step() for _ in range(6)]
                masters = {name: shard.master.cpu() for name, shard in session.parallel.shards.items()}
                found.append(([each.read() for each in totals], masters))
        finally:
            torch.use_deterministic_algorithms(False)
        assert session.replays is not None and any(session.replays.recorded)
        (want, weights), (got, again) = found
        assert got == want
        assert all(torch.equal(weights[name], again[name]) for name in weights)

    @pytest.mark.device
    @needs_accelerator
    def test_trains_on_the_accelerator(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
    ) -> None:
        """The losses are the CPU's, and a resumed run's are those of one not interrupted, bit for bit."""
        start = tmp_path / "start"
        net = open_net(self.model, self.config())
        weights.save(net.named_parameters(), self.config(), self.model.layouts[0], start)
        saving = {"every": 3, "keep": 9}
        recipe = self.recipe(tmp_path, init_from=str(start), steps=6, checkpoint=saving, deterministic=True)
        try:
            here = self._train(recipe, tmp_path / "here")
            shutil.copytree(tmp_path / "here", tmp_path / "cut")
            shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
            again = self._train(recipe, tmp_path / "cut", resume=True)
        finally:
            torch.use_deterministic_algorithms(False)
        monkeypatch.setenv("MINDSPEED_MODEL_DEVICE", "cpu")
        there = self._train(recipe, tmp_path / "cpu")
        far = max(abs(a / b - 1) for a, b in zip(here, there, strict=True))
        record_property("found", (f"{self.model.name}: six steps beside the CPU", "training", far))
        assert len(here) == 6 and again == here[3:]
        assert all(abs(a / b - 1) < 1e-3 for a, b in zip(here, there, strict=True)), (here, there)

    @pytest.mark.device
    @pytest.mark.parametrize("pair", ["tp2", "tp2-sequence", "pp2", "dp2", "dp2-zero1", "dp2-zero2", "dp2-zero3"])
    def test_two_accelerators_equal_one(
        self, pair: str, tmp_path: Path, record_property: Callable[[str, object], None]
    ) -> None:
        """Two devices train what one trains; processes stay from pair to pair, each has a process group of its own."""
        needs_two_accelerators()
        far = self.assert_pair_equals_one(crew(2), pair, tmp_path)
        record_property("found", (f"{self.model.name}: {pair} beside one device", "training", far))

    @pytest.mark.device
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, which records graphs; it is not here")
    def test_two_replaying_accelerators_equal_one(self, tmp_path: Path) -> None:
        """Replicas that replay their steps train what one device does op by op."""
        needs_two_accelerators()
        alone = self._train(self._pair_recipe(tmp_path, {}), tmp_path / "alone")
        recipe = self._pair_recipe(tmp_path, LAYOUTS["dp2"][1], cuda_graph=True)
        _assert_same_losses(crew(2).run("dp2", train_losses, self.where, recipe, tmp_path / "spread")[0], alone)

    def assert_pair_equals_one(self, two: Crew, pair: str, folder: Path) -> float:
        """Fail unless the crew of two trains under a layout as this process does alone: losses of four steps.

        Return how far the furthest loss is off.
        """
        world, fields = {**LAYOUTS, **self.layouts}[pair]
        assert world == two.world
        alone = self._train(self._pair_recipe(folder, {}), folder / "alone")
        spread = two.run(pair, train_losses, self.where, self._pair_recipe(folder, fields), folder / "spread")[0]
        _assert_same_losses(spread, alone)
        return max(abs(a / b - 1) for a, b in zip(spread, alone, strict=True))

    @pytest.mark.device
    def test_the_command_trains_on_two_accelerators(self, tmp_path: Path) -> None:
        """The command line starts a process per device, and they train what one does."""
        needs_two_accelerators()
        alone = self._train(self._pair_recipe(tmp_path, {}), tmp_path / "alone")
        _assert_same_losses(self._launch(tmp_path, 2, {"shard": "zero3"}), alone)

    def _launch(self, folder: Path, devices: int, parallel: dict[str, Any], **fields: Any) -> list[float]:
        file, run = folder / f"{devices}.yaml", folder / f"run-{devices}"
        file.write_text(self._pair_recipe(folder, parallel, **fields).to_yaml())
        emulated = [npu_emulator.__name__, os.environ[npu_emulator.SITE], "2"] if npu_emulator.installed() else []
        command = [sys.executable, "-m", *emulated, self.model.package, "train", str(file), "--run-dir", str(run)]
        done = subprocess.run([*command, "--nproc", str(devices)], capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr[-3000:]
        return [record["loss"] for record in metrics.read(run)]

    def _pair_recipe(self, folder: Path, parallel: dict[str, Any], **fields: Any) -> Recipe:
        return self.recipe(folder, steps=4, checkpoint={"every": 2}, parallel=parallel, **fields)

    @property
    def where(self) -> str:
        """Return where another process imports the model's record from, as ``package:NAME``."""
        return f"{self.model.package}:MODEL"

    @pytest.mark.device
    @needs_accelerator
    def test_records_a_profile_on_the_accelerator(self, tmp_path: Path) -> None:
        """A window of steps leaves a trace and a memory snapshot, in mixed precision with recomputation."""
        profile = {"start": 2, "stop": 3, "memory": True}
        recipe = self.recipe(tmp_path, steps=4, precision="bf16", recompute="all", profile=profile)
        assert len(self._train(recipe, tmp_path / "run")) == 4
        written = [p.name for p in (tmp_path / "run" / "profile").rglob("*") if p.is_file()]
        # torch_npu's profiler has a name of its own for the trace.
        assert any(".pt.trace.json" in name or name == "trace_view.json" for name in written), written
        assert any("memory" in name for name in written), written


def _assert_alike(got: list[tuple[float, float]], want: list[tuple[float, float]]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert all(abs(x - y) <= 10 * FP32 * abs(y) for x, y in zip(a, b, strict=True)), (got, want)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the layout tests once for each of the suite's layouts; packages import this into their conftest."""
    if metafunc.cls is None:
        return
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize("layout", list(metafunc.cls.layouts))
    if "spread_compiled" in metafunc.fixturenames:
        metafunc.parametrize("spread_compiled", list(metafunc.cls.compiled))
    if "emulated" in metafunc.fixturenames:
        metafunc.parametrize("emulated", ["one", *(name for name in metafunc.cls.layouts if name in EMULATED)])
