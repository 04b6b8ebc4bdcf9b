import math

import pytest
import torch
from mindspeed_model_core import ops

torch.manual_seed(0)


def _attention(q, k, v, lengths, causal):
    """The formula, in fp64, one document and one head at a time."""
    out, at = torch.empty_like(q), 0
    ratio = q.shape[1] // k.shape[1]
    for n in lengths:
        here = slice(at, at + n)
        for h in range(q.shape[1]):
            scores = q[here, h] @ k[here, h // ratio].T / math.sqrt(q.shape[-1])
            if causal:
                scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
            out[here, h] = scores.softmax(-1) @ v[here, h // ratio]
        at += n
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(7,), (1, 4, 2), (3, 3), (1, 1, 5)])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_attention_over_documents(lengths, kv, causal):
    q, k, v = (torch.randn(sum(lengths), h, 8, dtype=torch.float64, requires_grad=True) for h in (4, kv, kv))
    got, want = ops.attention(q, k, v, lengths, causal=causal), _attention(q, k, v, lengths, causal)
    assert torch.allclose(got, want, atol=1e-12)
    weight = torch.randn_like(want)
    grads = torch.autograd.grad((got * weight).sum(), (q, k, v))
    wants = torch.autograd.grad((want * weight).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(grads, wants, strict=True))


def test_rope_turns_pairs_by_position():
    positions, width, theta = torch.tensor([0, 1, 5]), 6, 10000.0
    x = torch.randn(3, 2, width, dtype=torch.float64)
    got = ops.rope(x, *ops.rope_tables(positions, width, theta))
    for i in range(width // 2):
        angle = positions.double() * theta ** (-2 * i / width)
        pair = torch.complex(x[..., i], x[..., i + width // 2]) * torch.exp(1j * angle)[:, None]
        assert torch.allclose(got[..., i], pair.real, atol=1e-6)
        assert torch.allclose(got[..., i + width // 2], pair.imag, atol=1e-6)


def test_norm_and_swiglu():
    x, w = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    assert torch.allclose(ops.rms_norm(x, w, 1e-5), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w)
    a, b = x.chunk(2, -1)
    assert torch.allclose(ops.swiglu(x), a * torch.sigmoid(a) * b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy(dtype):
    logits = (3 * torch.randn(6, 9)).to(dtype).requires_grad_()
    labels = torch.tensor([0, 8, -100, 3, 3, -100])
    got = ops.cross_entropy(logits, labels)
    exact = logits.detach().double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, labels, ignore_index=-100, reduction="none")
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(got.double(), want, atol=1e-12 if dtype == torch.float64 else 1e-5)
    assert got[2] == 0 and got[5] == 0
    weight = torch.arange(1.0, 7.0)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(logits.grad.double(), exact.grad, atol=bound)
