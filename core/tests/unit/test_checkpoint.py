"""Whatever interrupts a run, it goes on as if nothing had."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
import torch.distributed.checkpoint as dcp
from mindspeed_model_core import checkpoint, metrics, train
from mindspeed_model_core import dcp as dcp_format
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing import toy


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def forked(function, *args):
    """Run in a forked child; return its exit status (negative: the signal that ended it)."""
    job = get_context("fork").Process(target=function, args=args)
    job.start()
    job.join(60)
    return job.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.run(toy.recipe(), toy.TOY, folder)
    return losses_of(folder)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_killed_while_saving(tmp_path, whole, monkeypatch, moment, background):
    recipe = toy.recipe(checkpoint={"every": 2, "background": background})
    run = tmp_path / "run"
    owner, name = (dcp, "save") if moment == "writing" else (checkpoint.os, "replace")
    real = getattr(owner, name)

    def die_at_the_second(*args, **kwargs):
        if (run / "checkpoints" / "step-00000002").exists():
            if moment == "writing":
                real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, die_at_the_second)
    assert forked(train.run, recipe, toy.TOY, run) == -signal.SIGKILL
    monkeypatch.undo()
    assert [p.name for p in checkpoint.steps(run / "checkpoints")] == ["step-00000002"]
    train.run(recipe, toy.TOY, run, resume=True)
    assert losses_of(run) == whole
    assert not list((run / "checkpoints").glob(".*"))


def test_only_the_newest_are_kept(tmp_path):
    train.run(toy.recipe(checkpoint={"every": 1, "keep": 2}), toy.TOY, tmp_path / "run")
    kept = [p.name for p in checkpoint.steps(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_loses_nothing(tmp_path, whole, background):
    """The writer meets the file size limit, as it would a full disk, at the second checkpoint."""
    recipe = toy.recipe(checkpoint={"every": 2, "background": background})
    run = tmp_path / "run"

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def fill(record):
            if record.step == 3:
                while not checkpoint.steps(run / "checkpoints"):
                    time.sleep(0.01)
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

        try:
            train.run(recipe, toy.TOY, run, watch=[fill])
        except UserError as error:
            (tmp_path / "said").write_bytes(str(error).encode()[:2900])
            os._exit(2)
        os._exit(0)

    assert forked(limited) == 2
    said = (tmp_path / "said").read_text()
    assert "checkpoints was not written" in said and "\n" not in said
    assert [p.name for p in checkpoint.steps(run / "checkpoints")] == ["step-00000002"]
    train.run(recipe, toy.TOY, run, resume=True)
    assert losses_of(run) == whole


SCRIPT = """
import sys, time
from mindspeed_model_core import train
from mindspeed_model_core.testing import toy
recipe = toy.recipe(steps=100000, metrics={"trackers": (), "every": 1})
run = train.run(recipe, toy.TOY, sys.argv[1], watch=[lambda r: time.sleep(0.05)])
print("ended at", run.step, run.finished)
"""


def test_sigterm_saves_and_ends(tmp_path):
    run = tmp_path / "run"
    job = subprocess.Popen([sys.executable, "-c", SCRIPT, str(run)], stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while time.monotonic() < end and not ((run / "metrics.jsonl").exists() and len(losses_of(run)) >= 2):
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    done = len(losses_of(run))
    assert f"ended at {done} False" in out
    assert [p.name for p in checkpoint.steps(run / "checkpoints")] == [f"step-{done:08d}"]


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    run = tmp_path / "run"
    train.run(toy.recipe(steps=2), toy.TOY, run)
    part = next((run / "checkpoints" / "step-00000002").glob("*.distcp"))
    good = part.read_bytes()
    part.write_bytes(good[:100])
    with pytest.raises(UserError, match=f"{part}: is truncated: 100 of "):
        train.run(toy.recipe(), toy.TOY, run, resume=True)
    part.write_bytes(b"?" * len(good))
    with pytest.raises(UserError, match="step-00000002: cannot be loaded") as caught:
        train.run(toy.recipe(), toy.TOY, run, resume=True)
    assert "\n" not in str(caught.value)
    part.unlink()
    with pytest.raises(UserError, match=f"{part}: missing"):
        train.run(toy.recipe(), toy.TOY, run, resume=True)
    metadata = part.with_name(".metadata")
    metadata.write_bytes(metadata.read_bytes()[:50])
    with pytest.raises(UserError, match=r"step-00000002/\.metadata: is truncated or damaged"):
        train.run(toy.recipe(), toy.TOY, run, resume=True)


def test_another_size_of_network_is_refused(tmp_path):
    run = tmp_path / "run"
    train.run(toy.recipe(steps=2), toy.TOY, run)
    with pytest.raises(UserError, match="config.blocks is 4 in the checkpoint and 2 in the recipe"):
        train.run(toy.recipe(config={"blocks": 2}), toy.TOY, run, resume=True)


def test_weights_are_read_one_by_one(tmp_path):
    run = tmp_path / "run"
    train.run(toy.recipe(steps=1), toy.TOY, run)
    opened = checkpoint.open_weights(run)
    net = toy.Toy(toy.ToyConfig())
    assert sorted(opened.names()) == sorted(n for n, _ in net.named_parameters())
    for name, parameter in net.named_parameters():
        got = opened.read(name)
        assert got.shape == parameter.shape == opened.shape(name) and got.dtype == torch.float32
        assert got.abs().sum() > 0


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    run = tmp_path / "run"
    train.run(toy.recipe(steps=1), toy.TOY, run)
    metadata = run / "checkpoints" / "step-00000001" / ".metadata"
    metadata.write_bytes(pickle.dumps(subprocess.getoutput))
    with pytest.raises(UserError, match="subprocess.getoutput, which a checkpoint never does"):
        checkpoint.open_weights(run)
    with pytest.raises(UserError, match="subprocess.getoutput"):
        train.run(toy.recipe(), toy.TOY, run, resume=True)


def test_an_admitted_module_opens_no_door(tmp_path):
    """A dotted name below a module that the format uses reaches that module's imports."""
    here = b"torch.distributed.checkpoint.filesystem"
    call = pickle.SHORT_BINUNICODE + bytes([len(here)]) + here + pickle.SHORT_BINUNICODE + b"\x09os.system"
    call += pickle.STACK_GLOBAL + pickle.SHORT_BINUNICODE + b"\x05false" + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
    (tmp_path / ".metadata").write_bytes(pickle.PROTO + b"\x04" + call)
    with pytest.raises(UserError, match="os.system, which a checkpoint never does"):
        dcp_format.read_metadata(tmp_path)


