"""AdamW on the shards a process holds, one gradient norm over all of them, and learning-rate schedules."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from . import device as devices
from .ema import Average
from .parallel.apply import Parallel
from .parallel.shard import Shard
from .recipe import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 1) of ``steps``: linear warm-up, then the schedule."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over a process's shards.

    Matrices decay, vectors do not. Moments and update are in the master's dtype; a parameter that computes in another
    dtype gets its new value from the master. ``average`` is the masters' moving average, if the recipe asks for one.
    A gradient whose norm is not finite updates neither masters nor moments, except on an NPU.
    """

    def __init__(self, parallel: Parallel, config: OptimConfig) -> None:
        self.parallel, self.config = parallel, config
        self.shards = [s for s in parallel.shards.values() if s.trainable]
        self.average = Average(self.shards, config.ema) if config.ema is not None else None
        groups = [
            {"params": [s.master for s in self.shards if len(s.shape) > 1], "weight_decay": config.weight_decay},
            {"params": [s.master for s in self.shards if len(s.shape) <= 1], "weight_decay": 0.0},
        ]
        self.inner = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )

    def step(self, lr: float) -> Tensor:
        """Clip, update every master and parameter; return the gradient norm before clipping, on the device."""
        for shard in self.shards:
            # No gradient is a gradient of zero: moments, decay and step count are then the same under every layout.
            gradient = shard.gradient
            shard.master.grad = torch.zeros_like(shard.master) if gradient is None else gradient
        if self.average is not None:
            self.average.values()
        norm = self.clip()
        for group in self.inner.param_groups:
            group["lr"] = lr
        if devices.skips_updates(norm.device):
            # A norm that is not finite leaves masters and moments as they were; the kernel decides, nobody waits.
            self.inner.found_inf = norm.isfinite().logical_not_().float()  # type: ignore[attr-defined]
        self.inner.step()
        for shard in self.shards:
            shard.master.grad = None
        split = [s for s in self.shards if s.master.dtype != s.parameter.dtype]
        if split:
            with torch.no_grad():
                torch._foreach_copy_([s.local for s in split], [s.master for s in split])
        if self.average is not None:
            self.average.update()
        return norm

    def clip(self) -> Tensor:
        """Return the norm of the whole gradient, each element counted once over all processes; scale if too large."""
        mesh = self.parallel.mesh
        wide = torch.float64 if self.parallel.compute == torch.float64 else torch.float32
        grads = [s.master.grad for s in self.shards if s.counted and s.master.grad is not None and s.master.numel()]
        square = torch.zeros((), dtype=wide, device=mesh.device)
        if grads:
            square = torch.stack([n.to(wide) for n in torch._foreach_norm(grads)]).square().sum()
        if mesh.groups:
            dist.all_reduce(square)
        norm = square.sqrt()
        if self.config.clip is not None:
            factor = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([s.master.grad for s in self.shards if s.master.grad is not None], factor)
        return norm

    def moments(self, shard: Shard) -> dict[str, Tensor]:
        """Return a shard's optimizer state, made of zeros before the first step."""
        state = self.inner.state[shard.master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=shard.master.device)
            state["exp_avg"] = torch.zeros_like(shard.master)
            state["exp_avg_sq"] = torch.zeros_like(shard.master)
        return {key: state[key] for key in ("exp_avg", "exp_avg_sq")}

    def resume(self, step: int) -> None:
        """Count ``step`` updates as done."""
        for shard in self.shards:
            self.moments(shard)
            self.inner.state[shard.master]["step"].fill_(step)
