"""Layers that know how tensor parallelism cuts their parameters, and run unchanged on one device."""

from .attention import Attention, KVCache
from .diffusion import CrossAttention, FinalPatches, Modulation, Patches, SelfAttention, TimeEmbedding
from .embedding import Embedding, TiedVocab, VocabHead
from .linear import Linear
from .mlp import FeedForward, SwiGLU
from .norm import LayerNorm, RMSNorm

__all__ = [
    "Attention",
    "CrossAttention",
    "Embedding",
    "FeedForward",
    "FinalPatches",
    "KVCache",
    "LayerNorm",
    "Linear",
    "Modulation",
    "Patches",
    "RMSNorm",
    "SelfAttention",
    "SwiGLU",
    "TiedVocab",
    "TimeEmbedding",
    "VocabHead",
]
