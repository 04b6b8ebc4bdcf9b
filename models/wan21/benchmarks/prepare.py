"""Times ``prepare`` and its peak memory on lists of several lengths, with tiny encoders: ``python prepare.py --help``.

The encoders are so small that reading, sharing out and writing clips weigh as much as they can. Each run is a process
of its own, on the CPU; what it takes to start and load the encoders is told by the shortest list.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

FRAMES, HEIGHT, WIDTH = 9, 64, 96


def run(listed: Path, folder: Path, encoders: Path, shard_bytes: int, threads: int) -> tuple[float, float]:
    """Prepare in this process; return the seconds it took and the process's peak resident memory in MiB."""
    from mindspeed_model_wan21.data import WanData
    from mindspeed_model_wan21.prepare import prepare

    torch.set_num_threads(threads)
    data = WanData(height=HEIGHT, width=WIDTH, frames=(FRAMES,))
    begun = time.perf_counter()
    prepare(listed, folder, encoders, data, shard_bytes=shard_bytes)
    seconds = time.perf_counter() - begun
    # Not getrusage: its peak counts the process that this one was started from.
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return seconds, int(peak[1]) / 1024 if peak else float("nan")


def main(
    clips: Annotated[list[int] | None, typer.Option(help="How many; several times.  \\[default: 40, 200]")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, in turn.")] = 3,
    shard_size: Annotated[int, typer.Option(min=1, help="prepare's --shard-size, MB: samples held in memory.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
) -> None:
    """Print clips per second and peak memory for each number of clips."""
    from mindspeed_model_core.data.features import FeatureSet
    from mindspeed_model_core.testing.clips import write_clips
    from mindspeed_model_wan21.tiny import write_tiny_encoders

    counts = sorted(set(clips or (40, 200)))
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoders = write_tiny_encoders(folder / "encoders", image=False)
        listed = write_clips(folder / "clips", [(FRAMES, HEIGHT, WIDTH)] * max(counts))
        lines = listed.read_text().splitlines(keepends=True)
        for repeat in range(repeats):
            for count in counts:
                some = listed.with_name(f"{count}.jsonl")
                some.write_text("".join(lines[:count]))
                made = folder / f"features-{count}-{repeat}"
                with spawn.Pool(1) as pool:
                    found[count].append(pool.apply(run, (some, made, encoders, shard_size * 10**6, threads)))
                if len(FeatureSet(made)) != count:
                    raise SystemExit(f"{made}: holds {len(FeatureSet(made))} samples, not {count}")
    title = f"prepare of clips of {FRAMES} x {HEIGHT} x {WIDTH}, CPU, {threads} threads, {repeats} runs"
    table = Table("clips", "seconds", "fastest and slowest", "clips/s", "peak MiB", title=title)
    for count, values in found.items():
        seconds, peaks = zip(*values, strict=True)
        middle = statistics.median(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        table.add_row(str(count), f"{middle:.2f}", spread, f"{count / middle:.1f}", f"{statistics.median(peaks):.0f}")
    console = Console()
    console.print(table)
    if len(counts) > 1:
        few, many = counts[0], counts[-1]
        seconds, peak = (
            (statistics.median(v[i] for v in found[many]) - statistics.median(v[i] for v in found[few])) / (many - few)
            for i in range(2)
        )
        console.print(f"each further clip: {1e3 * seconds:.1f} ms, {peak:.3f} MiB of peak memory")


if __name__ == "__main__":
    typer.run(main)
