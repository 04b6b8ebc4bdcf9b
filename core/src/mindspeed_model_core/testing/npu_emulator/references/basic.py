"""Norms, activations, rotary embedding, loss and optimizer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import FLOATS, reference, require, rule

# --- norms


def _normed(x: Tensor, gamma: Tensor) -> list[int]:
    return list(range(x.dim() - gamma.dim(), x.dim()))


@rule("npu_rms_norm")
def _check_rms_norm(input: Tensor, gamma: Tensor, **_: object) -> None:
    require(input.dtype in FLOATS, f"input is fp16, bf16 or fp32, not {input.dtype}")
    tail = tuple(input.shape[input.dim() - gamma.dim() :])
    require(tail == tuple(gamma.shape), f"gamma {tuple(gamma.shape)} is the end of input's {tuple(input.shape)}")


@reference("npu_rms_norm")
def _rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Zhang and Sennrich 2019, arXiv:1910.07467; the second result is 1 / rms."""
    x = input.float()
    rstd = torch.rsqrt(x.square().mean(_normed(x, gamma), keepdim=True) + epsilon)
    return (x * rstd * gamma.float()).to(input.dtype), rstd


@reference("npu_rms_norm_backward")
def _rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dims = _normed(input, gamma)
    unit, grad = input.float() * rstd.float(), dy.float()
    scaled = grad * gamma.float()
    dx = rstd.float() * (scaled - unit * (scaled * unit).mean(dims, keepdim=True))
    return dx.to(input.dtype), (grad * unit).sum_to_size(gamma.shape)


@rule("npu_add_rms_norm")
def _check_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, **_: object) -> None:
    require(x1.shape == x2.shape and x1.dtype == x2.dtype, "x1 and x2 have one shape and one type")
    _check_rms_norm(x1, gamma)


@reference("npu_add_rms_norm")
def _add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    total = x1.float() + x2.float()
    y, rstd = _rms_norm(total, gamma, epsilon)
    return y.to(x1.dtype), rstd, total.to(x1.dtype)


@rule("npu_add_layer_norm")
def _check_add_layer_norm(x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, **_: object) -> None:
    require(x1.shape == x2.shape and x1.dtype == x2.dtype, "x1 and x2 have one shape and one type")
    require(x1.dtype in FLOATS, f"x1 is fp16, bf16 or fp32, not {x1.dtype}")
    require(gamma.shape == beta.shape and gamma.dtype == beta.dtype, "gamma and beta have one shape and one type")
    tail = tuple(x1.shape[x1.dim() - gamma.dim() :])
    require(tail == tuple(gamma.shape), f"gamma {tuple(gamma.shape)} is the end of x1's {tuple(x1.shape)}")


