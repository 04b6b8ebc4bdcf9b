"""Tokenizers: opened from a local folder, checked against a model, or trained for a demonstration."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

FILES = ("tokenizer.json", "tokenizer.model")
PAIR = ("vocab.json", "merges.txt")
"""What older folders have instead: both."""
ALL_FILES = (
    *FILES,
    *PAIR,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "chat_template.jinja",
)
"""What a tokenizer's folder may hold of it: these travel with weights."""
KEPT = "tokenizer"
"""The folder, in a run's, of the tokenizer it was trained with."""
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
SPECIAL = ("<unk>", "<s>", "</s>")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in FILES) or all((folder / name).is_file() for name in PAIR)


def find_tokenizer(source: str | Path) -> Path | None:
    """Return the folder of the tokenizer that belongs to weights, or None.

    It is beside them; one folder up in Meta's releases; for a run or its checkpoint, what the run kept, or where its
    recipe had it from.
    """
    from .. import checkpoint

    folder = Path(source).expanduser()
    if has_tokenizer(folder):
        return folder
    above = folder.absolute().parent
    if (folder / "params.json").is_file() and (above / "tokenizer.model").is_file():
        return above
    if not checkpoint.is_checkpoint(folder):
        return None
    saved = checkpoint.locate(folder)
    kept = saved.absolute().parents[1] / KEPT
    return kept if has_tokenizer(kept) else recipe_tokenizer(checkpoint.read_info(saved)["recipe"])


def recipe_tokenizer(recipe: Mapping[str, Any]) -> Path | None:
    """Return the folder of the tokenizer a recipe's values name, or of that which belongs to its first weights."""
    named, weights = (recipe.get("data") or {}).get("tokenizer"), recipe.get("init_from")
    if named is None:
        return None if weights is None else find_tokenizer(weights)
    place = Path(named).expanduser()
    place = place.parent if place.is_file() else place
    return place if has_tokenizer(place) else None


def keep_tokenizer(source: Path, run: Path) -> None:
    """Copy a tokenizer into a run's folder, whole or not at all, unless one is there: the run stays whole without."""
    target = run / KEPT
    if target.exists():
        return
    draft = run / f".{KEPT}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    described = (source / "tokenizer_config.json").is_file()
    for name in ALL_FILES if described else (*ALL_FILES, "config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, draft / name)
    os.replace(draft, target)


def load_tokenizer(source: str | Path, vocab_size: int | None = None) -> Any:
    """Return the transformers tokenizer of a folder, or of the tokenizer.json or tokenizer.model file in one.

    Older folders have vocab.json and merges.txt instead, with the special tokens beside them. Reads local files only
    and never runs code that comes with them. A folder with a SentencePiece tokenizer.model alone, as in Meta's
    releases, is read as Llama's. With ``vocab_size`` a token the model has no embedding for is an error. Raises
    UserError if there is no tokenizer or it cannot be read.
    """
    folder = Path(source).expanduser()
    if folder.is_file() and folder.name in FILES:
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"tokenizer {source}: expected a folder, or a file named {' or '.join(FILES)}")
    if not has_tokenizer(folder):
        raise UserError(f"tokenizer {source}: no {' or '.join(FILES)} in this folder, nor {' with '.join(PAIR)}")
    described = any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
    if not described and not (folder / "tokenizer.model").is_file():
        raise UserError(f"tokenizer {source}: no tokenizer_config.json beside the vocabulary")
    from transformers import AutoTokenizer, LlamaTokenizer

    kind = AutoTokenizer if described else LlamaTokenizer
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"tokenizer {source}: cannot be read ({' '.join(str(error).split())})") from None
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise UserError if a token of the tokenizer has no row in an embedding of ``vocab_size`` rows."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path}: has {needed} tokens, the model's vocab_size is {vocab_size}; "
            f"use the tokenizer the weights were trained with, or config.vocab_size={needed}"
        )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return a text's tokens, without begin or end; text that spells a special token is text."""
    # Not verbose: packing cuts texts that are longer than the model's context, no warning is due.
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)


def fingerprint(tokenizer: Any) -> str:
    """Return 12 hex digits that change with the vocabulary, the merges or the begin and end tokens."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = fast.to_str() if fast is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    text = f"{tokenizer.bos_token_id}/{tokenizer.eos_token_id}/{rules}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path, *, overwrite: bool = False) -> Any:
    """Train a Llama-like BPE tokenizer that falls back to bytes, save it as a hub folder and return it.

    Ids: 0 unknown, 1 begin, 2 end, 3-258 bytes, then characters and merges; no token crosses a space and line
    breaks stay bytes. At most ``vocab_size`` tokens. Raises UserError if it is too small or ``folder`` exists.
    """
    target = Path(folder)
    room = vocab_size - len(SPECIAL) - len(BYTES)
    if room < 1:
        raise UserError(
            f"vocab_size={vocab_size}: must be above {len(SPECIAL) + len(BYTES)}, the special and byte tokens"
        )
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists already; choose another folder or allow overwriting")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    learner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    breaks = pre_tokenizers.Split(Regex(r"[\n\r\t]+"), "removed")
    learner.pre_tokenizer = pre_tokenizers.Sequence([breaks, pre_tokenizers.Metaspace()])
    # Characters beyond half of the room would leave no merges; rare ones are spelled in bytes.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *BYTES],
        limit_alphabet=max(1, room // 2),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = LlamaTokenizer(
        vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]], add_bos_token=True
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        tokenizer.save_pretrained(str(draft))
        for file in draft.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return load_tokenizer(target)
