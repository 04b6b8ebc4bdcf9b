"""Times a training step of ours beside transformers' in one process, in turn: ``python step_time.py --help``.

Both start from the same weights and see the same random tokens. Ours is the trainer's whole step (data, count, forward,
backward, clipping, AdamW, totals); theirs the plain loop of transformers' model, torch's clipping and AdamW.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from mindspeed_model_core import device as devices
from mindspeed_model_core import weights
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.train import Session
from mindspeed_model_core.trunk import Batch
from mindspeed_model_llama2 import MODEL
from rich.console import Console
from rich.table import Table
from torch.nn.utils import clip_grad_norm_

DTYPES = {"fp32": torch.float32, "bf16-pure": torch.bfloat16}


def ours(session: Session) -> Callable[[], float]:
    """Return a function that does one step of ours and returns its loss."""

    def step() -> float:
        loss, _, _, _, _, count, _ = session.step().read()
        return loss / count

    return step


def theirs(folder: Path, batches: Callable[[], list[Batch]], recipe, device: torch.device) -> Callable[[], float]:
    """Return a function that does one step of transformers' network and returns its loss."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[recipe.precision]).to(device).train()
    optim = recipe.optim
    decay = [p for p in net.parameters() if p.dim() > 1]
    plain = [p for p in net.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=optim.lr, betas=optim.betas, eps=optim.eps,
    )  # fmt: skip
    length = recipe.data.sequence_length

    def step() -> float:
        total = 0.0
        parts = batches()
        for batch in parts:
            tokens = batch["tokens"].view(-1, length).to(device)
            labels = batch["labels"].view(-1, length).to(device)
            loss = net(tokens, labels=labels, shift_labels=labels).loss / len(parts)
            loss.backward()
            total += loss.detach()
        clip_grad_norm_(net.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def main(
    recipe: Annotated[str, typer.Argument(help="A recipe of llama2.")] = "tiny-text",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    steps: Annotated[int, typer.Option(help="Timed steps of each, after 5 untimed.")] = 60,
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU; default: torch's.")] = None,
) -> None:
    """Print the ratio of our step time to transformers'; below 1 is faster."""
    if threads:
        torch.set_num_threads(threads)
    chosen = MODEL.load_recipe(recipe, overrides or ())
    if chosen.precision not in DTYPES:
        raise typer.BadParameter(f"precision={chosen.precision}: the plain loop has no master weights; use fp32")
    device = devices.pick()
    session = Session(chosen, MODEL, Mesh(device), synthetic=True)
    session.start()
    source = iter(session.task.synthetic(0, 1))
    with tempfile.TemporaryDirectory() as folder:
        hub = Path(folder) / "hub"
        whole = [(n, s.master) for n, s in session.parallel.shards.items()]
        weights.save(whole, session.config, MODEL.layouts[0], hub)
        sides = {"ours": ours(session), "transformers": theirs(hub, lambda: next(source), chosen, device)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(steps + 5):
        losses = {}
        for name, step in sides.items():
            begun = time.perf_counter()
            losses[name] = step()
            devices.synchronize(device)
            if number >= 5:
                times[name].append(time.perf_counter() - begun)
        if abs(losses["ours"] / losses["transformers"] - 1) > 0.02:
            raise SystemExit(f"step {number}: the two do not do the same work: {losses}")
    ratios = [a / b for a, b in zip(times["ours"], times["transformers"], strict=True)]
    table = Table("step", "median", "quartiles", title=f"{chosen.name} on {devices.name(device)}, {chosen.precision}")
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        table.add_row(name, f"{1e3 * statistics.median(values):.2f} ms", f"{1e3 * low:.2f} to {1e3 * high:.2f} ms")
    low, _, high = statistics.quantiles(ratios, n=4)
    table.add_row("ratio, pair by pair", f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
