"""The command line, the same for every model package: ``mindspeed-<model>``; and ``mindspeed`` for what is common."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from . import launch
from . import recipe as recipes
from .errors import UserError, nearest

# torch takes seconds to import; whatever needs it is imported inside the command that does.
if TYPE_CHECKING:
    from .model import Model
    from .recipe import Recipe
    from .train import Run


def _release(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed as a package)"


def _version(context: typer.Context, asked: bool) -> None:
    if asked:
        for name in dict.fromkeys((context.obj, "mindspeed-model-core")):
            typer.echo(f"{name} {_release(name)}")
        raise typer.Exit()


RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A name that 'recipes' lists, or a path ending in .yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe: parallel.tp=2 optim.lr=1e-4 steps=100."),
]
Nproc = Annotated[
    str | None,
    typer.Option(metavar="N", help="Start N processes on this machine, one per device; auto: one per accelerator."),
]

Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")]

_WIDE = 160
"""Columns of a terminal from which recipes and ops are a table."""

_PLAIN_OS_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


class _OneLine:
    """What ends a command's mistakes in one line on stderr and exit status 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        status: Any = 0
        try:
            launch.follow_launcher()
            command: Any = super()  # of click, by the class this is mixed into
            status = command.main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except UserError as error:
            launch.report(_line(error), status=2)
            status = 2
        except typer.Abort:
            status = 130
        except Exception as error:
            status = _known(error)
            if status is None:
                with launch.crashes():
                    raise
        sys.exit(status if isinstance(status, int) else 0)


class _Group(_OneLine, TyperGroup):
    """Commands of one program."""


class _Command(_OneLine, TyperCommand):
    """A program that is one command."""


def _known(error: Exception) -> int | None:
    """Report a mistake in the command line's words or one of the system's plain refusals; None: it is neither."""
    if isinstance(error, OSError) and error.errno in _PLAIN_OS_ERRORS:
        launch.report(f"{error.filename or 'writing'}: {error.strerror}", status=2)
        return 2
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        launch.report("not enough memory on the host; lower micro_batch or the size; 'show' estimates it", status=2)
        return 2
    if type(error).__name__ == "OutOfMemoryError":  # torch's, named so that nothing here imports torch
        said = " ".join(str(error).split()).partition(". ")[0]
        advice = "lower micro_batch, set recompute=all or parallel.shard=zero3; 'show' estimates the memory"
        launch.report(f"{said}; {advice}", status=2)
        return 2
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        if context is not None:
            print(context.get_help(), end="")
        return 2
    where = f"; see {context.command_path} --help" if context is not None else ""
    launch.report(f"{' '.join(str(error.format_message()).split()).rstrip('.')}{where}", status=2)
    return 2


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _new(help_text: str, prog: str, distribution: str) -> typer.Typer:
    return typer.Typer(
        name=prog,
        cls=_Group,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "obj": distribution},
    )


def _help(summary: str, text: str, *examples: str) -> str:
    """Return help: a line that lists of commands show, what else there is to know, examples."""
    lines = "\n".join(f"[green]$ {example}[/green]" for example in examples)
    return f"{summary}\n\n{text}\n\n[bold]Examples[/bold]\n\n\b\n{lines}"


