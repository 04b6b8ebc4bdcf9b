"""Layers that know how tensor parallelism cuts their parameters, and run unchanged on one device."""

from .attention import Attention, KVCache
from .embedding import Embedding, VocabHead
from .linear import Linear
from .mlp import SwiGLU
from .norm import RMSNorm

__all__ = ["Attention", "Embedding", "KVCache", "Linear", "RMSNorm", "SwiGLU", "VocabHead"]
