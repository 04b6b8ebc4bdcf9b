"""Preparing encodes every clip once, whatever kills it, and its folder trains like the clips themselves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core.data.features import INDEX, SHARDS, FeatureSet
from mindspeed_model_core.data.media import read_frames
from mindspeed_model_core.errors import UserError
from mindspeed_model_wan21.data import EMPTY_TEXT, WanData
from mindspeed_model_wan21.encoders import Encoders
from mindspeed_model_wan21.prepare import prepare
from mindspeed_model_wan21.tiny import write_tiny_encoders

from .clips import write_clips

SHAPES = [(5, 32, 48), (7, 48, 32), (5, 64, 96), (6, 40, 60), (9, 32, 48), (5, 48, 32)]
DATA = WanData(height=32, width=48, frames=(5, 9), ratios=("3:2", "2:3"))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), SHAPES)


@pytest.fixture(scope="module")
def whole(clips: Path, encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "features"
    line = prepare(clips, folder, encoders, DATA, "first-last", shard_bytes=20_000)
    assert re.fullmatch(rf"{folder}: 6 clips encoded in \d+ s, [\d.]+ clips/s; 6 in all", line)
    return folder


def same(a: Path, b: Path) -> bool:
    """Return whether two folders hold the same samples, to the byte."""
    ours, theirs = FeatureSet(a), FeatureSet(b)
    assert ours.keys == theirs.keys
    for i in range(len(ours)):
        one, other = ours.read(i), theirs.read(i)
        assert one.keys() == other.keys()
        if not all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one):
            return False
    return True


def test_samples_are_what_the_encoders_give(clips: Path, encoders: Path, whole: Path) -> None:
    found, ours = FeatureSet(whole), Encoders(encoders)
    assert found.keys == [f"{i + 1:08d}-clip" for i in range(6)]
    assert found.meta["conditioning"] == "first-last" and found.meta["samples"] == 6
    for number, (frames, height, width) in enumerate(SHAPES):
        sample = found.read(number)
        path = clips.parent / f"part-{number}" / "clip.mp4"
        size = (32, 48) if width > height else (48, 32)
        video = read_frames(path, 9 if frames >= 9 else 5, fps=16, size=size)[None]
        assert torch.equal(sample["latents"], ours.video(video)[0])
        assert torch.equal(sample["text"], ours.text_rows([f"{clip_photo(number)}, number {number}"])[0])
        assert torch.equal(sample["condition"], ours.condition(video[:, 0], video[:, -1], video.shape[1])[0])
        assert torch.equal(sample["image"], torch.cat([ours.image(video[:, 0]), ours.image(video[:, -1])], 1)[0])
        assert sample["latents"].dtype == torch.float32 and sample["text"].dtype == torch.bfloat16
    from safetensors.torch import load_file

    assert torch.equal(load_file(whole / EMPTY_TEXT)["text"], ours.text_rows([""])[0])


def clip_photo(number: int) -> str:
    from .clips import PHOTOS

    return PHOTOS[number % len(PHOTOS)]


RUN = "from mindspeed_model_wan21.prepare import prepare_command; import typer; typer.run(prepare_command)"


def command(clips: Path, folder: Path, encoders: Path, *more: str) -> list[str]:
    shapes = "--height 32 --width 48 --frames 5 --frames 9 --ratio 3:2 --ratio 2:3 --conditioning first-last".split()
    return [sys.executable, "-c", RUN, str(clips), str(folder), "--encoders", str(encoders), *shapes, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "MINDSPEED_MODEL_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


KILLED = """
import os, signal, sys
from pathlib import Path
from mindspeed_model_core.data import features
flush = features.FeatureWriter.flush
def dying(self):
    flush(self)
    if self.number == 2:
        self.add("00009999-lost", {})
        os.kill(os.getpid(), signal.SIGKILL)
