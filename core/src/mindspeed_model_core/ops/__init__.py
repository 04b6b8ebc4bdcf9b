"""Operations with one signature on every device."""

from .adaln import adaln, gated_add
from .attention import ATTENTION, attention, full_attention
from .loss import cross_entropy
from .norm import layer_norm, rms_norm, rms_norm_given, sum_of_squares
from .ring import attention_backward, attention_with_lse, merge_attention
from .rope import grid_rope_tables, rope, rope_interleaved, rope_tables
from .swiglu import swiglu
from .table import TABLE, Entry, Op, at_level, level, op

__all__ = [
    "ATTENTION",
    "TABLE",
    "Entry",
    "Op",
    "adaln",
    "at_level",
    "attention",
    "attention_backward",
    "attention_with_lse",
    "cross_entropy",
    "full_attention",
    "gated_add",
    "grid_rope_tables",
    "layer_norm",
    "level",
    "merge_attention",
    "op",
    "rms_norm",
    "rms_norm_given",
    "rope",
    "rope_interleaved",
    "rope_tables",
    "sum_of_squares",
    "swiglu",
]
