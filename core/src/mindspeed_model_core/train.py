"""The training loop: one for every model, every task and every parallel layout."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint, lora, ops, profile, weights
from . import device as devices
from .breakdown import Mark, unmarked
from .data.slots import CONTENT
from .data.tokenizer import keep_tokenizer, recipe_tokenizer
from .errors import UserError
from .estimate import fewest_recomputed
from .metrics import Recorder, StepRecord
from .model import Model
from .optim import AdamW, learning_rate
from .parallel import apply, buffers, pipeline
from .parallel.mesh import Mesh, close_mesh, open_mesh
from .profile import Profiler
from .recipe import Recipe
from .replay import Replays
from .task import Work
from .trunk import Batch
from .weights import adapters
from .weights.source import on_meta

Watch = Callable[[StepRecord], None]


_PATIENCE = 10.0
"""Seconds in which the processes of a killed run may let go of its folder."""


@dataclass(frozen=True)
class Run:
    """How a training run ended: its last step and loss, whether it did all its steps, and the signal that ended it.

    ``loss`` is None when no step was left to do.
    """

    step: int
    loss: float | None
    folder: Path
    finished: bool
    signal: int | None = None


class DataError(UserError):
    """A mistake in the data, met while training; every rank raises it before the step it was meant for."""


class Diverged(UserError):
    """A step whose loss or gradient norm is not finite; every rank raises it, and nothing from there on is saved."""


@dataclass
class _Totals:
    """One step's sums over all processes, on their way from the device to the host."""

    host: Tensor
    ready: Any = None

    def read(self) -> list[float]:
        if self.ready is not None:
            self.ready.synchronize()
        return self.host.tolist()


