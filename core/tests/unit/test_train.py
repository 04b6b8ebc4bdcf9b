"""A run loses nothing, takes nothing that is not its own, and says how it ended."""

import fcntl
import os
import signal
import threading
import time
from multiprocessing import get_context

import pytest
import torch
from mindspeed_model_core import checkpoint, metrics, ops, train
from mindspeed_model_core.data.slots import CONTENT
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing import toy


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def forked():
    """Return a function that runs another in a forked child and returns its exit status, negative for a signal."""

    def run(function, *args, **kwargs):
        job = get_context("fork").Process(target=function, args=args, kwargs=kwargs)
        job.start()
        job.join(60)
        return job.exitcode

    return run


def losses_of(folder):
    return [record["loss"] for record in metrics.read(folder)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 5}, "seed=5: the run was saved with 0"),
        ({"precision": "bf16"}, "precision=bf16"),
        ({"steps": 1}, None),
    ],
)
def test_a_resume_that_does_nothing_changes_nothing(tmp_path, change, said):
    run = tmp_path / "run"
    train.run(toy.recipe(steps=2), toy.TOY, run)
    before = contents(run)
    if said is None:
        done = train.run(toy.recipe(**change), toy.TOY, run, resume=True)
        assert done.finished and done.step == 2 and done.loss is None
    else:
        with pytest.raises(UserError, match=said):
            train.run(toy.recipe(**{"steps": 4, **change}), toy.TOY, run, resume=True)
    assert contents(run) == before


def test_data_that_refuses_its_position_leaves_the_run_alone(tmp_path, monkeypatch):
    run = tmp_path / "run"
    train.run(toy.recipe(steps=2), toy.TOY, run)
    before = contents(run)

    def refuse(self, state):
        raise UserError("other data")

    monkeypatch.setattr(toy.ToyLoader, "load_state_dict", refuse)
    with pytest.raises(UserError, match="other data"):
        train.run(toy.recipe(steps=4), toy.TOY, run, resume=True)
    assert contents(run) == before


def failing_at(step):
    """Return an iterator for the toy's loader that meets a broken line before ``step``."""
    whole = toy.ToyLoader.__iter__

    def broken(self):
        for batches in whole(self):
            if self.at == step:
                raise UserError("corpus.jsonl:7: not JSON")
            yield batches

    return broken


