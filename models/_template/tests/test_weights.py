"""The published layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mindspeed_model_core import weights
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing.suite import open_net
from mindspeed_model_template import MODEL


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    config = MODEL.presets["tiny"]
    weights.save(open_net(MODEL, config).named_parameters(), config, MODEL.layouts[0], tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "other"}))
    with pytest.raises(UserError, match=r"config\.json: model_type='other'"):
        weights.read_config(tmp_path / "hub", MODEL)
