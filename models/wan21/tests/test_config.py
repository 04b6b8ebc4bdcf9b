"""Sizes that no network can have are refused with the field's name, wherever they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mindspeed_model_core.errors import UserError
from mindspeed_model_wan21 import MODEL
from mindspeed_model_wan21.weights import HUB, read_hub_config


@pytest.mark.parametrize(
    ("preset", "changes", "said"),
    [
        ("tiny-t2v", {"eps": 0.0}, "eps"),
        ("tiny-t2v", {"eps": -1e-6}, "eps"),
        ("tiny-t2v", {"num_layers": 0}, "num_layers"),
        ("tiny-t2v", {"attention_head_dim": 15}, "attention_head_dim=15 must be even"),
        ("tiny-t2v", {"freq_dim": 31}, "freq_dim=31 must be even"),
        ("tiny-t2v", {"pos_embed_seq_len": 10}, "pos_embed_seq_len=10 needs image_dim"),
        ("tiny-t2v", {"in_channels": 36}, "in_channels=36 differ from out_channels=16"),
        ("tiny-i2v", {"pos_embed_seq_len": 9}, "pos_embed_seq_len=9 must be even"),
        ("tiny-i2v", {"in_channels": 32}, "in_channels=32 must be above 32 with image_dim"),
    ],
)
def test_impossible_sizes_are_refused(preset: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = MODEL.presets[preset]
    (tmp_path / "transformer").mkdir()
    HUB.write_config(config, tmp_path, None)  # type: ignore[arg-type]
    assert read_hub_config(tmp_path) == config
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=said) as caught:
        read_hub_config(tmp_path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.height=-16", "data.height=-16: must be a multiple of 16; try 16"),
        ("data.height=50", "tiny-t2v: data.height=50: must be a multiple of 16; try 48"),
        ("data.frames=6", "data.frames: 6 is not 4n \\+ 1; try 5"),
        ("data.ratios=[1:0]", "data.ratios: '1:0' is not width:height"),
        ("data.kind=zzz", r"data.kind='zzz'.* \(known: features, null, raw\)"),
    ],
)
def test_overrides_that_cannot_be_name_the_field_and_what_can(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        MODEL.load_recipe("tiny-t2v", [override])


def test_a_lone_value_stands_for_a_list_of_it() -> None:
    for override in ("data.ratios=16:9", "data.ratios=[16:9]"):
        assert MODEL.load_recipe("tiny-t2v", [override, "data.frames=5"]).data.ratios == ("16:9",)  # type: ignore[attr-defined]