class Session:
    """A network, its optimizer and its data on this process, advanced one optimizer step at a time."""

    def __init__(self, recipe: Recipe, model: Model, mesh: Mesh, *, synthetic: bool = False) -> None:
        self.recipe, self.model, self.mesh = recipe, model, mesh
        recipe.micro_batches(mesh.dp)
        if recipe.deterministic:
            devices.be_deterministic()
        self.config = model.config(recipe)
        self.task = model.task(recipe, self.config)
        self.number, self.synthetic = 0, synthetic
        open_data = self.task.synthetic if synthetic else self.task.data
        self.loader = open_data(mesh.dp_rank, mesh.dp)
        self.parallel = prepare(recipe, model, mesh)
        self.optimizer = AdamW(self.parallel, recipe.optim)
        self.replays = Replays(self.parallel, self.task.loss) if recipe.cuda_graph else None
        self.signal: int | None = None
        self._batches: Iterator[list[Batch]] | None = None
        self._position: dict[str, Any] | None = None

    def start(self) -> None:
        """Give the network its first weights: from ``init_from``, or random."""
        recipe, shards = self.recipe, self.parallel.shards
        self._start_base()
        if recipe.lora is None:
            return
        if recipe.lora.init_from is None:
            apply.initialise(self.parallel, recipe.seed, of=lora.is_factor)
        else:
            adapters.load(shards, recipe.lora.init_from, self.model, self.config, recipe.lora)

    def _start_base(self) -> None:
        recipe, shards = self.recipe, self.parallel.shards
        if recipe.init_from is None:
            if not self.synthetic:
                _check_base(recipe)
            apply.initialise(self.parallel, recipe.seed, of=lambda name: not lora.is_factor(name))
            return
        weights.load(
            self.parallel.net,
            Path(recipe.init_from),
            self.model,
            tp_rank=self.mesh.tp_rank,
            tp=self.mesh.tp,
            write=lambda name, tensor: shards[name].write(tensor),
        )

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint saved under any layout; what adapters adapt is read from ``init_from`` again."""
        if self.recipe.lora is not None:
            self._start_base()
        info = checkpoint.load(path, self.parallel.shards, self.optimizer, self.mesh)
        position, content = info["data"], self.loader.state_dict().get(CONTENT)
        if info.get("mend") is not None and position.get(CONTENT, content) != content:
            position = {**position, CONTENT: content}
            if self.mesh.rank == 0:
                print(f"{path}: the run stopped at {info['mend']}; it goes on with data mended since", file=sys.stderr)
        self.loader.load_state_dict(position)
        self.number = int(info["step"])

    def step(self, mark: Mark = unmarked) -> _Totals:
        """Do one optimizer step; return its loss sum, count, work and gradient norm without waiting for the device.

        ``mark`` is told where each phase begins.
        """
        recipe, mesh, task = self.recipe, self.mesh, self.task
        mark("data")
        torch.manual_seed(_stream(recipe.seed, self.number + 1, mesh.dp_rank))
        batches, terms = self._draw()
        self.number += 1
        count = torch.full((), float(terms), device=mesh.device)
        work = sum((task.work(batch) for batch in batches), Work(0, 0, 0.0))
        with ops.at_level(recipe.optimization_level):
            batches = [self._encoded(batch, mark) for batch in batches]
            loss = pipeline.run(self.parallel, batches, task.loss, count, mark, self.replays)
            mark("reduction")
            self.parallel.gradients.reduce()
            mark("optimizer")
            norm = self.optimizer.step(learning_rate(recipe.optim, self.number, recipe.steps))
        self.parallel.gradients.clear()
        return self._totals(loss, count, norm, work)

    def _encoded(self, batch: Batch, mark: Mark) -> Batch:
        mark("data")
        held = _to(batch, self.mesh.device)
        mark("encode")
        return self.task.encode(held)

    def _draw(self) -> tuple[list[Batch], int]:
        """Return the next step's micro-batches and how many loss terms all data ranks have; 1 where there are none."""
        mesh, before = self.mesh, self.loader.state_dict()
        batches: list[Batch] = []
        mistake = None
        try:
            if self._batches is None:
                self._batches = iter(self.loader)
            batches = next(self._batches)
        except UserError as error:
            mistake = str(error)
        count = sum(self.task.count(batch) for batch in batches)
        if mesh.groups:
            # On the host, so that the device's queue never empties for it; the other ranks repeat their data rank's.
            mine = count if mesh.draws else 0
            drawn = _number(json.dumps(self.loader.state_dict())) >> 16
            # Adds up to 0 over the ranks of a batch if they drew the same.
            odd = drawn * (mesh.model - 1 if mesh.draws else -1)
            sums = torch.tensor([mine, int(mistake is not None), odd])
            dist.all_reduce(sums, group=mesh.host_group)
            count = int(sums[0])
            if sums[1]:
                mistake = next(said for said in mesh.gather(mistake) if said is not None)
            elif sums[2]:
                mistake = _apart(mesh.gather((mesh.dp_rank, drawn)))
        if mistake is not None:
            self._position = before
            raise DataError(mistake)
        return batches, max(count, 1)

    def _totals(self, loss: Tensor, count: Tensor, norm: Tensor, work: Work) -> _Totals:
        """Add up over processes what each saw of the step; count, norm and the wish to stop are spread alike."""
        mesh = self.mesh
        dtype = torch.float64 if mesh.device.type == "cpu" else torch.float32
        mine = [work.samples, work.units, work.flops] if mesh.reports else [0.0, 0.0, 0.0]
        host = torch.tensor([*mine, float(self.signal is not None)], dtype=dtype).to(mesh.device, non_blocking=True)
        vector = torch.cat(((loss if mesh.reports else torch.zeros_like(loss)).to(dtype)[None], host))
        if mesh.groups:
            dist.all_reduce(vector)
        vector = torch.cat((vector, count.to(dtype)[None], norm.to(dtype)[None]))
        if mesh.device.type == "cpu":
            return _Totals(vector)
        out = torch.empty(vector.shape, dtype=dtype, pin_memory=True)
        out.copy_(vector, non_blocking=True)
        event = devices.module(mesh.device).Event()
        event.record()
        return _Totals(out, event)

    def info(self) -> dict[str, Any]:
        """Return what a checkpoint says of itself beside the tensors; the same on every rank."""
        position: dict[str, Any] = {}
        for part in self.mesh.gather(self._position or self.loader.state_dict()):
            position = _merge(position, part)
        return {
            "model": self.model.name,
            "config": self.config.model_dump(mode="json"),
            "recipe": self.recipe.model_dump(mode="json"),
            "digest": self.recipe.digest(),
            "data": position,
        }


