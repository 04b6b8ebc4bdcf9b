"""Documents by number, out of text, JSON-lines and Parquet files larger than memory."""

from __future__ import annotations

import glob
import hashlib
import json
import mmap
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import UserError, nearest
from .order import Group

KINDS = (".txt", ".jsonl", ".parquet")

_BLANK_LINE = re.compile(rb"\n[ \t\r\f\v]*\n\s*")
_LINE_END = re.compile(rb"\n\s*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ROW_GROUP_BUDGET = 256 * 2**20
_SAMPLE = 64 * 2**10
_PIECE = 1024


class _File(Protocol):
    path: Path

    def __len__(self) -> int: ...

    def groups(self) -> list[Group]: ...

    def read(self, number: int) -> str: ...


class Documents:
    """The documents of one or many files, in the order of the files' names, read when they are asked for.

    What stays in memory is 8 bytes per document of text and JSON-lines files, and the row counts of Parquet files.
    Only paths and numbers are kept, no open file, so worker processes can share it however they are started.
    """

    def __init__(self, files: Sequence[_File]) -> None:
        self.files = list(files)
        self.ends = list(accumulate(len(f) for f in self.files))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        which = bisect_right(self.ends, number)
        return self.files[which].read(number - (self.ends[which - 1] if which else 0))

    def gather(self, numbers: Sequence[int]) -> list[str]:
        """Return several documents, in the order of ``numbers``, reading together what must be."""
        texts = {number: self[number] for number in sorted(numbers)}
        return [texts[number] for number in numbers]

    def groups(self) -> list[Group] | None:
        """Return the groups that documents should be read in, or None where any one may be read at any time.

        Parquet decodes whole row groups; those of a small corpus are all held once they have been read.
        """
        tables = [group for file in self.files if isinstance(file, _Table) for group in file.groups()]
        if sum(group.nbytes for group in tables) <= _ROW_GROUP_BUDGET:
            return None
        return [group for file in self.files for group in file.groups()]

    def fingerprint(self) -> str:
        """Return 12 hex digits of the files' names, sizes, and first and last 64 KiB; moving them keeps it."""
        digest = hashlib.sha256()
        for each in self.files:
            size = each.path.stat().st_size
            digest.update(f"{each.path.name}/{size}/".encode())
            with open(each.path, "rb") as file:
                digest.update(file.read(_SAMPLE))
                file.seek(max(0, size - _SAMPLE))
                digest.update(file.read(_SAMPLE))
        return digest.hexdigest()[:12]


def open_documents(path: str, text_key: str = "text") -> Documents:
    """Index a file, every readable file below a folder, or what a glob matches; ``text_key`` is a key or a column.

    A .txt file holds documents separated by blank lines, a .jsonl file one JSON object per line, a .parquet file one
    document per row. The first document of each file is read at once, so that a wrong key fails here. Raises
    UserError for a path with nothing to read, an unknown kind of file, a missing key or column, or no document.
    """
    decoded = _Decoded()
    files = [_open(f, text_key, decoded) for f in _find(path)]
    documents = Documents(files)
    if not len(documents):
        raise UserError(f"{path}: holds no document; a .txt, .jsonl or .parquet file with text in it is needed")
    for file in files:
        if len(file):
            file.read(0)
    return documents


def _find(path: str) -> list[Path]:
    here = Path(path).expanduser()
    if here.is_dir():
        found = sorted(f for f in here.rglob("*") if f.suffix in KINDS and f.is_file())
        if not found:
            raise UserError(f"{path}: no {', '.join(KINDS)} file in this folder")
        return found
    if here.exists():
        return [here]
    matched = sorted(Path(f) for f in glob.glob(str(here), recursive=True) if Path(f).is_file())
    if not matched:
        siblings = [f.name for f in here.parent.iterdir()] if here.parent.is_dir() else []
        raise UserError(f"{path}: no such file or folder{nearest(here.name, siblings)}")
    return matched


def _open(path: Path, text_key: str, decoded: _Decoded) -> _File:
    if path.suffix not in KINDS:
        raise UserError(f"{path}: cannot read a {path.suffix or 'nameless'} file{nearest(path.suffix, KINDS)}")
    if path.suffix == ".parquet":
        return _Table(path, text_key, decoded)
    try:
        return _Lines(path, text_key) if path.suffix == ".jsonl" else _Paragraphs(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


class _Paragraphs:
    """Text separated by ``separator``; holds where each document starts, in bytes."""

    separator = _BLANK_LINE

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts = np.fromiter(self._scan(), np.int64)

    def __len__(self) -> int:
        return max(0, len(self.starts) - 1)

    def groups(self) -> list[Group]:
        ends = [*range(0, len(self), _PIECE), len(self)]
        return [Group(b - a, int(self.starts[b] - self.starts[a])) for a, b in pairwise(ends) if b > a]

    def _scan(self) -> Iterator[int]:
        size = self.path.stat().st_size
        if not size:
            return
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = len(_BYTE_ORDER_MARK) if data[:3] == _BYTE_ORDER_MARK else 0
            text = re.compile(rb"\s*").match(data, start)
            start = text.end() if text else start
            if start == size:
                return
            yield start
            for gap in self.separator.finditer(data, start):
                if gap.end() < size:
                    yield gap.end()
            yield size

    def read(self, number: int) -> str:
        start, end = int(self.starts[number]), int(self.starts[number + 1])
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                return file.read(end - start).strip().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self._where(start, error.start)}: not UTF-8 text; convert the file to UTF-8") from None
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from None

    def _where(self, start: int, offset: int = 0) -> str:
        """Return ``file:line`` of a byte; counted when it is needed, because only mistakes ask."""
        line, left = 1, start + offset
        with open(self.path, "rb") as file:
            while left > 0 and (chunk := file.read(min(left, 2**24))):
                line += chunk.count(b"\n")
                left -= len(chunk)
        return f"{self.path}:{line}"


class _Lines(_Paragraphs):
    """One JSON object per line."""

    separator = _LINE_END

    def __init__(self, path: Path, text_key: str) -> None:
        super().__init__(path)
        self.text_key = text_key

    def read(self, number: int) -> str:
        line = super().read(number)
        start = int(self.starts[number])
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._where(start)}: not a JSON object ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"{self._where(start)}: expected a JSON object, got {type(values).__name__}")
        if self.text_key not in values:
            raise UserError(f"{self._where(start)}: no key {self.text_key!r}{nearest(self.text_key, values)}")
        text = values[self.text_key]
        if not isinstance(text, str):
            raise UserError(f"{self._where(start)}: {self.text_key!r} must hold text, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can escape half of a pair that stands for one character; no tokenizer knows what that is.
            half = f"\\u{ord(text[error.start]):04x}"
            raise UserError(f"{self._where(start)}: {self.text_key!r} holds {half}, half a character") from None
        return text


class _Decoded:
    """The row groups read last, of all files, within a budget of bytes; each process has its own."""

    def __init__(self) -> None:
        self.held: OrderedDict[tuple[Path, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"held": OrderedDict()}

    def get(self, key: tuple[Path, int], read: Callable[[], Any]) -> Any:
        if key not in self.held:
            self.held[key] = read()
            while len(self.held) > 1 and sum(t.nbytes for t in self.held.values()) > _ROW_GROUP_BUDGET:
                self.held.popitem(last=False)
        self.held.move_to_end(key)
        return self.held[key]


class _Table:
    """One column of a Parquet file, of which whole row groups are decoded."""

    def __init__(self, path: Path, column: str, decoded: _Decoded) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from None
        self.path, self.column, self.decoded = path, column, decoded
        try:
            with parquet.ParquetFile(path) as file:
                meta = file.metadata
                names = file.schema_arrow.names
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from None
        if column not in names:
            raise UserError(f"{path}: no column {column!r}{nearest(column, names)}")
        rows = [meta.row_group(i) for i in range(meta.num_row_groups)]
        self.ends = list(accumulate(row.num_rows for row in rows))
        self.sizes = [_column_bytes(row, column) for row in rows]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def groups(self) -> list[Group]:
        ends = [0, *self.ends]
        return [Group(b - a, size) for (a, b), size in zip(pairwise(ends), self.sizes, strict=True) if b > a]

    def read(self, number: int) -> str:
        group = bisect_right(self.ends, number)
        try:
            text = self._group(group)[number - (self.ends[group - 1] if group else 0)].as_py()
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: row {number}: {self.column!r} is not UTF-8 text") from None
        if not isinstance(text, str):
            raise UserError(f"{self.path}: row {number}: {self.column!r} must hold text, got {type(text).__name__}")
        return text

    def _group(self, number: int) -> Any:
        return self.decoded.get((self.path, number), lambda: self._decode(number))

    def _decode(self, number: int) -> Any:
        import pyarrow.parquet as parquet

        try:
            # Arrow's own threads would not survive the fork of a loader's worker.
            with parquet.ParquetFile(self.path) as file:
                return file.read_row_group(number, columns=[self.column], use_threads=False).column(0)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: row group {number}: {' '.join(str(error).split())}") from None


def _column_bytes(group: Any, name: str) -> int:
    """Return the bytes of a row group's column, uncompressed."""
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == name)
