"""The ``evaluate`` command: what is heard of a list of sounds, and how far it is from what is said."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from mindspeed_model_core import checkpoint
from mindspeed_model_core.data.ahead import ahead
from mindspeed_model_core.data.audio import read_audio, seconds
from mindspeed_model_core.data.clips import BadFiles, naming
from mindspeed_model_core.data.ranks import spread
from mindspeed_model_core.data.tokenizer import fingerprint
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.files import publish
from mindspeed_model_core.sampling import Overwrite, check_options
from rich.console import Console
from torch import Tensor

from .data import HOP, RATE, SPACELESS, Line, read_lines
from .generate import (
    Beams,
    Device,
    Dtype,
    Ema,
    Source,
    Task,
    Tokenizer,
    Transcriber,
    hearing,
    open_transcriber,
)
from .weights import GENERATION, LAYOUTS

Heard = tuple[int, str]
Normalizer = Literal["english", "basic", "none"]

_HEARD_WITH = (*(pattern for layout in LAYOUTS for pattern in layout.files.patterns), GENERATION)
"""The files of a folder that a text depends on, beside the tokenizer's."""
_VOWELS = tuple(
    "BENGALI DEVANAGARI GUJARATI GURMUKHI KANNADA KHMER LAO MALAYALAM MYANMAR ORIYA SINHALA TAMIL TELUGU THAI TIBETAN "
    "JAVANESE BALINESE SUNDANESE THAANA".split()
)
"""Scripts, by how the names of their characters begin, that write vowels as marks."""


# ------------------------------------------------------------------------------------------------ errors


def distance(want: Sequence[Hashable], got: Sequence[Hashable]) -> int:
    """Return how few insertions, deletions and replacements turn one into the other (Levenshtein 1966)."""
    numbers: dict[Hashable, int] = {}
    wanted, found = (np.array([numbers.setdefault(each, len(numbers)) for each in text]) for text in (want, got))
    row = steps = np.arange(len(got) + 1)
    for count, each in enumerate(wanted, 1):
        # Replacements and deletions, then insertions of any length: whole talks are compared by their letters.
        best = np.minimum(row[1:] + 1, row[:-1] + (found != each))
        row = np.minimum.accumulate(np.concatenate(([count], best)) - steps) + steps
    return int(row[-1])


def error_rate(pairs: Sequence[tuple[Sequence[Hashable], Sequence[Hashable]]]) -> float:
    """Return the errors over what is wanted in all (wanted, found) words or characters.

    UserError if nothing is wanted: there is no rate of nothing.
    """
    wanted = sum(len(want) for want, _ in pairs)
    if not wanted:
        raise UserError("evaluate: all texts are empty, there is no rate of errors")
    return sum(distance(want, got) for want, got in pairs) / wanted


