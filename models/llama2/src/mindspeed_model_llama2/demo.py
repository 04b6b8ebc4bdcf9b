"""Everything a user does with Llama-2, small enough for a CPU: ``python -m mindspeed_model_llama2.demo``.

Makes a tiny Llama-2 in the hub's layout with a tokenizer of its own, trains it with two processes on the prose in
Python's standard library, kills and resumes the run, checks how far the loss fell, exports it, compares its logits
with transformers', lets it write a line and measures its speed.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from mindspeed_model_core import metrics, weights
from mindspeed_model_core.data import train_tokenizer
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.parallel import apply
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.recipe import ParallelConfig
from mindspeed_model_core.showcase import Showcase, console, main

from . import MODEL
from .config import PRESETS
from .generate import load_net

STEPS, EVERY, KILL_AT, BAR = 300, 10, 120, 3.7
RECIPE = "tiny-text"
shows = Showcase("llama2", __package__ or "mindspeed_model_llama2")


def docstrings() -> Iterator[str]:
    """Yield the longer docstrings of Python's standard library: English prose that is on every machine."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    yield " ".join(text.split())


def make_start(folder: Path, text: Path) -> None:
    """Write the text, a tokenizer learned from it, and a randomly initialised tiny Llama-2 in the hub's layout."""
    documents = list(docstrings())
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents), encoding="utf-8")
    config = PRESETS["tiny"]
    train_tokenizer(documents, config.vocab_size, folder.with_name("tokenizer"))
    with torch.device("meta"):
        net = MODEL.build(config)
    apply.initialise(apply.parallelize(net, Mesh(torch.device("cpu")), ParallelConfig()), seed=0)
    weights.save(net.named_parameters(), config, MODEL.layouts[0], folder, extras_from=folder.with_name("tokenizer"))
    console.print(f"{len(documents)} documents, {text.stat().st_size / 1e6:.1f} MB of text; weights in {folder}")


def train_and_kill(arguments: list[str], folder: Path) -> None:
    """Start training and kill one of its processes, without warning, once it has come some way."""
    job = subprocess.Popen(shows.command(*arguments), start_new_session=True)
    try:
        while job.poll() is None and _step(folder) < KILL_AT:
            time.sleep(0.1)
        if job.poll() is not None:
            raise UserError(f"training ended with status {job.returncode} before it could be killed")
        rank = _child(job.pid)
        os.kill(rank, signal.SIGKILL)
        console.print(f"[yellow]killed process {rank} with SIGKILL at step {_step(folder)}[/yellow]")
        job.wait(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


def _step(folder: Path) -> int:
    records = metrics.read(folder) if (folder / metrics.FILE).exists() else []
    return int(records[-1]["step"]) if records else 0


def _child(parent: int) -> int:
    """Return the youngest child of a process, from Linux's /proc."""
    children = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f"\nPPid:\t{parent}\n" in status.read_text():
                children.append(int(status.parent.name))
    if not children:
        raise UserError(f"process {parent} has no child to kill in /proc; the demo needs Linux")
    return max(children)


def check_loss(folder: Path) -> None:
    """Fail unless the run did all its steps and its loss fell below the bar."""
    records = metrics.read(folder)
    losses = [float(r["loss"]) for r in records]
    last = sum(losses[-3:]) / 3
    console.print(
        f"{STEPS} steps: {_sparkline(losses)}  first {losses[0]:.2f}, mean of the last three {last:.2f} (bar: {BAR})"
    )
    console.print(f"loss and speed over the steps: {folder / metrics.CHART}")
    steps = [r["step"] for r in records]
    if steps != sorted(set(steps)) or not {*range(EVERY, STEPS + 1, EVERY)} <= {*steps}:
        raise UserError(f"{folder}: the records do not hold every {EVERY}th of the {STEPS} steps once")
    if last > BAR:
        raise UserError(f"the last losses are {last:.3f}, the bar is {BAR}")


def _sparkline(values: list[float], width: int = 60) -> str:
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (m - low) / (high - low or 1))] for m in means)


def check_export(exported: Path) -> None:
    """Fail unless transformers gives the logits our network gives, from the exported folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer("Return the value of the attribute.", return_tensors="pt").input_ids
    ours = load_net(exported, torch.device("cpu"), torch.float32)
    batch = {"tokens": tokens[0], "positions": torch.arange(tokens.shape[1]), "lengths": (tokens.shape[1],)}
    with torch.no_grad():
        want, got = theirs(tokens).logits[0], ours(batch)
    assert isinstance(got, torch.Tensor)
    worst = float((got - want).abs().max() / want.abs().max())
    console.print(f"logits of transformers and ours, largest relative difference: {worst:.1e} (allowed: 1e-5)")
    if worst > 1e-5:
        raise UserError(f"the exported folder's logits differ from ours by {worst:.1e}")


def demo(
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where everything goes; by default a new folder below runs/.")
    ] = None,
) -> None:
    """Train a tiny Llama-2 on real text on this machine's CPU, from a hub folder to a hub folder."""
    begun = time.perf_counter()
    work = shows.folder(folder)
    start, text, trained, exported = (work / name for name in ("start", "text.jsonl", "run", "exported"))

    shows.heading("A tiny Llama-2 in the hub's layout, its tokenizer, and text from Python's standard library")
    make_start(start, text)

    shows.heading("Train it with two processes, and kill one of them")
    train = ["train", RECIPE, f"init_from={start}", f"data.path={text}", f"steps={STEPS}", f"metrics.every={EVERY}"]
    train += ["--nproc", "2", "--run-dir", str(trained)]
    train_and_kill(train, trained)

    shows.heading("Resume it; nothing but the steps since the last checkpoint is lost")
    shows.run(*train, "--resume")
    check_loss(trained)

    shows.heading("Export it to the hub's layout and compare with transformers")
    shows.run("convert", str(trained), str(exported), "--layout", "hub")
    check_export(exported)

    shows.heading("Let it write a line")
    shows.run("generate", str(exported), "--prompt", "Return the", "--max-new-tokens", "40", "--temperature", "0")

    shows.heading("Measure its speed, beside what is recorded and published")
    shows.run("measure", RECIPE, "--steps", "10")
    shows.run("baselines")
    console.print(f"\n[bold green]Done in {time.perf_counter() - begun:.0f} s.[/bold green] Everything is in {work}.")


if __name__ == "__main__":
    main(demo)
