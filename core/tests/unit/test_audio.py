"""Sounds of several forms, and files that are none."""

from __future__ import annotations

import struct
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
        ("folder.wav", "is a folder; name a file"),
        ("empty.wav", "holds no sample of sound"),
        ("none.wav", "holds no sample of sound"),
        ("text.wav", "not readable sound"),
        ("image.png", "holds no sound; give a file such as"),
    ],
)
def test_what_is_no_sound_is_named(tmp_path: Path, name: str, message: str) -> None:
    from PIL import Image

    (tmp_path / "empty.wav").touch()
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "text.wav").write_text("no sound" * 40)
    write(tmp_path / "none.wav", np.zeros(0))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(UserError, match=message) as error:
        read_audio(tmp_path / name, RATE)
    assert str(tmp_path / name) in str(error.value)
    with pytest.raises(UserError):
        seconds(tmp_path / name)


def encoded(path: Path, codec: str, length: float = 3.0) -> Path:
    import av

    with av.open(str(path), "w") as container:
        if codec not in av.codecs_available:
            pytest.skip(f"this FFmpeg does not write {codec}")
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((sine(length)[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return path


@pytest.mark.parametrize(("name", "codec"), [("a.mp3", "libmp3lame"), ("a.m4a", "aac")])
def test_damage_in_the_middle_is_refused_by_its_second_or_silent(tmp_path: Path, name: str, codec: str) -> None:
    path = encoded(tmp_path / name, codec)
    whole, data = len(read_audio(path, RATE)), bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"not readable sound at 1\.\d\d s \(.*\); it is damaged") as error:
        read_audio(path, RATE)
    assert str(path) in str(error.value)
    seen: list[float] = []
    got = read_audio(path, RATE, damaged=seen.append)
    assert 1 <= len(seen) <= 3 and all(1.2 < second < 1.9 for second in seen)
    # What comes after stays near its time.
    assert abs(len(got) - whole) < 0.1 * RATE and got[2 * RATE : -3200].square().mean() > 0.1


def head(payload: bytes, said: int, *, kind: int = 1, bits: int = 16) -> bytes:
    """Return a wav whose header says that its samples are so many bytes."""
    form = struct.pack("<HHIIHH", kind, 1, RATE, RATE * bits // 8, bits // 8, bits)
    return b"".join(
        (b"RIFF", struct.pack("<I", min(said + 36, 2**32 - 1)), b"WAVEfmt ", struct.pack("<I", 16), form, b"data",
         struct.pack("<I", said), payload)
    )  # fmt: skip


@pytest.mark.parametrize("said", [0, 8000, 0xFFFFFFFF])
def test_all_samples_are_read_of_a_writer_that_did_not_know_their_number(tmp_path: Path, said: int) -> None:
    payload = (sine(1.0) * 32767).astype("<i2").tobytes()
    (tmp_path / "a.wav").write_bytes(head(payload, said))
    assert len(read_audio(tmp_path / "a.wav", RATE)) == RATE and seconds(tmp_path / "a.wav") == pytest.approx(1.0)


def test_a_file_copied_in_part_is_refused_or_heard_to_its_end(tmp_path: Path) -> None:
    payload = (sine(1.0) * 32767).astype("<i2").tobytes()
    (tmp_path / "a.wav").write_bytes(head(payload[:16000], len(payload)))
    with pytest.raises(UserError, match=r"a\.wav: ends 16000 bytes before its header says; it is truncated"):
        read_audio(tmp_path / "a.wav", RATE)
    told: list[float] = []
    assert len(read_audio(tmp_path / "a.wav", RATE, damaged=told.append)) == 8000 and told == [0.5]


NOTE = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf58.29.100\0"


@pytest.mark.parametrize("after", [NOTE, NOTE[:12], b"TAG".ljust(128, b" ")], ids=["chunk", "cut chunk", "id3"])
def test_what_follows_the_samples_is_no_sound(tmp_path: Path, after: bytes) -> None:
    payload = (sine(1.0) * 32767).astype("<i2").tobytes()
    (tmp_path / "a.wav").write_bytes(head(payload, len(payload)) + after)
    assert len(read_audio(tmp_path / "a.wav", RATE)) == RATE


def test_an_odd_number_of_bytes_may_have_no_byte_behind_it(tmp_path: Path) -> None:
    payload = (sine(1.0) * 127 + 128).astype("u1").tobytes()[:-1]
    for name, between in (("with.wav", b"\0"), ("without.wav", b"")):
        (tmp_path / name).write_bytes(head(payload, len(payload), bits=8) + between + NOTE)
        assert len(read_audio(tmp_path / name, RATE)) == RATE - 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    samples = sine(1.0).astype("<f4")
    samples[8000] = value
    (tmp_path / "a.wav").write_bytes(head(samples.tobytes(), 4 * RATE, kind=3, bits=32))
    with pytest.raises(UserError, match=r"a\.wav: 1 samples are no numbers \(NaN or infinite\), the first at 0\.50 s"):
        read_audio(tmp_path / "a.wav", RATE)


def test_a_name_may_have_a_colon(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "10:30.wav", sine(0.5))
    assert len(read_audio("10:30.wav", 16000)) == 8000
