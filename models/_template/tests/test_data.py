"""What the network reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mindspeed_model_core.errors import UserError
from mindspeed_model_template import MODEL
from mindspeed_model_template.data import ByteText, collate
from mindspeed_model_template.task import TemplateRecipe


def test_collate_puts_the_nearest_byte_first() -> None:
    batch = collate([np.arange(6, dtype=np.uint8)], window=2)
    assert batch["labels"].tolist() == [2, 3, 4, 5]
    assert batch["before"].tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]


def test_an_epoch_reads_every_sample_once() -> None:
    source = ByteText(np.arange(2 + 4 * 10, dtype=np.uint8), window=2, length=4, slots=3, seed=0)
    firsts = []
    for slot in range(3):
        for sample, (epoch, _) in source.stream(slot, source.start(slot)):
            if epoch:
                break
            firsts.append(int(sample[2]))
    assert sorted(firsts) == list(range(2, 42, 4))


@pytest.mark.parametrize(("size", "message"), [(None, "no such file"), (10, "10 bytes are fewer than global_batch=4")])
def test_unusable_files_are_named(tmp_path: Path, size: int | None, message: str) -> None:
    path = tmp_path / "book.txt"
    if size is not None:
        path.write_bytes(b"a" * size)
    recipe = TemplateRecipe(preset="tiny", global_batch=4, data={"path": str(path)})
    with pytest.raises(UserError, match=message):
        MODEL.task(recipe, MODEL.config(recipe)).data(0, 1)