features.FeatureWriter.flush = dying
from mindspeed_model_wan21.prepare import prepare
from mindspeed_model_wan21.data import WanData
data = WanData(height=32, width=48, frames=(5, 9), ratios=("3:2", "2:3"))
prepare(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), data, "first-last", shard_bytes=20_000)
"""


def test_a_kill_loses_and_doubles_nothing(clips: Path, encoders: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, (clips, folder, encoders))], env=environment())
    assert killed.returncode == -signal.SIGKILL
    shards = sorted((folder / SHARDS).glob("*.safetensors"))
    kept = {path: path.read_bytes() for path in shards}
    assert len(shards) == 2 and not (folder / INDEX).exists()
    line = prepare(clips, folder, encoders, DATA, "first-last", shard_bytes=20_000)
    assert re.search(r"(\d) clips encoded .*; (\d) were there; 6 in all", line) and same(folder, whole)
    assert all(path.read_bytes() == data for path, data in kept.items())
    names = sorted(p.name for p in (whole / SHARDS).iterdir())
    assert sorted(p.name for p in (folder / SHARDS).iterdir()) == names
    assert all((folder / SHARDS / n).read_bytes() == (whole / SHARDS / n).read_bytes() for n in names)
    assert (folder / INDEX).read_bytes() == (whole / INDEX).read_bytes()
    again = prepare(clips, folder, encoders, DATA, "first-last", shard_bytes=20_000)
    assert ": 0 clips encoded" in again and "6 were there; 6 in all" in again
    assert (folder / INDEX).read_bytes() == (whole / INDEX).read_bytes()


def test_two_processes_share_the_work_and_go_on_after_an_interruption(
    clips: Path, encoders: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    full = command(clips, folder, encoders, "--nproc", "2")
    job = subprocess.Popen(full, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "settings.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode
    done = subprocess.run(full, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "6 in all" in done.stdout
    assert same(folder, whole)


def test_bad_files_are_named_and_skipped_or_stop_the_run(clips: Path, encoders: Path, tmp_path: Path) -> None:
    listed = tmp_path / "some.jsonl"
    cut = tmp_path / "cut.mp4"
    cut.write_bytes((clips.parent / "part-0" / "clip.mp4").read_bytes()[:900])
    rows = [str(clips.parent / "part-0" / "clip.mp4"), str(cut), str(tmp_path / "missing.png")]
    listed.write_text("".join(json.dumps({"video": row, "caption": "x"}) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"cut.mp4: .*data.on_bad=skip"):
        prepare(listed, tmp_path / "stopped", encoders, DATA)
    line = prepare(listed, tmp_path / "skipped", encoders, DATA.model_copy(update={"on_bad": "skip"}))
    assert "1 clips encoded" in line and "2 bad files skipped; 1 in all" in line
    found = FeatureSet(tmp_path / "skipped")
    assert found.keys == ["00000001-clip"] and found.meta["skipped"] == 2 and set(found.read(0)) == {"latents", "text"}


def test_a_file_found_bad_while_decoding_is_skipped_too(
    clips: Path, encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from mindspeed_model_wan21 import prepare as module

    def broken(item: Any, bucket: Any, fps: float) -> Any:
        if item.line == 3:
            raise UserError(f"{item.path}: damaged")
        return torch.zeros(bucket.frames, 3, bucket.height, bucket.width, dtype=torch.uint8)

    monkeypatch.setattr(module, "read_clip", broken)
    with pytest.raises(UserError, match="damaged"):
        prepare(clips, tmp_path / "stopped", encoders, DATA)
    line = prepare(clips, tmp_path / "skipped", encoders, DATA.model_copy(update={"on_bad": "skip"}))
    assert "5 clips encoded" in line and "1 bad files skipped; 5 in all" in line
    assert "part-2/clip.mp4: damaged" in capsys.readouterr().err


def test_other_settings_and_other_folders_are_refused(clips: Path, encoders: Path, whole: Path, tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        given: dict[str, Any] = {
            "source": clips,
            "destination": whole,
            "encoders": encoders,
            "data": DATA,
            "conditioning": "first-last",
        }
        with pytest.raises(UserError, match=message):
            prepare(**{**given, **changes})

    refused(r"prepared with fps 16.0, now it is 8.0", data=DATA.model_copy(update={"fps": 8.0}))
    refused("prepared with conditioning first-last, now it is none", conditioning="none")
    other = write_tiny_encoders(tmp_path / "text-only", image=False)
    refused("prepared with encoders", encoders=other, conditioning="none")
    still = DATA.model_copy(update={"frames": (1, 5)})
    refused("frames=1: an image leaves nothing to predict", data=still, destination=tmp_path / "new")
    refused("no image_encoder/ there, which --conditioning first needs", encoders=other, conditioning="first")
    lines = clips.read_text().splitlines(keepends=True)
    moved = clips.with_name("moved.jsonl")
    moved.write_text("".join(lines[::-1]))
    refused("prepared from another list", source=moved)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    refused("mine: exists and is not a prepared folder", destination=tmp_path / "mine")


def test_lines_may_be_added_to_the_list(clips: Path, encoders: Path, whole: Path, tmp_path: Path) -> None:
    lines = clips.read_text().splitlines(keepends=True)
    short = clips.with_name("short.jsonl")
    short.write_text("".join(lines[:2]))
    prepare(short, tmp_path / "grown", encoders, DATA, "first-last")
    short.write_text("".join(lines))
    assert "4 clips encoded" in prepare(short, tmp_path / "grown", encoders, DATA, "first-last")
    assert same(tmp_path / "grown", whole)
