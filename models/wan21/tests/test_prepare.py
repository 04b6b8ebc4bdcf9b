"""Preparing gives what the encoders do, in as many processes as there are; core tests what it survives."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core.data.encoded import EMPTY_TEXT
from mindspeed_model_core.data.features import FeatureSet
from mindspeed_model_core.data.media import read_frames
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing.clips import PHOTOS, equal, write_clips
from mindspeed_model_wan21.data import WanData
from mindspeed_model_wan21.encoders import Encoders, fingerprint
from mindspeed_model_wan21.prepare import prepare, prepare_command
from mindspeed_model_wan21.tiny import write_tiny_encoders

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
    assert re.fullmatch(rf"{folder}: 6 samples encoded in \d+ s, [\d.]+ a second; 6 in all", line)
    return folder


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
    return PHOTOS[number % len(PHOTOS)]


def test_two_processes_share_the_work(clips: Path, encoders: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    shapes = "--height 32 --width 48 --frames 5 --frames 9 --ratio 3:2 --ratio 2:3 --conditioning first-last".split()
    run = [sys.executable, "-m", "mindspeed_model_wan21", "prepare", str(clips), str(folder), *shapes]
    done = subprocess.run(
        [*run, "--encoders", str(encoders), "--nproc", "2"],
        env={**os.environ, "MINDSPEED_MODEL_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and ": 6 samples encoded" in done.stdout and "6 in all" in done.stdout
    ours, theirs = FeatureSet(folder), FeatureSet(whole)
    assert ours.keys == theirs.keys and ours.meta == theirs.meta
    assert all(equal(ours.read(i), theirs.read(i)) for i in range(len(ours)))


def test_a_folder_says_what_it_was_made_with_and_may_grow(
    clips: Path, encoders: Path, whole: Path, tmp_path: Path
) -> None:
    first = clips.with_name("first.jsonl")
    first.write_text("".join(clips.read_text().splitlines(keepends=True)[:2]))
    prepare(first, tmp_path / "made", encoders, DATA, "first-last")
    lines = [f"{i + 1} part-{i}/clip.mp4 {clip_photo(i)}, number {i}" for i in range(2)]
    settings = json.loads((tmp_path / "made" / "settings.json").read_text())
    assert settings == {
        "encoders": fingerprint(encoders),
        "conditioning": "first-last",
        "sizes": [[32, 48], [48, 32]],
        "frames": [5, 9],
        "fps": 16.0,
        "listed": "".join(hashlib.sha256(line.encode()).hexdigest()[:8] for line in lines),
    }
    line = prepare(clips, tmp_path / "made", encoders, DATA, "first-last")
    assert ": 4 samples encoded" in line and "2 were there; 6 in all" in line
    assert FeatureSet(tmp_path / "made").keys == FeatureSet(whole).keys


def test_what_does_not_go_together_is_refused(clips: Path, encoders: Path, whole: Path, tmp_path: Path) -> None:
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

    refused("prepared with conditioning first-last, now it is none", conditioning="none")
    other = write_tiny_encoders(tmp_path / "text-only", image=False)
    refused("prepared with encoders", encoders=other, conditioning="none")
    refused("no image_encoder/ there, which --conditioning first needs", encoders=other, conditioning="first")
    still = DATA.model_copy(update={"frames": (1, 5)})
    refused(
        "^--conditioning first-last with --frames 1: .*; leave --frames 1 out, or prepare the images into a folder of "
        "their own with --conditioning none$",
        data=still,
        destination=tmp_path / "new",
    )
    refused("^--encoders=.*nowhere: no such folder", encoders=tmp_path / "nowhere", conditioning="none")
    assert not (tmp_path / "new").exists()
    options = {"source": clips, "destination": tmp_path / "new", "encoders": encoders}
    with pytest.raises(UserError, match="^--conditioning=frist: no such choice; did you mean 'first'"):
        prepare_command(**options, conditioning="frist")
    with pytest.raises(UserError, match="^--frames: 80 is not"):
        prepare_command(**options, frames=[80])