def normalizing(kind: Normalizer, spelling: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Return what makes of a text the one that errors are counted in (Radford et al. 2022, appendix C).

    ``basic`` leaves out case, punctuation and what is in brackets; ``english`` also fillers, and writes contractions,
    numbers and, by the map ``spelling``, British words in one way; ``none`` is the text.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if kind == "none":
        return str.strip
    if kind == "english":
        english = EnglishTextNormalizer(dict(spelling or {}))
        return lambda text: str(english(text)).strip()
    basic = BasicTextNormalizer()
    # The paper's leaves out every mark, and with them the vowels of Hindi, Tamil, Thai and others.
    basic.clean = _clean
    return lambda text: str(basic(text)).strip()


def _clean(text: str) -> str:
    return "".join(character if _stays(character) else " " for character in unicodedata.normalize("NFKC", text))


def _stays(character: str) -> bool:
    kind = unicodedata.category(character)[0]
    return kind not in "MSP" or (kind == "M" and unicodedata.name(character, "").startswith(_VOWELS))


# ------------------------------------------------------------------------------------------------ hearing


def hear(
    transcriber: Transcriber,
    lines: Sequence[Line],
    lengths: Sequence[float],
    *,
    task: str = "transcribe",
    beams: int = 1,
    batch: int = 8,
    bad: BadFiles | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> Iterator[list[Heard]]:
    """Yield the numbers of lines with what is heard of them, ``batch`` sounds of one language at once.

    Sounds longer than the network hears come alone. A sound that cannot be read goes to ``bad``. ``advance`` is told
    the seconds of sound that were dealt with; ``lengths`` are those of the lines, by which few are read ahead if some
    are long.
    """
    most = transcriber.net.config.frames * HOP
    groups: dict[str, list[tuple[int, Tensor]]] = {}
    bad = BadFiles("stop", "--on-bad skip") if bad is None else bad

    def read(line: Line) -> Tensor | UserError:
        try:
            with naming(line.where):
                return read_audio(line.path, RATE)
        except UserError as error:
            return error

    def take(group: list[tuple[int, Tensor]]) -> list[Heard]:
        numbers, sounds = zip(*group, strict=True)
        first = lines[numbers[0]]
        with naming(first.where):
            found = transcriber.several(sounds, language=first.language, task=task, beams=beams, advance=advance)
        return [(number, each.text) for number, each in zip(numbers, found, strict=True)]

    # A sound of an hour is 230 MB.
    count = min(batch, 2) if max(lengths, default=0.0) * RATE > most else batch
    for number, audio in enumerate(ahead(lines, read, count)):
        if isinstance(audio, UserError):
            bad.found_late(audio)
            continue
        if len(audio) > most:
            yield take([(number, audio)])
            continue
        group = groups.setdefault(lines[number].language, [])
        group.append((number, audio))
        if len(group) == batch:
            yield take(groups.pop(lines[number].language))
    for group in groups.values():
        yield take(group)


class Draft:
    """What an evaluation heard so far, in ``FILE.part``, a line at a time: the same command goes on from there.

    Its first line says what the texts were heard with. UserError for one of other settings, and while another process
    writes to it. When it is left early, it says how many of ``total`` sounds are kept.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], total: int) -> None:
        self.out, self.path, self.total = out, out.with_name(f"{out.name}.part"), total
        self.held: dict[tuple[str | int, ...], str] = {}
        self.sizes: dict[Path, int] = {}
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        try:
            self._lock()
            self._read(settings)
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.file.close()
        if kind is not None:
            print(
                f"{self.out}: stopped at {len(self.held)} of {self.total} sounds; they are kept in {self.path}, the "
                "same command goes on from there",
                file=sys.stderr,
            )

    def _lock(self) -> None:
        """Keep other processes out while this one lives; without effect where files have no locks."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that ended between the two calls has taken its file away.
            free = os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except (BlockingIOError, FileNotFoundError):
            free = False
        except OSError:  # a network file system may have none
            free = True
        if not free:
            raise UserError(f"{self.path}: another evaluate writes to it; wait, or choose another --out")

    def _read(self, settings: Mapping[str, Any]) -> None:
        self.file.seek(0)
        whole = self.file.read()
        whole = whole[: whole.rfind(b"\n") + 1]  # a process that is killed may leave a part of a line
        self.file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("heard", ""), str):
                    raise TypeError(row)
                if number == 1:
                    self._check(row, settings)
                else:
                    self.held[row["audio"], row["text"], row["language"], row["size"]] = row["heard"]
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{self.path}:{number}: is damaged; remove the file to begin anew") from None
        if not whole:
            self._append(settings)

    def _check(self, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"{self.path}: was begun with {name} {before.get(name)}, now it is {value}; repeat that, or remove "
                    "the file to begin anew"
                )

    def find(self, line: Line) -> str | None:
        """Return what was heard of a line, if it was and its sound has the size that it had."""
        return self.held.get(self._key(line))

    def add(self, line: Line, heard: str) -> None:
        """Keep what was heard of a line."""
        self.held[self._key(line)] = heard
        self._append({**_row(line, heard), "language": line.language, "size": self.sizes[line.path]})

    def _key(self, line: Line) -> tuple[str | int, ...]:
        if line.path not in self.sizes:
            self.sizes[line.path] = line.path.stat().st_size
        return str(line.path), line.text, line.language, self.sizes[line.path]

    def _append(self, row: Mapping[str, Any]) -> None:
        self.file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self.file.flush()

    def finish(self, rows: Sequence[tuple[Line, str]]) -> None:
        """Write the output in the order of the list, whole."""
        draft = self.out.with_name(f".{self.out.name}.tmp")
        text = "".join(json.dumps(_row(line, heard), ensure_ascii=False) + "\n" for line, heard in rows)
        draft.write_text(text, encoding="utf-8")
        publish(draft, self.out)
        self.path.unlink()


def _row(line: Line, heard: str) -> dict[str, str]:
    return {"audio": str(line.path), "text": line.text, "heard": heard}


# ------------------------------------------------------------------------------------------------ the command


def evaluate_command(
    source: Source,
    listed: Annotated[Path, typer.Argument(metavar="LIST", help="Sounds and their texts: .jsonl, .csv or .tsv.")],
    language: Annotated[str, typer.Option(metavar="CODE", help="The language of lines that name none.")] = "en",
    task: Task = "transcribe",
    beams: Beams = 1,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sounds heard at once.")] = 8,
    normalizer: Annotated[
        Normalizer | None,
        typer.Option(help="What is left out of both texts.  \\[default: english for English, else basic]"),
    ] = None,
    on_bad: Annotated[Literal["stop", "skip"], typer.Option(help="What a file that cannot be used does.")] = "stop",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each text and what was heard, .jsonl.")
    ] = None,
    overwrite: Overwrite = False,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = None,
    ema: Ema = False,
) -> None:
    """Count the errors of transcripts: of words (WER) and of characters (CER).

    \b
    [green]$ mindspeed-whisper evaluate whisper-small cv-corpus/hi/test.tsv --language hi --out heard.jsonl[/green]
    """
    lines = read_lines(listed, language)
    if out is not None:
        check_options(out, (".jsonl",), overwrite, dtype)
        if out.exists() and out.samefile(listed):
            raise UserError(f"--out={out}: is the list itself; choose another name")
    transcriber = open_transcriber(source, tokenizer, device, dtype, ema=ema)
    bad = BadFiles(on_bad, "--on-bad skip")
    usable, lengths = _usable(transcriber, lines, task, bad)
    if not usable:
        raise UserError(f"{listed}: none of its {len(lines)} sounds can be used")
    if not any(line.text.strip() for line in usable):
        raise UserError(f"{listed}: all texts are empty, there is no rate of errors")
    heard: dict[int, str] = {}
    with ExitStack() as stack:
        draft = None
        if out is not None:
            draft = stack.enter_context(Draft(out, _settings(transcriber, source, task, beams, ema), len(usable)))
            heard = {number: said for number, line in enumerate(usable) if (said := draft.find(line)) is not None}
        left = [number for number in range(len(usable)) if number not in heard]
        todo, seconds_left = [usable[number] for number in left], [lengths[number] for number in left]
        with hearing(sum(seconds_left)) as advance:
            options: dict[str, Any] = {"task": task, "beams": beams, "batch": batch, "bad": bad, "advance": advance}
            for group in hear(transcriber, todo, seconds_left, **options):
                for number, said in group:
                    heard[left[number]] = said
                    if draft is not None:
                        draft.add(todo[number], said)
        if not heard:
            raise UserError(f"{listed}: none of its {len(lines)} sounds can be used")
        pairs = [(usable[number], heard[number]) for number in sorted(heard)]
        if draft is not None:
            draft.finish(pairs)
    said = report(pairs, normalizer, task, getattr(transcriber.prompts.tokenizer, "english_spelling_normalizer", None))
    skipped = f" ({len(bad)} skipped)" if len(bad) else ""
    Console(highlight=False, soft_wrap=True).print(f"{len(pairs)} sounds{skipped}: {said}")


