"""Parts of one tensor side by side, and gradients that are not put together."""

import pytest
import torch
from mindspeed_model_core import ops
from mindspeed_model_core.ops.apart import empty_like_parts, joined

on_cuda = ops.apart.entries["cuda"][0].function


def parts(*widths, rows=(5, 2)):
    whole = torch.arange(float(sum(widths)) * rows[0] * rows[1]).view(*rows, sum(widths))
    return whole, whole.split(widths, -1)


@pytest.mark.parametrize("widths", [(4, 4), (6, 2, 1)])
def test_parts_of_one_tensor_are_joined_without_a_copy(widths):
    whole, each = parts(*widths)
    found = joined(each)
    assert torch.equal(found, whole) and found.data_ptr() == whole.data_ptr()
    assert torch.equal(joined(whole[..., 1:].split((2, whole.shape[-1] - 3), -1)), whole[..., 1:])


def test_what_is_not_side_by_side_is_not_joined():
    whole, (a, b) = parts(4, 4)
    others = [
        (b, a),
        (a, b.clone()),
        (a, a),
        (a, b[..., 1:]),
        (a, b[:4]),
        (whole.mT.split(1, -1)),
        (whole[..., ::2].split(2, -1)),
        (whole[..., :2], whole[..., 2:6], whole[..., 6:], whole[..., :0]),
        # The second's rows are the first's next ones.
        (whole.view(-1)[:64].view(8, 8), whole.view(-1)[8:72].view(8, 8)),
    ]
    assert [joined(each) for each in others] == [None] * len(others)


@pytest.mark.parametrize(("heads", "together"), [((4, 2, 2), 3), ((4, 4), 2)])
def test_room_lies_side_by_side_where_heads_do(heads, together):
    whole = torch.zeros(3, 5, sum(heads), 8)
    room = empty_like_parts(whole.split(heads, -2))
    assert [x.shape for x in room] == [(3, 5, n, 8) for n in heads]
    assert joined([x.flatten(-2) for x in room]).shape == (3, 5, 8 * sum(heads)) and len(room) == together


def test_room_of_the_last_few_lies_side_by_side():
    q, (k, v) = torch.zeros(3, 5, 4, 8), torch.zeros(3, 7, 4, 8).split(2, -2)
    room = empty_like_parts((q, k, v))
    assert [x.shape for x in room] == [q.shape, k.shape, v.shape]
    assert joined([x.flatten(-2) for x in room[1:]]) is not None
    narrow = torch.zeros(3, 7, 48).split((32, 16), -1)
    k, v = (x.unflatten(-1, (4, -1)) for x in narrow)
    assert [x.shape for x in empty_like_parts((q, k, v))] == [q.shape, k.shape, v.shape], "heads of unlike widths"
    room = empty_like_parts((q, k.clone(), v.mT.contiguous().mT))
    assert all(x.is_contiguous() for x in room) and [x.shape for x in room] == [q.shape, k.shape, v.shape]


class Summed(torch.autograd.Function):
    """Has its gradients side by side where its operands are, as attention."""

    @staticmethod
    def forward(ctx, *given):
        ctx.save_for_backward(*given)
        return sum(each.sum() for each in given)

    @staticmethod
    def backward(ctx, grad):
        made = empty_like_parts(ctx.saved_tensors)
        for number, each in enumerate(made):
            each.fill_(number)
        Summed.place = made[0].data_ptr()
        return tuple(made)


def test_a_gradient_that_lies_side_by_side_is_not_copied():
    x = torch.randn(6, 12, requires_grad=True)
    found = []
    x.register_hook(found.append)
    Summed.apply(*(y.unflatten(-1, (2, 2)).unflatten(0, (3, 2)) for y in on_cuda(x, 3))).backward()
    assert torch.equal(found[0], torch.tensor([0.0] * 4 + [1.0] * 4 + [2.0] * 4).expand(6, 12))
    assert found[0].data_ptr() == Summed.place


def test_gradients_that_lie_apart_are_put_together():
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: on_cuda(x, 3)[0] * on_cuda(x, 3)[2], x)