def app(model: Model) -> typer.Typer:
    """Return a model's command line."""
    prog = f"mindspeed-{model.name}"
    cli = _new(
        _help(
            f"Train, convert, measure and run {model.name}.",
            "A recipe is a set of values: list them, look at one with your changes, then train it.",
            f"{prog} recipes",
            f"{prog} show NAME steps=100",
            f"{prog} train NAME steps=100 --nproc 2",
        ),
        prog,
        f"mindspeed-model-{model.name}",
    )

    @cli.callback()
    def options(version: Version = False) -> None: ...

    @cli.command(
        "recipes",
        help=_help(
            "List the recipes of this package.",
            "Each says what it trains and which published number it repeats, a row of perf_baselines/published.csv.",
            f"{prog} recipes",
        ),
    )
    def list_recipes() -> None:
        listed = [model.load_recipe(name) for name in recipes.names(model.package)]
        console = Console(highlight=False)
        if console.is_terminal and console.width < _WIDE:
            for each in listed:
                console.print(f"[bold]{each.name}[/bold]  preset {each.preset}", soft_wrap=True)
                console.print(Padding(each.description, (0, 0, 0, 2)))
                if each.reproduces:
                    console.print(f"  reproduces {each.reproduces}", soft_wrap=True)
            return
        table = _table("recipe", "preset", "description", "reproduces")
        for each in listed:
            table.add_row(each.name, each.preset, each.description, each.reproduces or "")
        _print(table)

    @cli.command(
        "keys",
        help=_help(
            "List the keys that a recipe may set.",
            "Each with what it takes, its default, which a recipe may have changed, and what it does. With a word, "
            "those that have it in their name.",
            f"{prog} keys",
            f"{prog} keys recompute",
        ),
    )
    def list_keys(
        word: Annotated[str | None, typer.Argument(metavar="WORD", help="A part of a key.", show_default=False)] = None,
    ) -> None:
        from .keys import keys

        known = list(keys(model.recipe))
        chosen = [key for key in known if word is None or word in key.name]
        if not chosen:
            raise UserError(f"{word}: no key has this in its name{nearest(str(word), [key.name for key in known])}")
        table = _table("key", "takes", "default", "what it does")
        for key in chosen:
            table.add_row(key.name, key.takes, key.default, key.meaning)
        _print(table)

    @cli.command(
        help=_help(
            "Print a recipe in full, and the memory it will need.",
            "Your changes are applied; then come its digest, the number of parameters and an estimate of the memory "
            "of each device. Nothing is loaded or written. Redirected to a file, the output is itself a recipe. "
            f"What each key does, {prog} keys says.",
            f"{prog} show NAME",
            f"{prog} show NAME parallel.tp=2 parallel.shard=zero1 --nproc 8",
            f"{prog} show NAME optim.lr=1e-4 > mine.yaml",
        )
    )
    def show(
        recipe: RecipeName,
        overrides: Overrides = None,
        nproc: Annotated[
            int | None, typer.Option(metavar="N", help=r"Devices to plan for.  \[default: tp x cp x pp]")
        ] = None,
    ) -> None:
        from .estimate import estimate

        resolved = model.load_recipe(recipe, overrides or ())
        if nproc is not None and nproc < 1:
            raise UserError(f"--nproc={nproc}: plan for 1 device or more")
        plan = estimate(resolved, model, nproc or resolved.parallel.model)
        typer.echo(resolved.to_yaml(), nl=False)
        console = Console()
        with console.capture() as captured:
            console.print(f"\ndigest      {resolved.digest()}", highlight=False)
            learn = "" if plan.trainable == plan.parameters else f", of which {plan.trainable:,} are trained"
            console.print(f"parameters  {plan.parameters:,}{learn}\n", highlight=False)
            console.print(plan.title, style="italic", highlight=False)
            console.print(plan.table())
            for note in plan.notes:
                console.print(note, style="dim", highlight=False)
        # As comments, what follows the recipe leaves a redirected output loadable.
        mark = "" if console.is_terminal else "# "
        typer.echo("\n".join(f"{mark}{line}".rstrip() for line in captured.get().splitlines()))

    @cli.command(
        help=_help(
            "Train a recipe.",
            "Checkpoints, metrics and the loss curve go to the run folder; SIGTERM saves and ends the run, "
            "--resume continues it, under another parallel layout too. Any torchrun launch works instead of --nproc.",
            f"{prog} train NAME",
            f"{prog} train NAME init_from=path/to/hub-folder data.path=path/to/data --nproc 8",
            f"{prog} train NAME parallel.tp=2 parallel.pp=2 --nproc 8 --run-dir runs/first",
            f"{prog} train NAME parallel.shard=zero3 --nproc 8 --run-dir runs/first --resume",
            f"torchrun --nnodes 2 ... --no-python {prog} train NAME",
        )
    )
    def train(
        recipe: RecipeName,
        overrides: Overrides = None,
        nproc: Nproc = None,
        run_dir: Annotated[
            Path | None, typer.Option(metavar="DIR", help=r"Where the run goes.  \[default: runs/MODEL-RECIPE]")
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's newest checkpoint.")] = False,
    ) -> None:
        from . import train as trainer
        from .checkpoint import step_of

        resolved = model.load_recipe(recipe, overrides or ())
        folder = run_dir or Path("runs") / f"{model.name}-{resolved.name}"
        found = trainer.starting_point(folder, resume, resolved, model)
        _spread(resolved, nproc)
        if resume and found is None and launch.first_rank():
            typer.echo(f"{folder}: no checkpoint to resume from, starting from the beginning", err=True)
        elif found is not None and launch.first_rank():
            typer.echo(f"{folder}: continues after step {step_of(found)}", err=True)
        done = trainer.run(resolved, model, folder, resume=resume)
        if launch.first_rank():
            typer.echo(_ended(done, resolved.steps))
        if done.signal == signal.SIGINT:
            raise typer.Exit(130)

    @cli.command(
        help=_help(
            "Write weights in another layout.",
            "The source is a hub folder, an original release or a run's checkpoint; which one is detected. Weights are "
            "streamed: memory stays small whatever the size. A run of adapters becomes a folder of adapters; "
            "--merge-lora adds adapters to the source's weights.",
            f"{prog} convert runs/first/checkpoints/step-00001000 exported --layout hub",
            f"{prog} convert path/to/hub-folder released --layout original",
            f"{prog} convert runs/first exported --layout hub --dtype bf16",
            f"{prog} convert path/to/hub-folder merged --layout hub --merge-lora runs/adapters",
        )
    )
    def convert(
        source: Annotated[Path, typer.Argument(metavar="SRC", help="The folder to read.")],
        destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
        layout: Annotated[
            str,
            typer.Option(metavar="NAME", help="How to write: hub (as transformers or diffusers reads it) or original."),
        ],
        preset: Annotated[
            str | None,
            typer.Option(metavar="P", help="The size the source must be; refused if it is another one."),
        ] = None,
        dtype: Annotated[
            str | None, typer.Option(metavar="T", help="Write bf16, fp16 or fp32; by default what the source holds.")
        ] = None,
        shards: Annotated[
            int | None, typer.Option(metavar="N", help="Number of files, where the layout leaves it open.")
        ] = None,
        merge_lora: Annotated[
            Path | None,
            typer.Option(
                metavar="ADAPTERS", help="Add these to the weights: a folder or a file of adapters, or a run."
            ),
        ] = None,
        ema: Annotated[
            bool, typer.Option("--ema", help="Take the run's moving average (optim.ema) in place of its weights.")
        ] = False,
        extras_from: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR",
                help=r"What goes with the weights (tokenizer, encoders) is there.  \[default: beside them]",
            ),
        ] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
    ) -> None:
        from .data.tokenizer import FILES, has_tokenizer
        from .weights import DTYPES, check_folder, find_layout
        from .weights import convert as convert_weights

        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"--dtype={dtype}: not a type weights are written in{nearest(dtype, DTYPES)}")
        console = Console(stderr=True)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as shown:
            task = shown.add_task(f"writing {destination}", total=None)
            convert_weights(
                source,
                destination,
                model,
                layout,
                preset=preset,
                dtype=None if dtype is None else DTYPES[dtype],
                shards=shards,
                extras_from=None if extras_from is None else check_folder(extras_from, "--extras-from="),
                overwrite=overwrite,
                merge_lora=merge_lora,
                ema=ema,
                progress=lambda done, total: shown.update(task, completed=done, total=total),
            )
        typer.echo(f"{destination}: written in layout {layout}")
        chosen = find_layout(model, layout)
        if set(FILES) & set(chosen.extras) and chosen.detect(destination) and not has_tokenizer(destination):
            typer.echo(
                f"{destination}: has no tokenizer, none was found with {extras_from or source}; "
                "the same command with --extras-from DIR --overwrite adds the one in DIR",
                err=True,
            )
        # Of the files that go along, one tells that what goes with the network was found; without, all folders must be.
        names = chosen.extras or chosen.parts
        missing = [name for name in names if not (destination / name).exists()]
        whole = not chosen.parts or (len(missing) < len(names) if chosen.extras else not missing)
        if extras_from is None and not whole and chosen.detect(destination):
            typer.echo(
                f"{destination}: is no whole pipeline, it lacks {', '.join(missing)}: what goes with the network "
                f"was not found, or not whole, with {source}; --extras-from DIR adds it",
                err=True,
            )

    @cli.command(
        help=_help(
            "Measure a recipe's training speed.",
            "It trains on random data of the recipe's shapes, and tells the speed, where a step's time goes, and how "
            "near it comes to what the device reaches. --compare holds the result against what was recorded on the "
            "same hardware and against published numbers; --record adds it.",
            f"{prog} measure NAME",
            f"{prog} measure NAME --steps 20 --compare --nproc 8",
        )
    )
    def measure(
        recipe: RecipeName,
        overrides: Overrides = None,
        compare: Annotated[bool, typer.Option("--compare", help="Fail outside the tolerance, faster too.")] = False,
        record: Annotated[bool, typer.Option("--record", help="Add the result to the baselines.")] = False,
        steps: Annotated[int, typer.Option(metavar="N", help="Steps timed.")] = 10,
        warmup: Annotated[int, typer.Option(metavar="N", help="Steps run before, not timed.")] = 3,
        nproc: Nproc = None,
        baselines: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help=r"The folder of baselines.  \[default: perf_baselines, here or above]"),
        ] = None,
        allow_dirty: Annotated[
            bool, typer.Option("--allow-dirty", help="Record from changed sources, marked +dirty.")
        ] = False,
    ) -> None:
        from . import perf
        from .perf import baseline

        resolved = model.load_recipe(recipe, overrides or ())
        if record and resolved.recompute == "auto":
            raise UserError(
                "--record: recompute=auto is as many blocks as the memory that is free now asks for; record the number "
                "that it prints, recompute=N"
            )
        where = None
        if compare or record or baselines:
            where = baseline.prepare(
                model.package,
                resolved.reproduces,
                steps=steps,
                baselines=baselines,
                record=record,
                allow_dirty=allow_dirty,
            )
        _spread(resolved, nproc)
        measured = perf.measure(resolved, model, steps=steps, warmup=warmup)
        if not launch.first_rank():
            return
        status = baseline.report(measured, where, gate=compare, keep=record, allow_dirty=allow_dirty)
        if status:
            launch.report("the speed is outside the tolerance; record it with --record if it is right", status=1)
            raise typer.Exit(status)

    @cli.command(
        help=_help(
            "Show what was measured, beside what was published.",
            "The rows come from perf_baselines/: published.csv, and what 'measure --record' added.",
            f"{prog} baselines",
            f"{prog} baselines --chart speeds.png",
        )
    )
    def baselines(
        chart: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw them: .png, .svg or .pdf.")] = None,
        folder: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help=r"The folder of baselines.  \[default: perf_baselines, here or above]"),
        ] = None,
    ) -> None:
        from .perf import baseline, display

        where = baseline.folder(folder)
        if chart is not None and chart.suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"--chart={chart}: charts are written as .png, .svg or .pdf")
        console = Console()
        console.print(display.table(where, model.name, console.width))
        if chart is not None:
            typer.echo(display.plot(where, model.name, chart))

    for function in model.commands:
        cli.command(_command_name(function))(function)
    return cli


