"""A contact sheet says what its rows are."""

import torch
from mindspeed_model_core.showcase import labelled


def test_a_row_begins_with_what_it_is() -> None:
    row = torch.randint(256, (5, 3, 144, 144), dtype=torch.uint8)
    first, second = labelled(row, "sample"), labelled(row, "the VAE's\nreconstruction")
    assert first.shape == (6, 3, 144, 144) and torch.equal(first[1:], row)
    # Dark letters on white, others for another name, and none cut off at the edge.
    for made in (first, second):
        assert 20 < int((made[0, 0] < 128).sum()) < 2000 and bool((made[0, :, :, -2:] == 255).all())
    assert not torch.equal(first[0], second[0])
