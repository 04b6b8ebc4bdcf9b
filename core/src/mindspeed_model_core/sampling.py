"""What any sampler needs that puts a network into one of diffusers' pipelines: on one device or spread over several."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import nn

from . import checkpoint, launch, weights
from .errors import UserError
from .files import read_json
from .frozen import check_parts, has_parts
from .model import Model
from .parallel import apply
from .parallel.mesh import Mesh, close_mesh, launched, open_mesh
from .recipe import ParallelConfig
from .trunk import Trunk

Source = Annotated[
    Path, typer.Argument(metavar="SRC", help="A hub folder, an original release or a run's folder or checkpoint.")
]
Steps = Annotated[int, typer.Option(metavar="N", min=1, help="Steps of the solver.")]
Guidance = Annotated[float, typer.Option(metavar="G", help="Weight of the prompt, to 100; 1: no guidance.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=2**63 - 1, help="The same seed gives the same sample.")]
DType = Annotated[str | None, typer.Option(metavar="T", help=r"bf16 or fp32.  \[default: bf16, on CPU fp32]")]
Tp = Annotated[int, typer.Option(metavar="N", min=1, help="Devices that share the network.")]
Cp = Annotated[int, typer.Option(metavar="N", min=1, help="Devices that share the tokens.")]
Ema = Annotated[bool, typer.Option("--ema", help="Sample from the run's moving average (optim.ema).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")]


class Denoiser(nn.Module):
    """A network as diffusers' pipelines call theirs; tensor and context parallelism stay inside.

    ``config`` is what the pipeline reads of it. A model gives ``forward`` in the pipeline's words.
    """

    def __init__(self, net: Trunk, **config: Any) -> None:
        super().__init__()
        self.net, self.config = net, SimpleNamespace(**config)

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return next(self.net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Return the weights' type."""
        return next(self.net.parameters()).dtype

    def cache_context(self, *_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing: no results are kept from one step to the next."""
        return contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------ what goes along


def places(source: Path) -> list[Path]:
    """Return the folders that may hold what goes with weights: theirs and the one above, or those of a run's recipe."""
    recipe = recipe_of(source)
    if recipe is None:
        return [source, source.absolute().parent]
    return [Path(p).expanduser() for p in (recipe["data"].get("encoders"), recipe.get("init_from")) if p]


def recipe_of(source: Path) -> dict[str, Any] | None:
    """Return the recipe of a run's folder or checkpoint; None for weights of another kind."""
    return checkpoint.read_info(checkpoint.locate(source))["recipe"] if checkpoint.is_checkpoint(source) else None


def find_encoders(source: Path, given: Path | None, needed: Sequence[str]) -> Path:
    """Return the folder of the frozen parts: given, beside the weights, or where a run's recipe found them."""
    if given is not None:
        check_parts(given, needed, "--encoders=")
        return given
    for place in places(source):
        if has_parts(place, needed):
            return place
    *some, last = (f"{name}/" for name in needed)
    raise UserError(f"{source}: no {', '.join(some)} and {last} there; name their folder with --encoders")


def find_scheduler(source: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the file that describes the scheduler which goes with weights, and what it says; None: there is none."""
    for place in places(source):
        path = place / "scheduler" / "scheduler_config.json"
        if path.is_file():
            return path, read_json(path)
    return None


# ------------------------------------------------------------------------------------------------ devices


def check_range(option: str, value: float, low: float, high: float) -> None:
    """Raise UserError, naming the nearest valid value, unless a number is from ``low`` to ``high``."""
    if not low <= value <= high:
        raise UserError(
            f"{option}={value:g}: must be from {low:g} to {high:g}; nearest: {high if value > high else low:g}"
        )


def check_options(out: Path, suffixes: Sequence[str], overwrite: bool, dtype: str | None) -> None:
    """Raise UserError unless a sample can be written to ``out`` and ``dtype`` is one a network computes in."""
    if out.suffix not in suffixes:
        raise UserError(f"--out={out}: samples are written as {' or '.join(suffixes)}")
    if dtype not in (None, "bf16", "fp32"):
        raise UserError(f"--dtype={dtype}: must be bf16 or fp32")
    if os.path.isdir(out):
        raise UserError(f"--out={out}: is a folder; name a file")
    if os.path.lexists(out) and not overwrite:
        raise UserError(f"--out={out}: exists; choose another name, or replace it with --overwrite")
    place = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    if not place.is_dir():
        raise UserError(f"--out={out}: {place} is not a folder")
    try:
        # A file as the sample's draft will be; the folders that are missing are made once there is a sample.
        with tempfile.NamedTemporaryFile(dir=place, prefix=f".{out.name}."):
            pass
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def open_devices(tp: int, cp: int) -> Iterator[Mesh]:
    """Give the mesh of the devices one sample is spread over; starts the processes, and exits, if they are not yet."""
    if tp * cp > 1 and not launched():
        raise typer.Exit(launch.spawn(tp * cp, launch.command_without_nproc()))
    mesh = open_mesh(ParallelConfig(tp=tp, cp=cp))
    if mesh.dp > 1:
        raise UserError(f"{mesh.world} processes for --tp {tp} x --cp {cp}: one sample is spread over {tp * cp}")
    yield mesh
    close_mesh(mesh)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the type to compute in: that asked for, else bf16, on CPU fp32."""
    return torch.bfloat16 if name == "bf16" or (name is None and device.type != "cpu") else torch.float32


def load_network(source: Path, model: Model, mesh: Mesh, dtype: torch.dtype, *, ema: bool = False) -> Any:
    """Return the network of a hub folder, an original release or a run, spread over ``mesh``, ready to sample.

    With ``ema`` its weights are the run's moving average.
    """
    config = weights.read_config(source, model, ema=ema)
    with torch.device("meta"):
        net = model.build(config)
    precision: Any = "fp32" if dtype == torch.float32 else "bf16-pure"
    parallel = apply.parallelize(net, mesh, ParallelConfig(tp=mesh.tp, cp=mesh.cp), precision=precision)
    shards = parallel.shards
    weights.load(
        net,
        source,
        model,
        tp_rank=mesh.tp_rank,
        tp=mesh.tp,
        write=lambda name, tensor: shards[name].write(tensor),
        ema=ema,
    )
    return net.requires_grad_(False).eval()
