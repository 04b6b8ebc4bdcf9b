"""The same network in plain PyTorch, as its published library would have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


class ReferenceConfig(PretrainedConfig):
    """The published configuration."""

    model_type = "template"


class Layer(nn.Module):
    """One block."""

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps)
        self.gate, self.up, self.down = (
            nn.Linear(a, b, bias=False) for a, b in ((width, hidden), (width, hidden), (hidden, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Reference(PreTrainedModel):
    """Logits ``[tokens, vocab]`` from the bytes before each position ``[window, tokens]``."""

    config_class = ReferenceConfig

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embedding = nn.Embedding(config.window * config.vocab_size, width)
        self.layers = nn.ModuleList(
            Layer(width, config.intermediate_size, config.rms_norm_eps) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, before: Tensor) -> Tensor:
        far = torch.arange(self.config.window)[:, None] * self.config.vocab_size
        x = self.embedding(before + far).sum(0)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
