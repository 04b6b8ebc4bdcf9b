"""Operations with one signature on every device."""

from .adaln import adaln, gated_add
from .adamw import Update, adamw_, ema_adamw_
from .attention import attention, full_attention
from .experts import grouped_matmul, permute_tokens, unpermute_tokens
from .loss import cross_entropy
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm, rms_norm_given, sum_of_squares
from .rope import grid_rope_tables, rope, rope_interleaved, rope_tables
from .swiglu import swiglu
from .table import TABLE, Entry, Op, at_level, level, op

__all__ = [
    "TABLE",
    "Entry",
    "Op",
    "Update",
    "adaln",
    "add_layer_norm",
    "add_rms_norm",
    "adamw_",
    "at_level",
    "attention",
    "cross_entropy",
    "ema_adamw_",
    "full_attention",
    "gated_add",
    "grid_rope_tables",
    "grouped_matmul",
    "layer_norm",
    "level",
    "op",
    "permute_tokens",
    "rms_norm",
    "rms_norm_given",
    "rope",
    "rope_interleaved",
    "rope_tables",
    "sum_of_squares",
    "swiglu",
    "unpermute_tokens",
]