def prepare(recipe: Recipe, model: Model, mesh: Mesh) -> apply.Parallel:
    """Build the recipe's network on meta and make this process's part of it; values are still to be written."""
    with torch.device("meta"):
        net = model.build(model.config(recipe))
    if recipe.lora is not None:
        lora.attach(net, recipe.lora)
    return apply.parallelize(
        net,
        mesh,
        recipe.parallel,
        precision=recipe.precision,
        recompute=_fitting(recipe, model, mesh) if recipe.recompute == "auto" else recipe.recompute,
        recompute_keep=recipe.recompute_keep,
        compile=recipe.compile,
    )


def _fitting(recipe: Recipe, model: Model, mesh: Mesh) -> int:
    """Return the fewest blocks to recompute that fit on every rank, and say so."""
    free = min(mesh.gather(devices.free_memory(mesh.device)))
    count, needed = fewest_recomputed(recipe, model, mesh.world, free)
    if mesh.rank == 0:
        stage = " of each stage" if mesh.pp > 1 else ""
        needs = f"about {needed / 2**30:.1f} GiB of the {free / 2**30:.1f} that are free"
        if needed > free:
            less = "recompute_keep=nothing, " if recipe.recompute_keep != "nothing" else ""
            needs += f"; that is too much: try {less}a smaller micro_batch, or more devices to shard over"
        print(f"recompute=auto: {count} blocks{stage}, which needs {needs}", file=sys.stderr)
    return count


def run(recipe: Recipe, model: Model, run_dir: Path | str, *, resume: bool = False, watch: Sequence[Watch] = ()) -> Run:
    """Train to the recipe's last step, or until SIGTERM or SIGINT; everything is written below ``run_dir``.

    ``watch`` functions see each step's record on rank 0 and cannot change the run. Raises UserError for a run folder
    in use (unless ``resume``), one that not all ranks share, a checkpoint of another model, and whatever is wrong with
    recipe, data or weights; nothing is written or changed before the first step is done. A mistake in the data met
    later saves before it ends; a loss or gradient norm that is not finite ends the run with what was saved before it.
    """
    mesh = open_mesh(recipe.parallel, buffers=buffers.sizes(recipe, model))
    _check_profile(recipe, mesh.world)
    done = _run(recipe, model, mesh, Path(run_dir), resume, watch)
    # Not after an error: the other ranks may be anywhere, and leaving the group would wait for them.
    close_mesh(mesh)
    return done


def _run(recipe: Recipe, model: Model, mesh: Mesh, folder: Path, resume: bool, watch: Sequence[Watch]) -> Run:
    with _claim(folder) if mesh.rank == 0 else contextlib.nullcontext():
        start = starting_point(folder, resume, recipe, model)
        _check_shared(folder, start, mesh)
        if start is not None and checkpoint.step_of(start) >= recipe.steps:
            return Run(checkpoint.step_of(start), None, folder, finished=True)
        session = Session(recipe, model, mesh)
        if start is None:
            session.start()
        else:
            session.resume(start)
        mesh.barrier()
        return _train(session, folder, resume, watch)