def test_a_checkpoint_with_holes_is_refused(tmp_path):
    run = tmp_path / "run"
    train.run(toy.recipe(steps=1), toy.TOY, run)
    folder = run / "checkpoints" / "step-00000001"
    found = dcp_format.read_metadata(folder)
    name = "model.blocks.0.up.weight"
    chunk = found.state_dict_metadata[name].chunks[0]
    found.state_dict_metadata[name].chunks = [replace(chunk, sizes=torch.Size((3, 6)))]
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(UserError, match="does not hold all of"):
        checkpoint.open_weights(run).read("blocks.0.up.weight")
    with pytest.raises(UserError, match="does not hold all of"):
        train.run(toy.recipe(), toy.TOY, run, resume=True)


def test_a_users_copy_of_a_checkpoint_is_left_alone(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    train.run(toy.recipe(steps=2), toy.TOY, tmp_path / "run")
    (folder / "step-00000002").rename(folder / "step-00000002-best")
    assert checkpoint.steps(folder) == []


def test_bf16_resumes_from_its_masters(tmp_path):
    """The parameters that compute are made anew from the masters: bit for bit what they were."""
    recipe = toy.recipe(precision="bf16", checkpoint={"every": 3, "keep": 9})
    train.run(recipe, toy.TOY, tmp_path / "run")
    want = losses_of(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000006").rename(tmp_path / "gone")
    train.run(recipe, toy.TOY, tmp_path / "run", resume=True)
    assert losses_of(tmp_path / "run") == want


def test_a_file_that_did_not_arrive_costs_no_older_checkpoint(tmp_path, monkeypatch):
    """As when another host writes into a folder of its own."""
    run, real = tmp_path / "run", dcp_format.save

    def lose(state, folder, group):
        real(state, folder, group)
        if folder.name == ".step-00000004.tmp":
            next(folder.glob("*.distcp")).unlink()

    monkeypatch.setattr(dcp_format, "save", lose)
    with pytest.raises(UserError, match=r"distcp: missing; the checkpoint is not whole; step-00000002 is intact"):
        train.run(toy.recipe(checkpoint={"every": 2, "keep": 1}), toy.TOY, run)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda i: i.pop("model"), "model: this field is required"),
        (lambda i: i.pop("recipe"), "recipe: this field is required"),
        (lambda i: i.update(recipe=3), "recipe=3: "),
        (lambda i: i["recipe"].pop("seed"), "recipe.seed: this field is required"),
        (lambda i: i.update(config=[1]), r"config=\[1\]: "),
        (lambda i: i.update(step="many"), "step='many': "),
        (lambda i: i.pop("data"), "data: this field is required"),
        (lambda i: i["recipe"].update(lora=True), "recipe.lora=True: "),
    ],
)
def test_a_damaged_run_file_names_its_field(tmp_path, damage, said, resumed):
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    recipe = {"seed": 0, "precision": "fp32", "global_batch": 8}
    info = {"model": "toy", "config": {"blocks": 4}, "recipe": recipe, "digest": "", "step": 1, "data": {}}
    damage(info)
    (folder / "run.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=f"{folder / 'run.json'}: {said}") as caught:
        if resumed:
            train.run(toy.recipe(), toy.TOY, tmp_path / "run", resume=True)
        else:
            checkpoint.open_weights(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_run_file_that_holds_no_object_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run.json: holds a list, expected an object"):
        checkpoint.read_info(tmp_path)


def test_the_records_of_saved_steps_are_never_lost(tmp_path):
    recipe = toy.recipe(metrics={"trackers": (), "every": 5}, checkpoint={"every": 3, "background": False})
    run = tmp_path / "run"

    def die(record):
        if record.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(lambda: train.run(recipe, toy.TOY, run, watch=[die])) == -signal.SIGKILL
    train.run(recipe, toy.TOY, run, resume=True)
    records = metrics.read(run)
    assert sum(r["samples"] for r in records) == 6 * 8
    assert [r["step"] for r in records] == [1, 3, 4, 5, 6]
