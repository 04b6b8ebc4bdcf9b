"""The checks that stand before hardware catch mistakes planted into calls; ``planted.py`` says which catches what."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing.suite import needs_emulator

sys.path.insert(0, str(Path(__file__).parent))
import planted

pytestmark = pytest.mark.npu
NAMED = {m.name: m for m in planted.MISTAKES}
FEW = {
    "keyword unknown": {"schema", "refusal"},
    "eps dropped": {"value"},
    "ends called sizes": {"refusal"},
    "no derivative written": {"refusal"},
    "betas exchanged": {"value"},
    "average not updated": {"value"},
    "gradient of the sum lost": {"value"},
    "dropout forgotten": {"value"},
    "ends of k forgotten": {"refusal"},
    "kept statistics exchanged": {"value"},
    "products' operands exchanged": {"refusal"},
}


def test_every_mistake_can_still_be_planted() -> None:
    assert len(NAMED) == len(planted.MISTAKES) > 20
    for mistake in planted.MISTAKES:
        assert planted.planted(mistake) != mistake.old
    with pytest.raises(UserError, match="'gone': its old text is 0 times in norm.py, not once: 'nothing like it'"):
        planted.planted(planted.Mistake("gone", "norm", "nothing like it", ""))


@needs_emulator
@pytest.mark.parametrize("name", FEW)
def test_a_few_are_caught_where_they_should_be(name: str) -> None:
    (verdict,) = planted.judge([NAMED[name]])
    assert {level for level in ("schema", "refusal", "value") if getattr(verdict, level)} == FEW[name], verdict


@needs_emulator
def test_without_a_mistake_nothing_is_said() -> None:
    for file in sorted({m.file for m in planted.MISTAKES}):
        (verdict,) = planted.judge([planted.Mistake("none", file, "import torch\n", "import torch\n")])
        assert not verdict.caught, verdict
