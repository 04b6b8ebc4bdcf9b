"""Reading training data: documents, packing, and loaders whose order depends on no layout and resumes exactly."""

from ..task import Loader
from .buckets import Bucket, BucketSource
from .features import FeatureSet, FeatureWriter
from .packing import IGNORE, Packed, pack
from .slots import SlotLoader
from .text import PackedText, RandomText, TextData
from .tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "IGNORE",
    "Bucket",
    "BucketSource",
    "FeatureSet",
    "FeatureWriter",
    "Loader",
    "Packed",
    "PackedText",
    "RandomText",
    "SlotLoader",
    "TextData",
    "load_tokenizer",
    "pack",
    "train_tokenizer",
]