def _ended(done: Run, steps: int) -> str:
    """Return the line that says how a run ended and where things are."""
    if done.finished and done.loss is None:
        return f"{done.folder}: already finished, at step {done.step}; raise steps={steps} to go on"
    saved = f"saved in {done.folder / 'checkpoints'}"
    if not done.finished:
        return f"{done.folder}: stopped at step {done.step} of {steps}, {saved}; continue with --resume"
    curve = done.folder / "loss.png"
    return f"{done.folder}: finished at step {done.step}, {saved}" + (f", curve in {curve}" if curve.exists() else "")


def _command_name(function: Callable[..., None]) -> str:
    return function.__name__.removesuffix("_command").replace("_", "-")


def _spread(recipe: Recipe, nproc: str | None) -> None:
    """With ``--nproc`` of 2 or more, run this command again as that many ranks and end with their exit status."""
    if nproc is None:
        return
    launch.refuse_nested()
    count = launch.count(nproc)
    if count > 1:
        raise typer.Exit(launch.spawn(count, launch.command_without_nproc()))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 240  # one line a row, for grep
    console.print(table)


def run(model: Model) -> None:
    """Run a model's command line: what its console script calls."""
    typer.main.get_command(app(model))(prog_name=f"mindspeed-{model.name}")


def run_script(function: Callable[..., None]) -> None:
    """Run a function as the command line of the script that calls this; its mistakes are one line too."""
    cli = typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    cli.command(cls=_Command)(function)
    typer.main.get_command(cli)(prog_name=Path(sys.argv[0]).name)