def test_a_mistake_in_the_first_batch_leaves_no_folder(tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(toy.ToyLoader, "__iter__", failing_at(1))
        with pytest.raises(UserError, match=r"corpus.jsonl:7: not JSON$"):
            train.run(toy.recipe(steps=2), toy.TOY, run)
    assert not run.exists()
    assert train.run(toy.recipe(steps=2), toy.TOY, run).finished


def test_a_mistake_in_a_later_batch_saves_what_was_done(tmp_path, monkeypatch):
    train.run(toy.recipe(), toy.TOY, tmp_path / "whole")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(toy.ToyLoader, "__iter__", failing_at(4))
        with pytest.raises(UserError, match="corpus.jsonl:7: not JSON; step 3 is saved: .* --resume"):
            train.run(toy.recipe(), toy.TOY, run)
    assert [p.name for p in checkpoint.steps(run / "checkpoints")] == ["step-00000003"]
    train.run(toy.recipe(), toy.TOY, run, resume=True)
    assert losses_of(run) == losses_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recompute": 99}, r"recompute=99: a pipeline stage holds \d+ blocks; nearest"),
        ({"profile": {"start": 1, "ranks": (0, 2)}}, r"profile.ranks=\[0, 2\]: there is no rank 2 among 1 processes"),
        ({"global_batch": 3, "micro_batch": 2}, "global_batch=3: not a multiple of micro_batch=2 x 1 data ranks = 2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        train.run(toy.recipe(steps=2, **fields), toy.TOY, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", [False, True])
def test_a_file_is_no_run_folder(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / "run" if below else tmp_path / "file"
    with pytest.raises(UserError, match=f"--run-dir={folder}: {tmp_path / 'file'} is a file"):
        train.run(toy.recipe(), toy.TOY, folder)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    folder = tmp_path / "gone" / "run" if below else tmp_path / "gone"
    with pytest.raises(UserError, match=f"--run-dir={folder}: {tmp_path / 'gone'} is a link to nothing"):
        train.run(toy.recipe(), toy.TOY, folder)


def test_other_files_are_not_called_a_run(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        train.run(toy.recipe(), toy.TOY, tmp_path)


def test_one_folder_takes_one_run_at_a_time(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    monkeypatch.setattr(train, "_PATIENCE", 0.1)
    with pytest.raises(UserError, match="another process is training into it"):
        train.run(toy.recipe(), toy.TOY, tmp_path / "run")
    os.close(handle)
    assert train.run(toy.recipe(steps=1), toy.TOY, tmp_path / "run").finished


def test_interrupt_saves_and_a_second_one_ends(tmp_path, capfd):
    def interrupt(times):
        def watch(record):
            if record.step == 2:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)

        return watch

    done = train.run(toy.recipe(), toy.TOY, tmp_path / "run", watch=[interrupt(1)])
    assert (done.step, done.finished, done.signal) == (3, False, signal.SIGINT)
    assert [p.name for p in checkpoint.steps(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    assert "saving after this step" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        train.run(toy.recipe(), toy.TOY, tmp_path / "second", watch=[interrupt(2)])
    assert not checkpoint.steps(tmp_path / "second" / "checkpoints")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failed_save_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    failed = threading.Event()

    def full(self, *_):
        failed.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Checkpointer, "_write", full)
    seen = []

    def watch(record):
        seen.append(record.step)
        if record.step > 2:
            failed.wait(10)
            time.sleep(0.05)

    with pytest.raises(UserError, match="No space left on device; there is none yet"):
        train.run(toy.recipe(steps=50, checkpoint={"every": 2}), toy.TOY, tmp_path / "run", watch=[watch])
    assert seen[-1] in (2, 3)


def test_random_state_belongs_to_the_step(tmp_path, monkeypatch):
    seeds: dict[str, list[int]] = {"whole": [], "cut": []}
    encode = toy.ToyTask.encode

    def note(name):
        monkeypatch.setattr(
            toy.ToyTask, "encode", lambda self, b: seeds[name].append(torch.initial_seed()) or encode(self, b)
        )

    note("whole")
    train.run(toy.recipe(steps=4), toy.TOY, tmp_path / "whole")
    note("cut")
    train.run(toy.recipe(steps=2), toy.TOY, tmp_path / "cut")
    train.run(toy.recipe(steps=4), toy.TOY, tmp_path / "cut", resume=True)
    assert seeds["cut"] == seeds["whole"] and len(set(seeds["whole"])) == 4


def diverging_at(step):
    """Return the toy's loss, infinite in one step and whole in the others."""
    whole = toy.ToyTask.loss
    done = {"at": 0}

    def loss(self, output, batch):
        done["at"] += 1
        return whole(self, output, batch) * (torch.inf if done["at"] > 8 * (step - 1) else 1.0)

    return loss


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("step", [1, 5, 6])
def test_a_diverged_run_saves_nothing_more(tmp_path, monkeypatch, step, late):
    """Also where totals are read a step late, as on accelerators, and the step that diverged is to be saved."""
    take = train._Report.take
    monkeypatch.setattr(train._Report, "take", lambda self, n, totals, **_: take(self, n, totals, late=late))
    monkeypatch.setattr(toy.ToyTask, "loss", diverging_at(step))
    run = tmp_path / "run"
    left = "the newest checkpoint is .*step-00000004$" if step > 1 else "none was saved$"
    with pytest.raises(UserError, match=rf"^step {step}: the loss is inf and the gradient norm nan.*{left}"):
        train.run(toy.recipe(steps=9, checkpoint={"every": 2, "keep": 2}), toy.TOY, run)
    kept = [p.name for p in checkpoint.steps(run / "checkpoints")]
    assert kept == (["step-00000002", "step-00000004"] if step > 1 else [])
    monkeypatch.undo()
    assert train.run(toy.recipe(steps=9), toy.TOY, run, resume=True).finished
    assert len(losses_of(run)) == 9


def test_a_run_that_diverged_before_broken_data_is_not_saved(tmp_path, monkeypatch):
    take = train._Report.take
    monkeypatch.setattr(train._Report, "take", lambda self, n, totals, **_: take(self, n, totals, late=True))
    monkeypatch.setattr(toy.ToyTask, "loss", diverging_at(3))
    monkeypatch.setattr(toy.ToyLoader, "__iter__", failing_at(4))
    with pytest.raises(UserError, match="^step 3: the loss is inf .* none was saved$"):
        train.run(toy.recipe(), toy.TOY, tmp_path / "run")
    assert not checkpoint.steps(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("names", [["notes.txt"], ["metrics.jsonl", "checkpoints/other.pt"], ["model", "recipe.yaml"]])
def test_resume_takes_no_foreign_folder(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: holds .*{names[0]}"):
        train.run(toy.recipe(), toy.TOY, tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_resume_without_the_checkpoints_keeps_the_records(tmp_path):
    run = tmp_path / "run"
    train.run(toy.recipe(), toy.TOY, run)
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    before = contents(run)
    with pytest.raises(
        UserError, match="holds .*metrics.jsonl.*, but its folder checkpoints is missing; put that back"
    ):
        train.run(toy.recipe(), toy.TOY, run, resume=True)
    assert contents(run) == before
    (tmp_path / "elsewhere").rename(run / "checkpoints")
    assert train.run(toy.recipe(steps=7), toy.TOY, run, resume=True).finished


def test_a_run_killed_before_its_first_save_can_be_resumed(tmp_path, forked):
    run = tmp_path / "run"

    def die(record):
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(train.run, toy.recipe(), toy.TOY, run, watch=[die]) == -signal.SIGKILL
    assert len(losses_of(run)) == 3
    assert train.run(toy.recipe(), toy.TOY, run, resume=True).finished
    assert len(losses_of(run)) == 6


class Fickle(toy.ToyLoader):
    """The toy's batches, of data whose content can change."""

    content = "first"

    def state_dict(self):
        return {**super().state_dict(), CONTENT: self.content}

    def load_state_dict(self, state):
        if state[CONTENT] != self.content:
            raise UserError(f"{CONTENT}: is {self.content} now and was {state[CONTENT]}")
        super().load_state_dict(state)


@pytest.mark.parametrize("saved_before", [False, True])
def test_data_may_change_where_a_mistake_in_it_ended_the_run(tmp_path, monkeypatch, capsys, saved_before):
    def recipe(**changes):
        return toy.recipe(optim={"lr": 1e-2, "schedule": "constant"}, **changes)

    train.run(recipe(), toy.TOY, tmp_path / "whole")
    monkeypatch.setattr(toy.ToyTask, "data", lambda self, rank, ranks: Fickle(self.recipe, rank, ranks))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Fickle, "__iter__", failing_at(4))
        with pytest.raises(UserError, match="step 3 is saved: mend it"):
            train.run(recipe(checkpoint={"every": 3 if saved_before else 5}), toy.TOY, run)
    monkeypatch.setattr(Fickle, "content", "mended")
    train.run(recipe(steps=5), toy.TOY, run, resume=True)
    assert "stopped at corpus.jsonl:7: not JSON; it goes on with data mended since" in capsys.readouterr().err
    monkeypatch.setattr(Fickle, "content", "another")
    with pytest.raises(UserError, match="is another now and was mended"):
        train.run(recipe(), toy.TOY, run, resume=True)
    monkeypatch.setattr(Fickle, "content", "mended")
    train.run(recipe(), toy.TOY, run, resume=True)
    assert losses_of(run) == losses_of(tmp_path / "whole")


def test_a_mistake_met_at_once_after_resuming_can_be_mended_too(tmp_path, monkeypatch):
    monkeypatch.setattr(toy.ToyTask, "data", lambda self, rank, ranks: Fickle(self.recipe, rank, ranks))
    run = tmp_path / "run"
    train.run(toy.recipe(steps=3), toy.TOY, run)
    with monkeypatch.context() as patch:
        patch.setattr(Fickle, "__iter__", failing_at(4))
        with pytest.raises(UserError, match="not JSON; step 3 is saved: mend it"):
            train.run(toy.recipe(), toy.TOY, run, resume=True)
    monkeypatch.setattr(Fickle, "content", "mended")
    assert train.run(toy.recipe(), toy.TOY, run, resume=True).finished


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_step_is_done_at_the_recipes_level(tmp_path, monkeypatch, level):
    """The network and the update are, and only they: the fused update runs from level 1."""
    seen, fused = [], torch._fused_adamw_
    run_pipeline = train.pipeline.run
    monkeypatch.setattr(train.pipeline, "run", lambda *args: (seen.append(ops.level()), run_pipeline(*args))[1])
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *a, **k: (seen.append("fused"), fused(*a, **k))[1])
    train.run(toy.recipe(steps=2, optimization_level=level), toy.TOY, tmp_path / "run")
    assert seen.count(level) == 2 and ("fused" in seen) == (level > 0) and ops.level() == 2
    train.run(toy.recipe(steps=2), toy.TOY, tmp_path / "default")
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "default"), rel=1e-5)
