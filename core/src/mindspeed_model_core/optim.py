"""AdamW on the shards a process holds, one gradient norm over all of them, and learning-rate schedules."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from . import device as devices
from . import ops
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
        groups = [s for s in self.shards if len(s.shape) > 1], [s for s in self.shards if len(s.shape) <= 1]
        self.groups = [(g, d) for g, d in zip(groups, (config.weight_decay, 0.0), strict=True) if g]
        self.skips = devices.skips_updates(parallel.mesh.device)
        self.count = torch.zeros((), dtype=torch.float32, device=parallel.mesh.device)
        self.state: dict[str, dict[str, Tensor]] = {}

    def step(self, lr: float) -> Tensor:
        """Clip, update every master and parameter; return the gradient norm before clipping, on the device."""
        # No gradient is a gradient of zero: moments and decay are then the same under every layout.
        grads = {s.name: torch.zeros_like(s.master) if s.gradient is None else s.gradient for s in self.shards}
        norm, clip = self._norm(grads), self.config.clip
        divisor = None if clip is None else ((norm + 1e-6) / clip).clamp(min=1.0)
        # A norm that is not finite leaves masters and moments as they were; the kernel decides, nobody waits.
        skip = norm.isfinite().logical_not_().float() if self.skips else None
        self.count += 1
        for shards, weight_decay in self.groups:
            update = ops.Update(self.count, lr, self.config.betas, self.config.eps, weight_decay, skip, divisor)
            self._update(shards, [grads[s.name] for s in shards], update)
        if skip is not None:
            self.count -= skip
        split = [s for s in self.shards if s.master.dtype != s.parameter.dtype]
        if split:
            with torch.no_grad():
                torch._foreach_copy_([s.local for s in split], [s.master for s in split])
        return norm

    def _update(self, shards: list[Shard], grads: list[Tensor], update: ops.Update) -> None:
        masters, moments = [s.master for s in shards], [self.moments(s) for s in shards]
        operands = masters, grads, [m["exp_avg"] for m in moments], [m["exp_avg_sq"] for m in moments]
        if self.average is None:
            ops.adamw_(*operands, update)
        else:
            averages = self.average.values()
            ops.ema_adamw_(*operands, [averages[s.name] for s in shards], update, self.average.decay)

    def _norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """Return the norm of the whole gradient, each element counted once over all processes."""
        mesh = self.parallel.mesh
        wide = torch.float64 if self.parallel.compute == torch.float64 else torch.float32
        grads = [gradients[s.name] for s in self.shards if s.counted and s.master.numel()]
        square = torch.zeros((), dtype=wide, device=mesh.device)
        if grads:
            square = torch.stack(torch._foreach_norm(grads, dtype=wide)).to(wide).square().sum()
        if mesh.groups:
            dist.all_reduce(square)
        return square.sqrt()

    @property
    def moved(self) -> int:
        """Return the bytes a step must read and write here at least, to clip, to update and to hand parameters over."""
        total = 0
        for shard in self.shards:
            count, width = shard.master.numel(), shard.master.element_size()
            # The norm reads gradients, each once over all processes. The update reads gradient, master and two moments
            # and writes the last three; an average it reads and writes.
            total += count * width * (shard.counted + 7)
            if self.average is not None:
                total += 2 * count * max(width, 4)
            if shard.master.dtype != shard.parameter.dtype:
                total += count * (width + shard.parameter.element_size())
        return total

    def moments(self, shard: Shard) -> dict[str, Tensor]:
        """Return a shard's optimizer state, made of zeros before the first step."""
        if shard.name not in self.state:
            self.state[shard.name] = {key: torch.zeros_like(shard.master) for key in ("exp_avg", "exp_avg_sq")}
        return self.state[shard.name]

    def resume(self, step: int) -> None:
        """Count ``step`` updates as done."""
        self.count.fill_(step)
