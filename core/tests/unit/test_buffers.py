"""How large HCCL's buffers are made."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from mindspeed_model_core import recipe as recipes
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.parallel import buffers

sys.path.insert(0, str(Path(__file__).parent))
from toy_zoo import MODEL, ToyRecipe

WIDE = {"width": 2**17, "heads": 4, "kv_heads": 4}
TOKENS = 2 * 16  # of a micro-batch of 2


def sizes(**parallel: Any) -> dict[str, int]:
    fields: dict[str, Any] = {
        "preset": "tiny",
        "precision": "bf16",
        "global_batch": 8,
        "micro_batch": 2,
        "config": WIDE,
    }
    return buffers.sizes(ToyRecipe(**fields, parallel=parallel), MODEL)


def test_named_groups_have_their_size_and_others_hccls() -> None:
    assert sizes(tp=2) == {}
    assert sizes(tp=2, hccl_buffers={"tp": 300, "replicas": 64}) == {"tp": 300, "replicas": 64}


def test_the_adaptive_rule_is_the_largest_message() -> None:
    """A State of 32 tokens in bf16 takes 8 MB at this width."""
    whole = math.ceil(TOKENS * WIDE["width"] * 2 / 2**20)
    assert whole == 8
    auto = {"auto": True}
    assert sizes(tp=2, hccl_buffers=auto) == {"tp": 2 * whole}
    assert sizes(tp=2, sequence=True, pp=2, hccl_buffers=auto) == {"tp": whole, "pp": whole // 2}
    assert sizes(cp=2, pp=2, hccl_buffers=auto) == {"cp": 3 * whole // 2, "pp": whole // 2}
    assert sizes(tp=2, hccl_buffers={"auto": True, "tp": 77, "dp": 5}) == {"tp": 77, "dp": 5}


def test_a_recipe_without_them_keeps_its_digest() -> None:
    plain = ToyRecipe(preset="tiny")
    assert plain.digest() == ToyRecipe(preset="tiny", parallel={"hccl_buffers": None}).digest()
    assert plain.digest() != ToyRecipe(preset="tiny", parallel={"hccl_buffers": {"tp": 2}}).digest()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parallel.hccl_buffers.tb=3", "unknown key 'tb'; did you mean 'tp'"),
        ("parallel.hccl_buffers.tp=0", "parallel.hccl_buffers.tp=0: Input should be greater than 0"),
    ],
)
def test_mistakes_name_the_field(override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        recipes.load(ToyRecipe, "toy_zoo", "base", [override])
    assert said in str(error.value)
