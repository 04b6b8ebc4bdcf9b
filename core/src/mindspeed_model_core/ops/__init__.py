"""Operations with one signature on every device."""

from .attention import attention
from .loss import cross_entropy
from .norm import rms_norm
from .rope import rope, rope_tables
from .swiglu import swiglu

__all__ = ["attention", "cross_entropy", "rms_norm", "rope", "rope_tables", "swiglu"]