def common() -> None:
    """Run ``mindspeed``, the command of core."""
    typer.main.get_command(common_app())(prog_name="mindspeed")


def common_app() -> typer.Typer:
    """Return the command line that belongs to no one model."""
    cli = _new(
        _help(
            "What is installed of the MindSpeed model zoo.",
            "Each model has a command of its own, mindspeed-MODEL.",
            "mindspeed list",
            "mindspeed-llama2 recipes",
        ),
        "mindspeed",
        "mindspeed-model-core",
    )

    @cli.callback()
    def options(version: Version = False) -> None: ...

    @cli.command(
        "list", help=_help("List the installed models.", "With their versions and commands.", "mindspeed list")
    )
    def list_models() -> None:
        table = _table("model", "version", "command", "package")
        for entry in sorted(entry_points(group="mindspeed_model"), key=lambda e: e.name):
            scripts = [e.name for e in (entry.dist.entry_points if entry.dist else ()) if e.group == "console_scripts"]
            name, release = (entry.dist.name, entry.dist.version) if entry.dist else ("?", "?")
            table.add_row(entry.name, release, ", ".join(scripts), name)
        if not table.row_count:
            raise UserError("no model is installed; for example: pip install mindspeed-model-llama2")
        _print(table)

    @cli.command(
        "ops",
        help=_help(
            "Show what serves each op on a device.",
            "An op is computed by the first of its rows that takes the operands and whose level is the recipe's "
            "optimization_level or below it; where none does, by its reference, at level 0.",
            "mindspeed ops",
            "mindspeed ops --device npu",
        ),
    )
    def list_ops(
        kind: Annotated[
            str | None,
            typer.Option(
                "--device", metavar="KIND", help=r"npu, cuda or cpu, here or not.  \[default: what a run would use]"
            ),
        ] = None,
    ) -> None:
        from . import device
        from .ops.table import TABLE, VARIABLE, level

        if kind is not None and kind not in device.KINDS:
            meant = nearest("cuda" if kind == "gpu" else kind, device.KINDS)
            raise UserError(f"--device={kind}: not a kind of device{meant}")
        kind = kind or device.pick().type
        rows = []
        for name, op in sorted(TABLE.items()):
            there = op.entries.get(kind, [])
            serving = [entry for entry in there if entry.level <= level()]
            for entry in serving:
                rows.append((name, str(entry.level), entry.by, entry.when))
            if all(entry.when != "all" for entry in serving):
                reason = f"level {level()}" if there else f"no {kind} entry"
                rows.append((name, "0", "reference", "the rest" if serving else f"all: {reason}"))
        console = Console(highlight=False)
        if console.is_terminal and console.width < _WIDE:
            for name, wanted, by, where in rows:
                console.print(f"[bold]{name}[/bold]  level {wanted}", soft_wrap=True)
                for call in by.split():
                    console.print(f"  {call}", soft_wrap=True)
                console.print(Padding(f"for {where}", (0, 0, 0, 4)))
        else:
            table = _table("op", "level", "served by", "for")
            for row in rows:
                table.add_row(*row)
            _print(table)
        asked = "0 for all" if level() == 0 else "the recipe's optimization_level"
        does = "makes" if level() == 0 else "would make"
        typer.echo(f"\n{kind}; level: {asked}; {VARIABLE}=reference {does} it 0")

    return cli
