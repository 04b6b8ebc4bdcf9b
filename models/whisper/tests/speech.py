"""Short sounds with texts, and the tokenizer that goes with the smallest network."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mindspeed_model_whisper.tiny import write_tiny_tokenizer

TEXTS = ("one", "two", "three four", "नमस्ते", "five six seven")


def write_wav(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    """Write sound from -1 to 1, ``[samples]`` or ``[samples, channels]``, as 16 bits."""
    samples = samples if samples.ndim == 2 else samples[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return path


def tone(seconds: float, rate: int = 16000, pitch: float = 440.0) -> np.ndarray:
    """Return a sine at half of the full scale."""
    return np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate) / 2


def sweep(seconds: float) -> torch.Tensor:
    """Return sound that changes all the time."""
    at = np.arange(round(seconds * 16000)) / 16000
    return torch.from_numpy(np.sin(2 * np.pi * (200 + 300 * at) * at) * (0.5 + 0.4 * np.sin(9 * at))).float()


def write_speech(folder: Path, count: int = 8) -> dict[str, Any]:
    """Write sounds, once, and return the ``data`` fields that name them."""
    listed = folder / "speech.jsonl"
    if not listed.exists():
        rows = []
        for number in range(count):
            write_wav(folder / f"{number}.wav", tone(0.1 + 0.03 * number, pitch=200.0 + 150 * number))
            rows.append({"audio": f"{number}.wav", "text": TEXTS[number % len(TEXTS)]})
        listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_tiny_tokenizer(folder / "tokenizer")
    return {"path": str(listed), "tokenizer": str(folder / "tokenizer")}