@reference("npu_add_layer_norm")
def _add_layer_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, epsilon: float = 1e-5, additional_output: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Ba et al. 2016, arXiv:1607.06450, of a sum; then mean, 1 / deviation, and the sum where it is asked for."""
    total = x1.float() + x2.float()
    dims = _normed(total, gamma)
    mean = total.mean(dims, keepdim=True)
    rstd = torch.rsqrt((total - mean).square().mean(dims, keepdim=True) + epsilon)
    y = (total - mean) * rstd * gamma.float() + beta.float()
    return y.to(x1.dtype), mean, rstd, total.to(x1.dtype) if additional_output else None


@reference("npu_add_layer_norm_backward")
def _add_layer_norm_backward(
    dy_opt: Tensor | None,
    x1: Tensor,
    x2: Tensor,
    rstd: Tensor,
    mean: Tensor,
    gamma: Tensor,
    dsum_opt: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dims, total = _normed(x1, gamma), x1.float() + x2.float()
    grad = torch.zeros_like(total) if dy_opt is None else dy_opt.float()
    unit, scaled = (total - mean) * rstd, grad * gamma.float()
    dx = rstd * (scaled - scaled.mean(dims, keepdim=True) - unit * (scaled * unit).mean(dims, keepdim=True))
    if dsum_opt is not None:
        dx = dx + dsum_opt.float()
    dx = dx.to(x1.dtype)
    return dx, dx, (grad * unit).sum_to_size(gamma.shape), grad.sum_to_size(gamma.shape)


# --- activations


@rule("npu_swiglu")
def _check_swiglu(input: Tensor, dim: int = -1) -> None:
    require(input.dtype in FLOATS, f"input is fp16, bf16 or fp32, not {input.dtype}")
    require(input.shape[dim] % 2 == 0, f"the halved dim {dim} of {tuple(input.shape)} is even")


@reference("npu_swiglu")
def _swiglu(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = input.float().chunk(2, dim)
    return (F.silu(gate) * up).to(input.dtype)


@reference("npu_swiglu_backward")
def _swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    gate, up = input.float().chunk(2, dim)
    grad, s = grad_output.float(), torch.sigmoid(gate)
    return torch.cat((grad * up * s * (1 + gate * (1 - s)), grad * gate * s), dim).to(input.dtype)


@reference("npu_gelu")
def _gelu(input: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(input, approximate=approximate)


@reference("npu_gelu_backward")
def _gelu_backward(grad_output: Tensor, input: Tensor, approximate: str = "none") -> Tensor:
    return torch.ops.aten.gelu_backward(grad_output, input, approximate=approximate)


@reference("npu_silu")
def _silu(input: Tensor) -> Tensor:
    return F.silu(input)


# --- rotary embedding


def _turned(x: Tensor, mode: str) -> Tensor:
    """Turn each pair of features by 90 degrees; a pair is split over the halves, or side by side."""
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


@rule("npu_rotary_mul")
def _check_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", **_: object) -> None:
    require(input.dim() == r1.dim() == 4, f"input and cos have 4 dims, not {input.dim()} and {r1.dim()}")
    require(r1.shape == r2.shape, "cos and sin have one shape")
    require(input.dtype in FLOATS and r1.dtype == r2.dtype == input.dtype, "all are of one type: fp16, bf16 or fp32")
    require(input.shape[-1] % 2 == 0 and input.shape[-1] < 896, f"the width {input.shape[-1]} is even and below 896")
    fits = all(b in (1, a) for a, b in zip(input.shape, r1.shape, strict=True)) and r1.shape[-1] == input.shape[-1]
    require(fits, f"cos {tuple(r1.shape)} spreads over input {tuple(input.shape)}")
    spread = [a for a, b in zip(input.shape[:3], r1.shape[:3], strict=True) if b == 1]
    if rotary_mode == "half":
        require(all(a < 1000 for a in spread), f"samples and heads are below 1000 each, not {spread}")
    else:
        require(len(spread) > 1, f"cos {tuple(r1.shape)} differs between tokens alone when pairs lie side by side")
        require(math.prod(spread) < 1000, f"samples times heads, {spread}, are below 1000 when pairs lie side by side")


@reference("npu_rotary_mul")
def _rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    x = input.float()
    return (r1.float() * x + r2.float() * _turned(x, rotary_mode)).to(input.dtype)


@reference("npu_rotary_mul_backward")
def _rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    g, x = grad.float(), input.float()
    dx = g * r1.float() - _turned(g * r2.float(), rotary_mode)  # a turn's transpose is the turn back
    dr1, dr2 = (g * x).sum_to_size(r1.shape), (g * _turned(x, rotary_mode)).sum_to_size(r2.shape)
    return dx.to(input.dtype), dr1.to(r1.dtype), dr2.to(r2.dtype)


# --- loss


@reference("npu_cross_entropy_loss")
def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, None, None]:
    logits = input.float()
    loss = F.cross_entropy(
        logits, target, weight, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    shaped = loss if reduction == "none" else loss.view(1)
    return shaped.to(input.dtype), logits.log_softmax(-1).to(input.dtype), None, None


@reference("npu_cross_entropy_loss_backward")
def _cross_entropy_backward(
    grad_loss: Tensor, log_prob: Tensor, target: Tensor, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    kept = target != ignore_index
    grad = log_prob.float().exp() - F.one_hot(target.clamp_min(0), log_prob.shape[1])
    scale = grad_loss.float()
    scale = scale[:, None] if reduction == "none" else scale / (kept.sum() if reduction == "mean" else 1)
    return (grad * kept[:, None] * scale).to(log_prob.dtype)


# --- optimizer


@rule("npu_apply_adam_w.out")
def _check_adam_w(
    grad: Tensor, amsgrad: bool | None, max_grad_norm: Tensor | None, out: list[Tensor], **_: object
) -> None:
    require(len(out) == 3, "out is the weight and its two moments")
    # Its numbers are handed over in grad's type.
    require(grad.dtype == torch.float32, f"grad is fp32: in {grad.dtype} a beta near 1 is 1")
    require(all(t.dtype == grad.dtype and t.shape == grad.shape for t in out), "grad and out have one shape and type")
    require(not amsgrad or max_grad_norm is not None, "amsgrad needs max_grad_norm")


@reference("npu_apply_adam_w.out")
def _adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: Tensor,
    max_grad_norm: Tensor | None,
    amsgrad: bool | None,
    maximize: bool | None,
    out: list[Tensor],
) -> tuple[Tensor, ...]:
    """Loshchilov and Hutter, arXiv:1711.05101; the powers are those before this step, the kernel multiplies once."""
    weight, first, second = out
    grad = -grad if maximize else grad
    first.mul_(beta1).add_(grad, alpha=1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    largest = second
    if amsgrad and max_grad_norm is not None:
        largest = torch.maximum(max_grad_norm, second, out=max_grad_norm)
    step = (first / (1 - beta1_power * beta1)) / ((largest / (1 - beta2_power * beta2)).sqrt() + epsilon)
    weight.sub_(lr * (step + weight_decay * weight))
    return weight, first, second


# --- formats: everything is plain here


@reference("_npu_format_cast", "_npu_format_cast.aclnn", "_npu_format_cast.input_dtype")
def _format_cast(input: Tensor, acl_format: int) -> Tensor:
    return input.clone()


@reference("npu_dtype_cast", "_npu_dtype_cast")
def _dtype_cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    return input.to(dtype)


@reference("npu_dtype_cast_backward", "_npu_dtype_cast_backward")
def _dtype_cast_backward(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.to(dtype)


@reference("npu_confusion_transpose")
def _confusion_transpose(input: Tensor, perm: list[int], shape: list[int], transpose_first: bool) -> Tensor:
    if transpose_first:
        return input.permute(perm).reshape(shape).contiguous()
    return input.reshape(shape).permute(perm).contiguous()


@reference("npu_scaled_masked_softmax")
def _scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float = 1, fixed_triu_mask: bool = False) -> Tensor:
    blocked = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1) if fixed_triu_mask else mask.bool()
    return (x.float() * scale).masked_fill(blocked, -10000.0).softmax(-1).to(x.dtype)
