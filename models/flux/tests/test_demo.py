"""The demonstration's photos are read as training reads them; the whole of it runs in ``nox -s demo``."""

from __future__ import annotations

from pathlib import Path

import torch
from mindspeed_model_core.data.media import read_frames, read_items
from mindspeed_model_flux.demo import PHOTOS, SIDE, make_photos


def test_photos_have_their_captions_beside_them(tmp_path: Path) -> None:
    made = make_photos(tmp_path / "photos")
    items = read_items(tmp_path / "photos")
    assert [item.caption for item in items] == list(PHOTOS)
    for item, photo in zip(items, made, strict=True):
        assert torch.equal(read_frames(item.path, 1, fps=None, size=(SIDE, SIDE))[0], photo)
        assert photo.float().std() > 20
