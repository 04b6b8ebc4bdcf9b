"""A tokenizer for the smallest network, in the form of the published ones: for tests and demonstrations."""

from __future__ import annotations

from pathlib import Path

from .config import PRESETS

LANGUAGES = ("en", "zh", "de")


def write_tiny_tokenizer(folder: str | Path) -> Path:
    """Write a multilingual tokenizer of bytes for preset ``mini``, with timestamps for its sounds of 1 s."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import WhisperTokenizer

    config = PRESETS["mini"]
    vocab = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    names = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES)]
    names += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    vocab |= {name: len(vocab) + number for number, name in enumerate(names)}
    times = [f"<|{tick * 0.02:.2f}|>" for tick in range(config.max_source_positions + 1)]
    vocab |= {name: len(vocab) + number for number, name in enumerate(times)}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": names[1:]})
    tokenizer.save_pretrained(str(folder))
    return Path(folder)
