"""Saves a run so that it resumes exactly, under any parallel layout, whatever kills it.

A checkpoint is a folder ``step-00000010`` of PyTorch's distributed checkpoint format, plus ``run.json``. It is written
under a temporary name and renamed when every rank is done, so a folder with the final name is complete. Values are
the fp32 masters, moments and moving averages, named and laid out as whole parameters; each rank writes the
rectangles it holds. What is frozen stays where the run had it from: a run of adapters holds adapters alone.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import ConfigDict, NonNegativeInt
from torch import Tensor

from .errors import UserError
from .optim import AdamW
from .parallel.mesh import Mesh
from .parallel.shard import Shard
from .recipe import Section, validate

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

    from .dcp import Rectangles

FOLDER, RUN_FILE = "checkpoints", "run.json"


def _state(shards: dict[str, Shard], optimizer: AdamW, *, to_write: bool = False) -> dict[str, Rectangles]:
    """Return what this process holds; of what several hold alike, ``to_write`` keeps its share."""
    from .dcp import Rectangles

    mine = [s for s in shards.values() if s.trainable and (s.writes or not to_write)]
    out = {f"model.{s.name}": Rectangles(s.master, s) for s in mine}
    averages = {} if optimizer.average is None else optimizer.average.values()
    out |= {f"ema.{s.name}": Rectangles(averages[s.name], s) for s in mine if averages}
    for shard in mine:
        for key, value in optimizer.moments(shard).items():
            out[f"optim.{shard.name}.{key}"] = Rectangles(value, shard)
    return out


class Checkpointer:
    """Writes checkpoints of one run, in the background if asked, and keeps the newest few."""

    def __init__(self, folder: Path, mesh: Mesh, *, keep: int, background: bool) -> None:
        self.folder, self.mesh, self.keep, self.background = folder, mesh, keep, background
        self.group = dist.new_group(backend="gloo") if mesh.groups else None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        if mesh.rank == 0:
            for torn in folder.glob(".step-*.tmp"):
                shutil.rmtree(torn)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """When the run has failed, give a save that is under way a last chance to end."""
        if kind is not None and self.thread is not None:
            self.thread.join(30.0)

    def save(
        self, step: int, shards: dict[str, Shard], optimizer: AdamW, info: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Save the state as of now as step ``step``; training may change it as soon as this returns.

        Waits for an earlier save. Raises UserError when that one, or with ``wait`` this one, could not be written.
        """
        self.wait()
        state = {key: value.copied() for key, value in _state(shards, optimizer, to_write=True).items()}
        final = self.folder / f"step-{step:08d}"

        def write() -> None:
            try:
                self._write(final, state, {**info, "step": step})
            except BaseException as error:
                self.error = error

        if self.background and not wait:
            self.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
            self.thread.start()
        else:
            write()
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written; raise UserError if it failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error is not None:
            from .dcp import reason

            left = steps(self.folder)
            kept = f"{left[-1].name} is intact" if left else "there is none yet"
            raise UserError(f"checkpoint in {self.folder} was not written: {reason(error)}; {kept}")

    def check(self) -> None:
        """Raise UserError if a save in the background has failed; never waits."""
        if self.error is not None:
            self.wait()

    def mark(self, step: int, mistake: str) -> None:
        """Note in step ``step``'s ``run.json`` that the data must be mended; returns on all ranks when it is there."""
        self.wait()
        if self.mesh.rank == 0:
            path = self.folder / f"step-{step:08d}"
            write_text(path / RUN_FILE, json.dumps({**read_info(path), "mend": mistake}, indent=1))
        self.mesh.barrier()

    def _write(self, final: Path, state: dict[str, Any], info: dict[str, Any]) -> None:
        from . import dcp

        temporary = final.with_name(f".{final.name}.tmp")
        first = self.mesh.rank == 0
        try:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            self._barrier()
            dcp.save(state, temporary, self.group)
            if first:
                # Every rank is done, but what another host wrote may not be in this folder.
                dcp.check_files(temporary, dcp.read_metadata(temporary))
                write_text(temporary / RUN_FILE, json.dumps(info, indent=1))
                if final.exists():
                    shutil.rmtree(final)
                os.replace(temporary, final)
                _sync_folder(final.parent)
                for old in steps(self.folder)[: -self.keep]:
                    shutil.rmtree(old)
        except BaseException:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._barrier()

    def _barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def steps(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    named = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()] if folder.is_dir() else []
    return sorted((p for p in named if (p / RUN_FILE).is_file()), key=step_of)