def report(
    pairs: Sequence[tuple[Line, str]],
    normalizer: Normalizer | None,
    task: str,
    spelling: Mapping[str, str] | None,
) -> str:
    """Return the error rates of (line, heard) in words, and which normalizers they were counted with.

    There is no rate of words where none of the texts has spaces between them.
    """
    texts: list[tuple[str, str, str]] = []
    used: dict[Normalizer, Callable[[str], str]] = {}
    for line, heard in pairs:
        written = "en" if task == "translate" else line.language
        kind: Normalizer = normalizer or ("english" if written == "en" else "basic")
        if kind not in used:
            used[kind] = normalizing(kind, spelling)
        texts.append((written, used[kind](line.text), used[kind](heard)))
    spaced = [(want.split(), got.split()) for written, want, got in texts if written not in SPACELESS]
    letters = error_rate([(want.replace(" ", ""), got.replace(" ", "")) for _, want, got in texts])
    words = f"WER {error_rate(spaced):.2%}, " if any(want for want, _ in spaced) else ""
    without = ""
    if "english" in used and not spelling:
        without = ", whose map of spellings is not there: the tokenizer has no normalizer.json"
    return f"{words}CER {letters:.2%}; normalizer: {' and '.join(sorted(used))}{without}"


def _usable(
    transcriber: Transcriber, lines: Sequence[Line], task: str, bad: BadFiles
) -> tuple[list[Line], list[float]]:
    """Return the lines that can be heard and the seconds of each, as their headers tell; the others go to ``bad``."""

    def look(line: Line) -> float:
        with naming(line.where):
            transcriber.prompts.before(line.language, task, timestamps=False)
            return seconds(line.path)

    found = []
    for line, length in zip(lines, spread(look, lines), strict=True):
        if isinstance(length, UserError):
            bad.add(length)
        else:
            found.append((line, length))
    bad.report(len(lines))
    return [line for line, _ in found], [length for _, length in found]


def _settings(transcriber: Transcriber, source: Path, task: str, beams: int, ema: bool) -> dict[str, Any]:
    """Return what a text depends on besides its sound."""
    run = checkpoint.is_checkpoint(source)
    place = checkpoint.locate(source) if run else source.expanduser()
    return {
        "SRC": str(place.absolute()),
        "files of SRC": None if run else _digest(place),
        "tokenizer": fingerprint(transcriber.prompts.tokenizer),
        "--task": task,
        "--beams": beams,
        "--ema": ema,
        "--dtype": str(next(transcriber.net.parameters()).dtype).removeprefix("torch."),
    }


def _digest(folder: Path) -> str:
    """Return 12 hex digits that change when a folder's weights or settings are replaced, which keep their names."""
    files = sorted(path for pattern in _HEARD_WITH for path in folder.glob(pattern))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:12]
