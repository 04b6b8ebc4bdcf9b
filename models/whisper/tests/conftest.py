"""Core's tests of each model, and a folder of weights that say something."""

from __future__ import annotations

from pathlib import Path

import pytest
from mindspeed_model_core import weights
from mindspeed_model_core.testing.suite import open_net, pytest_generate_tests, randomise  # noqa: F401
from mindspeed_model_whisper import MODEL
from mindspeed_model_whisper.tiny import write_tiny_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder of random weights, with its tokenizer."""
    base = tmp_path_factory.mktemp("whisper")
    write_tiny_tokenizer(base / "tokenizer")
    net = open_net(MODEL, MODEL.presets["mini"])
    randomise(net, seed=11)
    extras = base / "tokenizer"
    weights.save(net.named_parameters(), MODEL.presets["mini"], MODEL.layouts[0], base / "hub", extras_from=extras)
    return base / "hub"