def _train(session: Session, folder: Path, resume: bool, watch: Sequence[Watch]) -> Run:
    recipe, mesh = session.recipe, session.mesh
    saver = checkpoint.Checkpointer(
        folder / checkpoint.FOLDER, mesh, keep=recipe.checkpoint.keep, background=recipe.checkpoint.background
    )
    recorder = Recorder(
        folder,
        recipe,
        rank=mesh.rank,
        resume_step=session.number if resume else None,
        unit=session.task.unit,
        device=mesh.device,
        devices_used=mesh.world,
    )
    report = _Report(session, recorder, list(watch))
    late = mesh.device.type != "cpu"
    begun = saved = session.number
    stop = False

    def save(*, wait: bool = False) -> None:
        """Save, once the last step is known to be sound and its record, which a resumed run keeps, is written."""
        nonlocal saved, stop
        stop = report.flush() or stop
        if saved != session.number:
            recorder.flush()
            saver.save(session.number, session.parallel.shards, session.optimizer, session.info(), wait=wait)
            saved = session.number

    with (
        saver,
        _on_signals(session),
        recorder,
        Profiler(recipe.profile, folder, mesh.rank, mesh.device) as profiler,
        _naming_what_is_left(saver),
    ):
        try:
            while session.number < recipe.steps and not stop:
                with profiler.step(session.number + 1):
                    totals = session.step()
                if session.number == begun + 1 and mesh.rank == 0:
                    # The folder first: a run without it has lost its checkpoints, one with it had none yet.
                    (folder / checkpoint.FOLDER).mkdir(exist_ok=True)
                    checkpoint.write_text(folder / "recipe.yaml", recipe.to_yaml())
                    if (words := recipe_tokenizer(recipe.model_dump())) is not None:
                        keep_tokenizer(words, folder)
                stop = report.take(session.number, totals, late=late)
                saver.check()
                if recipe.checkpoint.every and session.number % recipe.checkpoint.every == 0:
                    save()
            save(wait=True)
            saver.wait()
        except DataError as error:
            if session.number == 0:
                raise
            save(wait=True)
            saver.mark(session.number, str(error))
            raise UserError(f"{error}; step {session.number} is saved: mend it and continue with --resume") from None
    finished = session.number >= recipe.steps
    return Run(session.number, report.loss, folder, finished, None if finished else session.signal)


@contextlib.contextmanager
def _naming_what_is_left(saver: checkpoint.Checkpointer) -> Iterator[None]:
    """Add the newest checkpoint, which is from before, to what is said of a run that diverged."""
    try:
        yield
    except Diverged as error:
        saver.wait()
        left = checkpoint.steps(saver.folder)
        raise UserError(f"{error}; {f'the newest checkpoint is {left[-1]}' if left else 'none was saved'}") from None


