"""Speech recognition from sound to text, small enough for a CPU: ``python -m mindspeed_model_whisper.demo``.

Has espeak-ng say digits in several voices, trains a small network on them with two processes, exports it, counts the
errors on what it has not heard, and has transformers' pipeline hear the same.
"""

from __future__ import annotations

import ctypes
import json
import random
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from mindspeed_model_core import metrics
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.frozen import quiet
from mindspeed_model_core.showcase import Showcase, console, main

from .data import RATE, read_lines
from .tiny import write_tiny_tokenizer

DIGITS = "zero one two three four five six seven eight nine".split()
VOICES = ("en", "en-us", "en+m3", "en+f2", "en-us+f4", "en+m7")
HEARD, NEW = 480, 40
BAR = 0.15
SIZES = ("num_mel_bins=40", "d_model=64", "encoder_ffn_dim=256", "decoder_ffn_dim=256", "max_source_positions=100")
shows = Showcase("whisper", __package__ or "mindspeed_model_whisper")

_SPEED, _PITCH = 1, 3
_SYNCHRONOUS, _UTF8 = 2, 1


class Voice:
    """espeak-ng, which speaks without any network; the package espeakng-loader brings it."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise UserError("the demonstration is spoken by espeak-ng; pip install espeakng-loader") from None
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        place = espeakng_loader.get_data_path().encode()
        self.rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, place, 0)
        if self.rate <= 0:
            raise UserError(f"espeak-ng: cannot be started with the data in {place.decode()}")
        self.parts: list[np.ndarray[Any, Any]] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self._take)  # held: the library calls it
        self.library.espeak_SetSynthCallback(self.callback)

    def _take(self, samples: Any, count: int, _: Any) -> int:
        if count > 0:
            self.parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, path: Path, voice: str, speed: int, pitch: int) -> None:
        """Write a text's sound as a .wav file."""
        self.parts.clear()
        self.library.espeak_SetVoiceByName(voice.encode())
        self.library.espeak_SetParameter(_SPEED, speed, 0)
        self.library.espeak_SetParameter(_PITCH, pitch, 0)
        spoken = text.encode()
        self.library.espeak_Synth(spoken, len(spoken) + 1, 0, 1, 0, _UTF8, None, None)
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes(np.concatenate(self.parts).tobytes())


def sayings(count: int, draw: random.Random) -> Iterator[tuple[str, str, int, int]]:
    """Yield texts of one to three digits, each with a voice, a speed and a pitch."""
    for _ in range(count):
        text = " ".join(draw.choices(DIGITS, k=draw.randint(1, 3)))
        yield text, draw.choice(VOICES), draw.randint(150, 210), draw.randint(30, 70)


def speak(folder: Path) -> tuple[Path, Path]:
    """Write sounds and the two lists that name them: what is learnt, and what is not."""
    voice, draw = Voice(), random.Random(0)
    folder.mkdir(parents=True)
    lists = []
    for name, count in (("heard", HEARD), ("new", NEW)):
        lines = []
        for number, (text, who, speed, pitch) in enumerate(sayings(count, draw)):
            voice.say(text, folder / f"{name}-{number}.wav", who, speed, pitch)
            lines.append(json.dumps({"audio": f"{name}-{number}.wav", "text": text}))
        lists.append(folder / f"{name}.jsonl")
        lists[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lists[0], lists[1]


def demo(
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where everything goes; by default a new folder below runs/.")
    ] = None,
) -> None:
    """Train a small speech recogniser on this machine's CPU, and have it write down what it has not heard."""
    begun = time.perf_counter()
    work = shows.folder(folder)

    shows.heading("Digits, spoken in six voices, and a tokenizer of letters")
    heard, new = speak(work / "sounds")
    words = write_tiny_tokenizer(work / "tokenizer")
    console.print(f"{HEARD} sounds to learn from and {NEW} to be asked: {work / 'sounds'}")

    shows.heading("Train with two processes")
    values = [f"data.path={heard}", f"data.tokenizer={words}", "metrics.every=50", "steps=700", "global_batch=16"]
    values += [f"config.{size}" for size in SIZES] + ["optim.lr=2e-3", "optim.warmup=50"]
    shows.run("train", "mini", *values, "--nproc", "2", "--run-dir", str(work / "run"))
    losses = [float(record["loss"]) for record in metrics.read(work / "run")]
    console.print(f"loss {losses[0]:.2f} at first, {losses[-1]:.3f} at the end: {work / 'run' / metrics.CHART}")

    shows.heading("Export it, and count errors: on what it has learnt from, and on what it has not heard")
    shows.run("convert", str(work / "run"), str(work / "exported"), "--layout", "hub")
    known = work / "sounds" / "known.jsonl"
    known.write_text("".join(heard.read_text(encoding="utf-8").splitlines(keepends=True)[:NEW]), encoding="utf-8")
    _ask(work, known, bar=0.0)
    rows = _ask(work, new, bar=BAR)
    for row in rows[:5]:
        console.print(f"  {row['text']!r} was heard as {row['heard']!r}")

    shows.heading("Have transformers' pipeline hear the same")
    alike = compare(work / "exported", new, rows)
    console.print(f"all {alike} texts are the same")
    console.print(f"\n[bold green]Done in {time.perf_counter() - begun:.0f} s.[/bold green] Everything is in {work}.")


def _ask(work: Path, listed: Path, *, bar: float) -> list[dict[str, str]]:
    """Return what was said and heard; UserError if a larger share of the texts than ``bar`` is wrong."""
    said = work / f"said-{listed.name}"
    shows.run("evaluate", str(work / "exported"), str(listed), "--out", str(said))
    rows = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines()]
    wrong = sum(row["text"] != row["heard"] for row in rows) / len(rows)
    if wrong > bar:
        raise UserError(f"{said}: {wrong:.0%} of the texts are wrong, the bar is {bar:.0%}")
    return rows


def compare(exported: Path, listed: Path, rows: list[dict[str, str]]) -> int:
    """Return how many sounds transformers hears as we did; UserError for one that it does not."""
    from mindspeed_model_core.data.audio import read_audio
    from transformers import pipeline

    with quiet():
        recogniser: Any = pipeline("automatic-speech-recognition", model=str(exported), device="cpu")
        for line, row in zip(read_lines(listed, "en"), rows, strict=True):
            told = {"language": "en", "task": "transcribe", "num_beams": 1}
            found = recogniser(read_audio(line.path, RATE).numpy(), generate_kwargs=told)["text"].strip()
            if found != row["heard"]:
                raise UserError(f"{line.path}: transformers hears {found!r}, we heard {row['heard']!r}")
    return len(rows)


if __name__ == "__main__":
    main(demo)
