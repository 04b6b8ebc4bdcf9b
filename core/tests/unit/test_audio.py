"""Sounds of several forms, and files that are none."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from mindspeed_model_core.data.audio import read_audio, seconds
from mindspeed_model_core.errors import UserError

RATE = 16000


def sine(length: float, rate: int = RATE) -> np.ndarray:
    return np.sin(2 * np.pi * 440 * np.arange(round(length * rate)) / rate) / 2


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    samples = samples if samples.ndim == 2 else samples[:, None]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def test_samples_are_those_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sine(0.25))
    got = read_audio(path, RATE)
    assert got.dtype == torch.float32 and len(got) == 4000 and seconds(path) == 0.25
    assert (got - torch.from_numpy(sine(0.25))).abs().max() < 2 / 32768


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    path = write(tmp_path / "a.wav", sine(0.5, rate), rate)
    got, want = read_audio(path, RATE), torch.from_numpy(sine(0.5))
    assert abs(len(got) - len(want)) <= 1 and seconds(path) == pytest.approx(0.5)
    # The filter needs some samples around each.
    assert (got[200:7800] - want[200:7800]).abs().max() < 2e-3


def test_channels_are_averaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", np.stack((sine(0.25), -sine(0.25), sine(0.25) / 2), 1))
    assert (read_audio(path, RATE) - torch.from_numpy(sine(0.25) / 6)).abs().max() < 2 / 32768


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sine(2.0))
    got = read_audio(path, RATE, most=0.75)
    assert len(got) == 12000 and torch.equal(got, read_audio(path, RATE)[:12000])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.wav", "no such file"),
        ("empty.wav", "holds no sample of sound"),
        ("none.wav", "holds no sample of sound"),
        ("text.wav", "not readable sound"),
        ("image.png", "holds no sound; give a file such as"),
    ],
)
def test_what_is_no_sound_is_named(tmp_path: Path, name: str, message: str) -> None:
    from PIL import Image

    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no sound" * 40)
    write(tmp_path / "none.wav", np.zeros(0))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(UserError, match=message) as error:
        read_audio(tmp_path / name, RATE)
    assert str(tmp_path / name) in str(error.value)


def test_a_name_may_have_a_colon(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "10:30.wav", sine(0.5))
    assert len(read_audio("10:30.wav", 16000)) == 8000
