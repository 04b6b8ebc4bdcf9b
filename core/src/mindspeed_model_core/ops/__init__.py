"""Operations with one signature on every device."""

from .adaln import adaln, gated_add
from .adamw import Update, adamw_, ema_adamw_
from .apart import apart
from .attention import ATTENTION, attention, full_attention
from .collective import all_gather_matmul, column_matmul, matmul_all_reduce, matmul_reduce_scatter
from .experts import grouped_matmul, permute_tokens, unpermute_tokens
from .gelu import join_gelu
from .keep import checkpointed, keeping
from .linear import PRODUCTS, Sum, accumulate_gradient, accumulate_product_, linear, sum_rows
from .loss import cross_entropy, linear_cross_entropy
from .low_rank import adapted_linear, add_low_rank
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm, rms_norm_given, sum_of_squares
from .ring import attention_backward, attention_with_lse, merge_attention
from .rope import grid_rope_tables, norm_rope, rope, rope_interleaved, rope_projected_, rope_tables
from .swiglu import swiglu
from .table import TABLE, Entry, Op, at_level, level, op

__all__ = [
    "ATTENTION",
    "PRODUCTS",
    "TABLE",
    "Entry",
    "Op",
    "Update",
    "adaln",
    "adapted_linear",
    "add_layer_norm",
    "add_low_rank",
    "add_rms_norm",
    "adamw_",
    "Sum",
    "accumulate_gradient",
    "accumulate_product_",
    "all_gather_matmul",
    "apart",
    "at_level",
    "attention",
    "checkpointed",
    "column_matmul",
    "attention_backward",
    "attention_with_lse",
    "cross_entropy",
    "ema_adamw_",
    "full_attention",
    "gated_add",
    "grid_rope_tables",
    "grouped_matmul",
    "join_gelu",
    "keeping",
    "layer_norm",
    "level",
    "linear",
    "linear_cross_entropy",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "merge_attention",
    "norm_rope",
    "op",
    "permute_tokens",
    "rms_norm",
    "rms_norm_given",
    "rope",
    "rope_interleaved",
    "rope_projected_",
    "rope_tables",
    "sum_of_squares",
    "sum_rows",
    "swiglu",
    "unpermute_tokens",
]