@contextlib.contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """Hold a run's folder alone, and leave none behind into which nothing was written."""
    _check_folder(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_shared(folder: Path, start: Path | None, mesh: Mesh) -> None:
    """Raise UserError, the same on all ranks, unless all see rank 0's folder and would start from one checkpoint."""
    if not mesh.groups:
        return
    # All have looked at the folder by now: a file in it disturbs nobody.
    sign = folder / mesh.gather(f".shared-{secrets.token_hex(8)}")[0]
    if mesh.rank == 0:
        sign.touch()
    here = f"host {socket.gethostname()}, folder {folder.absolute()}"
    try:
        places = mesh.gather((here, _appears(sign), start and start.name))
    finally:
        if mesh.rank == 0:
            sign.unlink(missing_ok=True)
    first = places[0]
    for rank, (place, sees, newest) in enumerate(places):
        if not sees:
            raise UserError(
                f"--run-dir: rank {rank} ({place}) does not see the run folder of rank 0 ({first[0]}); name a folder "
                "on a file system that all hosts share"
            )
        if newest != first[2]:
            raise UserError(
                f"--run-dir: rank {rank} ({place}) would start from {newest or 'the beginning'}, rank 0 from "
                f"{first[2] or 'the beginning'}; the file system is behind on one host: try again"
            )


def _appears(file: Path) -> bool:
    """Whether a file is here, or comes within the patience: network file systems show new files late."""
    end = time.monotonic() + _PATIENCE
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
        for parent in (file.parent.parent, file.parent):
            with contextlib.suppress(OSError):
                os.listdir(parent)  # makes NFS ask the server again
    return True


def _lock(handle: int, folder: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise UserError(
                    f"{folder}: another process is training into it; wait for it, or name another folder with --run-dir"
                ) from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return


@dataclass
class _Report:
    """Turns each step's totals into a record; on accelerators one step late, so that the host never waits."""

    session: Session
    recorder: Recorder
    watch: list[Watch]
    loss: float | None = None
    pending: tuple[int, _Totals] | None = None
    clock: float = field(default_factory=time.perf_counter)

    def take(self, number: int, totals: _Totals, *, late: bool) -> bool:
        """Hand over a step; return whether a step already read asks to stop."""
        before, self.pending = self.pending, (number, totals)
        if not late:
            return self.flush()
        return before is not None and self._tell(*before)

    def flush(self) -> bool:
        """Report the step still held back."""
        held, self.pending = self.pending, None
        return held is not None and self._tell(*held)

    def _tell(self, number: int, totals: _Totals) -> bool:
        loss, samples, units, flops, stop, count, norm = totals.read()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.loss = loss / count
        recipe = self.session.recipe
        record = StepRecord(
            step=number,
            loss=self.loss,
            grad_norm=norm,
            lr=learning_rate(recipe.optim, number, recipe.steps),
            work=Work(round(samples), round(units), flops),
            seconds=seconds,
            memory=devices.peak_memory(self.session.mesh.device),
        )
        self.recorder.step(record)
        if self.session.mesh.rank == 0:
            for observe in self.watch:
                observe(record)
        if not (math.isfinite(self.loss) and math.isfinite(norm)):
            raise Diverged(
                f"step {number}: the loss is {self.loss:.6g} and the gradient norm {norm:.6g}, the run has "
                "diverged; lower optim.lr, or look at the data of that step"
            )
        return stop > 0


def starting_point(folder: Path, resume: bool, recipe: Recipe, model: Model) -> Path | None:
    """Return the checkpoint a run would resume from, or None to start afresh; nothing is loaded or written.

    UserError for a folder in use (unless ``resume``), a checkpoint of another network, seed, precision, batch, base or
    form of adapters, and an ``init_from`` that is not this network's.
    """
    _check_folder(folder)
    found = checkpoint.steps(folder / checkpoint.FOLDER)
    if resume and not found:
        _check_unsaved(folder)
    if not resume and folder.exists() and any(folder.iterdir()):
        if found or (folder / "recipe.yaml").exists():
            raise UserError(
                f"{folder}: already holds a run; continue it with --resume, or name another folder with --run-dir"
            )
        raise UserError(f"{folder}: is not empty and holds no run; name a new folder with --run-dir")
    if recipe.lora is not None:
        _check_base(recipe)
        lora.targets(on_meta(model.build, model.config(recipe)), recipe.lora)
    if not resume or not found:
        if recipe.lora is not None and recipe.lora.init_from is not None:
            source = Path(recipe.lora.init_from).expanduser()
            if not source.is_file():
                source = weights.check_folder(recipe.lora.init_from, "lora.init_from=")
            adapters.check_source(source, model, model.config(recipe), recipe.lora)
        if recipe.init_from is not None:
            weights.check_source(weights.check_folder(recipe.init_from, "init_from="), model, model.config(recipe))
        return None
    last = found[-1]
    info = checkpoint.read_info(last)
    if info["model"] != model.name:
        raise UserError(f"{last}: is a checkpoint of model {info['model']!r}, the recipe trains {model.name!r}")
    for key, value in model.config(recipe).model_dump(mode="json").items():
        saved = info["config"].get(key)
        if saved != value:
            raise UserError(f"{last}: config.{key} is {saved!r} in the checkpoint and {value!r} in the recipe")
    for key in ("seed", "precision", "global_batch"):
        saved, now = info["recipe"][key], getattr(recipe, key)
        if saved != now:
            raise UserError(
                f"{key}={now}: the run was saved with {saved}; resume with that, or begin another run from its weights "
                f"with init_from={last}"
            )
    _check_kept(last, info["recipe"], recipe)
    return last


def _check_unsaved(folder: Path) -> None:
    """Raise UserError unless a folder without checkpoints is new, or that of a run that ended before its first save."""
    own = {checkpoint.FOLDER, profile.FOLDER, profile.SWITCH}
    there = [p.name for p in folder.iterdir()] if folder.exists() else []
    held = sorted(name for name in there if name not in own and not name.startswith("."))
    if not held:
        return
    named = ", ".join(held[:5]) + (", ..." if len(held) > 5 else "")
    if "recipe.yaml" not in held:
        raise UserError(
            f"{folder}: holds no run to resume, but {named}; name a run's folder, or a new one, with --run-dir"
        )
    if checkpoint.FOLDER not in there:
        raise UserError(
            f"{folder}: holds {named}, but its folder {checkpoint.FOLDER} is missing; put that back to resume, or "
            "begin anew in another folder with --run-dir"
        )


def _check_base(recipe: Recipe) -> None:
    if recipe.lora is not None and recipe.init_from is None:
        raise UserError("init_from: lora trains adapters of given weights; name their folder with init_from=FOLDER")


def _check_kept(last: Path, saved: dict[str, Any], recipe: Recipe) -> None:
    """Raise UserError unless a checkpoint holds what the recipe trains: all weights or adapters, average or none."""
    before, now = saved.get("lora"), recipe.lora
    if (before is None) != (now is None):
        held, wanted = ("whole weights", "adapters") if before is None else ("adapters", "whole weights")
        raise UserError(f"{last}: holds {held}, the recipe trains {wanted} (lora); name another folder with --run-dir")
    if before is not None and now is not None:
        for key, value in now.model_dump(mode="json", include={"rank", "alpha", "targets"}).items():
            if before.get(key) != value:
                raise UserError(f"lora.{key}={value}: the run was saved with {before.get(key)}; resume with that")
        if saved.get("init_from") != recipe.init_from:
            raise UserError(
                f"init_from={recipe.init_from}: the run adapts {saved.get('init_from')}; resume with that, or begin "
                f"another run with lora.init_from={last}"
            )
    average = (saved.get("optim") or {}).get("ema")
    if (average is None) != (recipe.optim.ema is None):
        held = "no moving average" if average is None else f"a moving average of decay {average}"
        value = "null" if recipe.optim.ema is None else recipe.optim.ema
        raise UserError(
            f"optim.ema={value}: {last} holds {held}; resume with optim.ema={'null' if average is None else average}"
        )


def _check_folder(folder: Path) -> None:
    for part in (folder, *folder.parents):
        if os.path.lexists(part) and not part.is_dir():
            kind = "a link to nothing" if part.is_symlink() and not part.exists() else "a file"
            raise UserError(f"--run-dir={folder}: {part} is {kind}; name a folder")


def _check_profile(recipe: Recipe, world: int) -> None:
    profile = recipe.profile
    beyond = [rank for rank in profile.ranks if rank >= world]
    if profile.start is not None and beyond:
        raise UserError(
            f"profile.ranks={list(profile.ranks)}: there is no rank {beyond[0]} among {world} processes; "
            f"nearest: {world - 1}"
        )


class _on_signals:
    """Ask the session to save and stop on SIGTERM and SIGINT, inside a block; a second SIGINT ends at once."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        with contextlib.suppress(ValueError):  # not in the main thread: the caller's handlers stay
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._ask)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == self.session.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self.session.mesh.rank == 0:
            os.write(2, b"\nsaving after this step; interrupt again to end without\n")
        self.session.signal = number


def _stream(seed: int, step: int, rank: int) -> int:
    """Return the seed of one step on one data rank: random state is a function of the position, never saved."""
    return _number(f"{seed}/{step}/{rank}")


def _number(text: str) -> int:
    """Return 56 bits that follow from a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _apart(drawn: Sequence[tuple[int, int]]) -> str:
    """Return the mistake of ranks whose (data rank, number of what was drawn) should be alike and are not."""
    first: dict[int, tuple[int, int]] = {}
    for rank, (data_rank, number) in enumerate(drawn):
        before, same = first.setdefault(data_rank, (rank, number))
        if number != same:
            return (
                f"data: ranks {before} and {rank} share a batch but drew different samples: one of them left out a "
                "file that the other can read, as said when it was skipped; make it readable on all hosts, or remove it"
            )
    raise AssertionError("all drew the same")


def _to(batch: Batch, device: torch.device) -> Batch:
    return {key: devices.send(value, device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _merge(into: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    out = dict(into)
    for key, value in part.items():
        out[key] = _merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out
