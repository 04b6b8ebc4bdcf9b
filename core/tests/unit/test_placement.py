import pytest
import torch
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.parallel import apply
from mindspeed_model_core.parallel.placement import Placement, placements
from mindspeed_model_core.parallel.shard import Shard
from mindspeed_model_core.recipe import ParallelConfig
from mindspeed_model_core.testing.toy import Toy, ToyConfig
from torch import nn


def test_stacked_parts_are_cut_one_by_one():
    whole = torch.arange(12.0)[:, None].expand(12, 3)
    cut = Placement(0, parts=(8, 4))
    assert cut.narrow(whole, 1, 2)[:, 0].tolist() == [4, 5, 6, 7, 10, 11]
    assert Placement(1).narrow(whole.T, 0, 4)[0].tolist() == [0, 1, 2]
    assert Placement().narrow(whole, 1, 2) is whole


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dp", [1, 2, 3, 5])
@pytest.mark.parametrize("placement", [Placement(), Placement(0), Placement(0, (8, 4, 4)), Placement(1)])
def test_rectangles_cover_the_whole_exactly_once(tp, dp, placement):
    whole = torch.arange(16.0 * 8).view(16, 8)
    seen = torch.zeros_like(whole)
    for tp_rank in range(tp):
        share = placement.narrow(whole, tp_rank, tp)
        per = -(-len(share) // dp)
        for dp_rank in range(dp):
            start = min(dp_rank * per, len(share))
            rows = (start, min(per, len(share) - start))
            local = share.narrow(0, *rows)
            shard = Shard("w", nn.Parameter(local), placement, whole.shape, tp_rank, tp, rows, True, True, True, local)
            for at, here in shard.rectangles():
                where = tuple(slice(a, a + n) for a, n in zip(at, local[here].shape, strict=True))
                assert torch.equal(whole[where], local[here])
                seen[where] += 1
    replicas = tp if placement.dim is None else 1
    assert torch.equal(seen, torch.full_like(seen, replicas))


def test_every_parameter_has_a_placement():
    net = Toy(ToyConfig())
    assert [n for n, _ in placements(net)] == [n for n, _ in net.named_parameters()]


@pytest.mark.parametrize(
    ("fields", "world", "message"),
    [
        ({"tp": 3}, 3, r"tp=3: does not divide the 10 heads of blocks.0.up.weight; valid: 1, 2$"),
        ({"pp": 3}, 3, r"pp=3: does not divide the 4 blocks; valid: 1, 2, 4"),
        ({"tp": 2, "pp": 2}, 6, r"does not divide the 6 processes; products that do: 1, 2, 3, 6"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(fields, world, message):
    with torch.device("meta"):
        net = Toy(ToyConfig())
    # Cut the table's refusal off: the rows of 12 do not hide the heads.
    net.table.placements = lambda: {}
    net.head.placements = lambda: {}
    with pytest.raises(UserError, match=message):
        apply.check(net, ParallelConfig(**fields), world)
