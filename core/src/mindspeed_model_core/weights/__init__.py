"""Weights between this project's names and published layouts, streamed: memory stays at about a tensor per thread.

Training reads its slices straight from a published folder (``load``), a trained network goes back into one
(``save``), and ``convert`` turns any source into any layout.
"""

from .export import convert, save
from .source import DTYPES, check_folder, check_source, find_layout, load, open_source, read_config

__all__ = ["DTYPES", "check_folder", "check_source", "convert", "find_layout", "load", "open_source", "read_config",
           "save"]  # fmt: skip
