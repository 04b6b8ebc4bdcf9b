"""The demonstration's own parts; the whole of it runs in ``nox -s "demo(whisper)"``."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from mindspeed_model_core.data.audio import read_audio
from mindspeed_model_core.errors import UserError
from mindspeed_model_whisper.data import RATE
from mindspeed_model_whisper.demo import DIGITS, Voice, sayings


def test_sayings_are_digits_and_repeat() -> None:
    first, again = (list(sayings(20, random.Random(1))) for _ in range(2))
    assert first == again and len({text for text, *_ in first}) > 10
    assert all(set(text.split()) <= set(DIGITS) for text, *_ in first)


def test_without_a_voice_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="pip install espeakng-loader"):
        Voice()


def test_a_voice_speaks(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="needs espeakng-loader")
    voice = Voice()
    for name, speed in (("slow", 120), ("fast", 240)):
        voice.say("three seven one", tmp_path / f"{name}.wav", "en", speed, 50)
    slow, fast = (read_audio(tmp_path / f"{name}.wav", RATE) for name in ("slow", "fast"))
    assert len(slow) > 1.3 * len(fast) > 0.4 * RATE and slow.abs().max() > 0.2
