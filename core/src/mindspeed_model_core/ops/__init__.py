"""Operations with one signature on every device."""

from .adaln import adaln, gated_add
from .attention import attention, full_attention
from .collective import all_gather_matmul, column_matmul, matmul_all_reduce, matmul_reduce_scatter
from .linear import accumulate_gradient, accumulate_product_, linear
from .loss import cross_entropy
from .norm import layer_norm, rms_norm, rms_norm_given, sum_of_squares
from .rope import grid_rope_tables, rope, rope_interleaved, rope_tables
from .swiglu import swiglu
from .table import TABLE, Entry, Op, at_level, level, op

__all__ = [
    "TABLE",
    "Entry",
    "Op",
    "accumulate_gradient",
    "accumulate_product_",
    "adaln",
    "all_gather_matmul",
    "at_level",
    "attention",
    "column_matmul",
    "cross_entropy",
    "full_attention",
    "gated_add",
    "grid_rope_tables",
    "layer_norm",
    "level",
    "linear",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "op",
    "rms_norm",
    "rms_norm_given",
    "rope",
    "rope_interleaved",
    "rope_tables",
    "sum_of_squares",
    "swiglu",
]