def step_of(path: Path) -> int:
    """Return the step a checkpoint was saved at."""
    return int(path.name.removeprefix("step-"))


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint folder, or a run's folder that holds one."""
    return (path / RUN_FILE).is_file() or bool(steps(path / FOLDER))


def locate(path: Path) -> Path:
    """Return the checkpoint at ``path``: itself, or the newest of a run's folder."""
    if (path / RUN_FILE).is_file():
        return path
    found = steps(path / FOLDER)
    if not found:
        raise UserError(f"{path}: neither a checkpoint nor a run's folder with one in {FOLDER}/")
    return found[-1]


class _Saved(Section):
    """What is read of a saved recipe whatever its model; the rest is the model's."""

    model_config = ConfigDict(extra="allow")

    seed: int
    precision: str
    global_batch: int
    init_from: str | None = None
    lora: dict[str, Any] | None = None
    optim: dict[str, Any] = {}
    data: dict[str, Any] = {}


class _Info(Section):
    """The form of ``run.json``; ``mend`` is the mistake in the data that ended the run here."""

    model_config = ConfigDict(extra="allow")

    model: str
    config: dict[str, Any]
    recipe: _Saved
    digest: str
    step: NonNegativeInt
    data: dict[str, Any]
    mend: str | None = None


def read_info(path: Path) -> dict[str, Any]:
    """Return what ``run.json`` says of a checkpoint: model, config, recipe, digest, step, data position.

    UserError naming the file and the field when it is damaged or of another form.
    """
    file = path / RUN_FILE
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(info, dict):
        raise UserError(f"{file}: holds a {type(info).__name__}, expected an object")
    validate(_Info, info, str(file))
    return info


def load(path: Path, shards: dict[str, Shard], optimizer: AdamW, mesh: Mesh) -> dict[str, Any]:
    """Fill masters, moments and parameters from a checkpoint saved under any layout; return its ``run.json``."""
    from . import dcp

    info = read_info(path)
    dcp.load(_state(shards, optimizer), path, mesh.host_group)
    with torch.no_grad():
        for shard in shards.values():
            shard.publish()
    optimizer.resume(int(info["step"]))
    return info


@dataclass
class Weights:
    """The whole parameters of a checkpoint, or with ``kind="ema"`` their moving averages, read one at a time."""

    path: Path
    info: dict[str, Any]
    metadata: Metadata
    kind: str = "model"

    @property
    def config(self) -> dict[str, Any]:
        """Return the network's configuration."""
        return self.info["config"]

    def names(self) -> list[str]:
        """Return the parameters' names."""
        start = f"{self.kind}."
        return [key.removeprefix(start) for key in self.metadata.state_dict_metadata if key.startswith(start)]

    def shape(self, name: str) -> torch.Size:
        """Return a parameter's whole shape."""
        return self.metadata.state_dict_metadata[f"{self.kind}.{name}"].size  # type: ignore[union-attr]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype a parameter was saved in: its master's."""
        return self.metadata.state_dict_metadata[f"{self.kind}.{name}"].properties.dtype  # type: ignore[union-attr]

    def read(self, name: str) -> Tensor:
        """Return a whole parameter in the dtype it was saved in."""
        from . import dcp

        return dcp.load_whole(f"{self.kind}.{name}", self.path, self.metadata)


def open_weights(path: Path, *, ema: bool = False) -> Weights:
    """Open the weights of a checkpoint folder, or of the newest checkpoint in a run's folder.

    With ``ema`` their moving average; UserError if the run kept none.
    """
    from . import dcp

    path = locate(path)
    weights = Weights(path, read_info(path), dcp.read_metadata(path), "ema" if ema else "model")
    if ema and not weights.names():
        raise UserError(f"{path}: holds no moving average; the run was trained without optim.ema")
    return weights
