"""What is computed again in backward, and what is kept."""

import pytest
import torch
from mindspeed_model_core import ops
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing import toy
from mindspeed_model_core.testing.recomputation import BLOCKS, LENGTHS, attend, check_kept
from torch.utils.checkpoint import checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("documents", LENGTHS)
def test_attention_can_be_kept(documents) -> None:
    check_kept(documents, CPU, torch.float32)


def test_what_is_kept_and_then_overwritten_is_not_taken_for_the_result() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = ops.keeping(torch.nn.functional.linear, x, torch.ones(3, 4))
        z = y.sin()
        with torch.no_grad():
            y.add_(1)
        return z

    x = torch.ones(2, 4, requires_grad=True)
    z = checkpoint(run, x, use_reentrant=False, context_fn=lambda: ops.checkpointed(ops.PRODUCTS))
    with pytest.raises(RuntimeError, match="was overwritten"):
        z.sum().backward()


def test_plain_formulas_have_no_result_of_attention_to_keep() -> None:
    with ops.at_level(0):
        assert attend("alike", True, "nothing", CPU, torch.float32)[0] == 0
        assert attend("alike", True, "products", CPU, torch.float32)[1] == 3 * BLOCKS
        with pytest.raises(UserError, match="recompute_keep=attention: plain formulas"):
            attend("alike", True, "attention", CPU, torch.float32)


def test_a_recipe_that_asks_for_both_is_refused() -> None:
    assert toy.recipe(recompute="all", recompute_keep="attention", optimization_level=1)
    with pytest.raises(ValueError, match="recompute_keep=attention: plain formulas"):
        toy.recipe(recompute="all", recompute_keep="attention", optimization_level=0)
