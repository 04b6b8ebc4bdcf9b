"""What torch_npu's fused operators compute, from their published formulas, and the rules of their documentation.

Importing this registers all of them.
"""

from . import attention, basic, communication, experts

__all__ = ["attention", "basic", "communication", "experts"]
