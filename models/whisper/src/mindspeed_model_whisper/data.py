"""What Whisper learns from: lists of sounds and their texts, log-mel features, and the tokens around a text."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from mindspeed_model_core.data import IGNORE, SlotLoader, load_tokenizer
from mindspeed_model_core.data.audio import read_audio, seconds
from mindspeed_model_core.data.clips import BadFiles, content, naming, open_reader
from mindspeed_model_core.data.media import column, read_rows
from mindspeed_model_core.data.noise import noise
from mindspeed_model_core.data.ranks import spread
from mindspeed_model_core.data.tokenizer import encode, find_tokenizer, fingerprint
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.recipe import Recipe, Section, local
from mindspeed_model_core.trunk import Batch
from mindspeed_model_core.weights import check_folder
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from .config import WhisperConfig

RATE, WINDOW, HOP = 16000, 400, 160
"""Samples a second, in a window of the spectrogram, and from one window to the next."""
TICK = 0.02
"""Seconds from one timestamp to the next."""
_PART = 3000  # windows of a spectrogram that are made at a time
SLACK = 0.1
"""Seconds that a sound may be longer than its header says: codecs fill up their last packet."""
MULTIPLE = 8
"""Texts of a micro-batch are padded to a multiple of so many tokens."""

SPACELESS = ("zh", "ja", "th", "lo", "my", "yue")
"""Languages without spaces between words, as the release lists them, which no joining adds and no counting needs."""

_FILES, _TEXTS = ("audio", "path", "file"), ("text", "sentence", "transcription")
_LANGUAGES = ("language", "locale")

Sample = dict[str, Any]


class WhisperData(Section):
    """Which sounds a network learns from, and what it is told of them."""

    path: str | None = local(None, description="a list of sounds and their texts: .jsonl, .csv, or Common Voice's .tsv")
    tokenizer: str | None = local(None, description="a folder with Whisper's tokenizer; null: that of init_from")
    language: str = Field("en", description="the language of lines that name none")
    task: Literal["transcribe", "translate"] = Field("transcribe", description="what the texts are of the sounds")
    timestamps: bool = Field(False, description="whether texts have the times of their segments")
    on_bad: Literal["stop", "skip"] = Field("stop", description="what a file that cannot be used does to the run")
    workers: NonNegativeInt = local(0, description="processes that read ahead on each rank; 0: the training process")
    synthetic: PositiveInt = Field(448, description="tokens of measure's random texts")


# ------------------------------------------------------------------------------------------------ features


def log_mel(audio: Tensor, mels: int, frames: int) -> Tensor:
    """Return Whisper's features of a sound, fp32 ``[mels, frames]``, as transformers' WhisperFeatureExtractor's.

    ``audio`` is fp32 ``[samples]`` at 16 kHz, cut or filled with silence to ``frames`` of 10 ms. Powers of windows of
    25 ms, in mel bands, as logarithms within 8 decades of the loudest, scaled to about -1 to 1.
    """
    size = frames * HOP
    audio = F.pad(audio[:size], (0, max(0, size - len(audio))))
    audio = F.pad(audio[None], (WINDOW // 2, WINDOW // 2), mode="reflect")[0]
    window, bands = torch.hann_window(WINDOW, device=audio.device), mel_bands(mels).to(audio.device).T
    logs = torch.empty(mels, frames, device=audio.device)
    for begin in range(0, frames, _PART):  # a spectrum of hours would be larger than all else
        end = min(begin + _PART, frames)
        part = audio[begin * HOP : (end - 1) * HOP + WINDOW]
        power = torch.stft(part, WINDOW, HOP, window=window, center=False, return_complex=True).abs() ** 2
        logs[:, begin:end] = (bands @ power).clamp_min_(1e-10).log10_()
    return logs.clamp_min_(float(logs.max()) - 8).add_(4).div_(4)


@functools.cache
def mel_bands(mels: int) -> Tensor:
    """Return triangular mel bands of equal area ``[WINDOW / 2 + 1, mels]`` from 0 to 8 kHz (Slaney 1998).

    The scale is linear below 1 kHz, 3 mel to 200 Hz, and logarithmic above, 27 mel to a factor of 6.4.
    """
    knee, step = 1000 * 3 / 200, math.log(6.4) / 27
    top = knee + math.log(RATE / 2 / 1000) / step
    points = np.linspace(0, top, mels + 2)
    hertz = np.where(points < knee, points * 200 / 3, 1000 * np.exp(step * (points - knee)))
    at = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    low, middle, high = hertz[:-2], hertz[1:-1], hertz[2:]
    bands = np.maximum(0, np.minimum((at - low) / (middle - low), (high - at) / (high - middle)))
    return torch.from_numpy(bands * (2 / (high - low))).float()


# ------------------------------------------------------------------------------------------------ tokens


RELEASED = (51864, 51865, 51866)
"""Sizes of the released vocabularies: English alone, 99 languages, 100."""
WORDS = 50256
"""Tokens of text, which begin the smallest of them."""
TIMES = 1501
"""Tokens of times, from 0 to 30 s, which end a vocabulary."""


class Prompts:
    """Puts texts between Whisper's special tokens; UserError where the tokenizer lacks one."""

    def __init__(self, tokenizer: Any, config: WhisperConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.known = tokenizer.get_vocab()
        for name, want in (
            ("<|startoftranscript|>", config.decoder_start_token_id),
            ("<|endoftext|>", config.eos_token_id),
        ):
            if self.token(name) != want:
                raise UserError(
                    f"tokenizer {tokenizer.name_or_path}: {name} is {self.token(name)}, the model's is {want}; use the "
                    "tokenizer that goes with the weights"
                )
        self.first_time = self.token("<|notimestamps|>") + 1
        # Releases differ by a language, which moves all that comes after it.
        released = config.vocab_size in RELEASED and config.eos_token_id >= WORDS
        if released and self.first_time + TIMES != config.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path}: its {TIMES} times would end at {self.first_time + TIMES}, the "
                f"model's at {config.vocab_size}: it is another release's; use the tokenizer that goes with the weights"
            )

    @functools.cached_property
    def languages(self) -> dict[str, int]:
        """The tokens of languages, which lie between the start and the tasks."""
        start, tasks = self.config.decoder_start_token_id, self.known.get("<|translate|>", 0)
        return {name: n for name, n in sorted(self.known.items(), key=lambda each: each[1]) if start < n < tasks}

    def before(self, language: str, task: str, timestamps: bool) -> list[int]:
        """Return the tokens before a text: start, language, task, and whether it has no timestamps."""
        start = [self.config.decoder_start_token_id]
        if self.config.multilingual:
            name = f"<|{language}|>"
            if name not in self.languages:
                raise UserError(f"language {language!r}: the tokenizer knows no such language{self._hint(language)}")
            start += [self.languages[name], self.token(f"<|{task}|>")]
        elif (language, task) != ("en", "transcribe"):
            raise UserError(f"language {language!r}, task {task!r}: this model transcribes English alone")
        return start if timestamps else [*start, self.first_time - 1]

    def _hint(self, language: str) -> str:
        """Return the code that a language's name or another spelling of it means, or all codes."""
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        codes = [known[2:-2] for known in self.languages]
        meant = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
        return f"; did you mean {meant!r}?" if meant in codes else f"; known are {', '.join(codes)}"

    def text(self, text: str) -> list[int]:
        """Return a text's tokens."""
        return encode(self.tokenizer, text)

    def time(self, second: float) -> int:
        """Return the timestamp nearest to a second; UserError beyond the length of a sound."""
        tick = round(second / TICK)
        if not 0 <= tick <= round(self.config.frames * HOP / RATE / TICK):
            raise UserError(f"time {second:g}: is outside the {self.config.frames * HOP / RATE:g} seconds of a sound")
        return self.first_time + tick

    def token(self, name: str) -> int:
        """Return a special token by its name; UserError if there is none."""
        if name not in self.known:
            raise UserError(f"tokenizer {self.tokenizer.name_or_path}: has no token {name}; give Whisper's tokenizer")
        return int(self.known[name])


def open_tokenizer(data: WhisperData, init_from: str | None, config: WhisperConfig) -> Any:
    """Return a recipe's tokenizer: ``data.tokenizer``, or that of ``init_from``; UserError for neither."""
    source: str | Path | None = data.tokenizer
    if source is None:
        if init_from is None:
            raise UserError("data.tokenizer: this field is required without init_from; give a folder with a tokenizer")
        check_folder(init_from, "init_from=")
        source = find_tokenizer(init_from)
        if source is None:
            raise UserError(f"init_from={init_from}: no tokenizer there; set data.tokenizer to a folder with one")
    return load_tokenizer(source, config.vocab_size)


# ------------------------------------------------------------------------------------------------ samples


@dataclass(frozen=True)
class Line:
    """A sound, the place in the list that names it, and its tokens, without the times they may have."""

    path: Path
    where: str
    language: str
    text: str
    segments: tuple[tuple[float, float, str], ...] = ()


def read_lines(path: Path, language: str) -> list[Line]:
    """Return the sounds that a list names, with paths relative to its folder, or to ``clips`` in that.

    A line has its file under ``audio``, ``path`` or ``file``, its text under ``text``, ``sentence`` or
    ``transcription``, and may have a ``language`` or ``locale``, and in .jsonl ``segments``: objects with ``start``,
    ``end`` (in seconds) and ``text``, which stand for the text. UserError names the line that lacks something.
    """
    lines = []
    for _, where, row in read_rows(path, tabs=True):
        written = column(where, row, _FILES)
        place = path.parent / written
        if path.suffix == ".tsv" and not place.exists():
            place = path.parent / "clips" / written
        spoken = column(where, row, _LANGUAGES) if any(row.get(name) for name in _LANGUAGES) else language
        spoken = spoken.partition("-")[0]  # Common Voice has locales, such as zh-CN
        segments = _segments(where, row["segments"], spoken) if row.get("segments") is not None else ()
        text = "".join(part for *_, part in segments) if segments else column(where, row, _TEXTS).strip()
        lines.append(Line(place, where, spoken, text, segments))
    return lines


def _segments(where: str, value: Any, language: str) -> tuple[tuple[float, float, str], ...]:
    """Return segments of which each but the first begins with a space, as the released networks write them."""
    try:
        found = tuple((float(part["start"]), float(part["end"]), str(part["text"])) for part in value)
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{where}: 'segments' must be objects with start, end and text") from None
    ends = [time for start, end, _ in found for time in (start, end)]
    if not all(map(math.isfinite, ends)):
        raise UserError(f"{where}: 'segments' have a start or end that is no number of seconds")
    if ends != sorted(ends):
        raise UserError(f"{where}: 'segments' must follow one another in time")
    if language in SPACELESS:
        return found
    return tuple(
        (start, end, f" {text.lstrip()}" if number else text) for number, (start, end, text) in enumerate(found)
    )


class Speech:
    """Reads a list of sounds: a batch holds ``mel``, ``tokens`` and ``labels``; UserError if none can be used."""

    def __init__(self, path: Path, data: WhisperData, prompts: Prompts, step: int = 1) -> None:
        self.data, self.prompts, self.config, self.step = data, prompts, prompts.config, step
        try:
            prompts.before(data.language, data.task, data.timestamps)
        except UserError as error:
            raise UserError(f"data.language={data.language}: {error}") from None
        lines = read_lines(path, data.language)
        self.bad = BadFiles(data.on_bad)
        self.lines: list[Line] = []
        for line, found in zip(lines, spread(self._look, lines), strict=True):
            if isinstance(found, UserError):
                self.bad.add(found)
            else:
                self.lines.append(line)
        self.bad.report(len(lines))
        if not self.lines:
            raise UserError(f"{path}: none of its {len(lines)} sounds can be used")
        self.keys = [0] * len(self.lines)
        self.identity = {
            **content(path),
            "data.path (sounds that can be used)": len(self.lines),
            "data.tokenizer": fingerprint(prompts.tokenizer),
            "data.language, task and timestamps": [data.language, data.task, data.timestamps],
        }

    def _look(self, line: Line) -> None:
        """Raise UserError for a sound that is too long or empty, or whose text is too long."""
        with naming(line.where):
            length, most = seconds(line.path), self.config.frames * HOP / RATE
            if length > most + 0.01:
                raise UserError(f"{line.path}: is {length:.2f} s long, the network hears {most:g}; cut it into parts")
            if not length:
                raise UserError(f"{line.path}: holds no sample of sound; it is empty or truncated, leave it out")
            self._tokens(line, length)

    def _tokens(self, line: Line, length: float) -> list[int]:
        before = self.prompts.before(line.language, self.data.task, self.data.timestamps)
        if self.data.timestamps:
            tokens = []
            for start, end, text in line.segments or ((0.0, length, line.text),):
                tokens += [self.prompts.time(start), *self.prompts.text(text), self.prompts.time(end)]
        else:
            tokens = self.prompts.text(line.text)
        out = [*before, *tokens, self.config.eos_token_id]
        most = longest_text(self.config, self.step)
        if len(out) - 1 > most:
            why = f", and parallel.sequence=true shares out multiples of {self.step}" if self.step > 1 else ""
            raise UserError(
                f"{line.path}: its text has {len(out) - 1} tokens, the network writes {most}{why}; cut the sound into "
                "parts"
            )
        return out

    def read(self, index: int, seed: int) -> Sample | None:
        """Return a sound's features and tokens, or None if the file is bad."""
        line = self.lines[index]
        try:
            with naming(line.where):
                most = self.config.frames * HOP / RATE
                audio = read_audio(line.path, RATE, most + 2 * SLACK)
                if len(audio) > (most + SLACK) * RATE:
                    raise UserError(
                        f"{line.path}: is longer than its header says, and than the {most:g} s that the network hears; "
                        "cut it into parts"
                    )
                tokens = self._tokens(line, min(most, len(audio) / RATE))
        except UserError as error:
            self.bad.found_late(error)
            return None
        return {"mel": log_mel(audio, self.config.num_mel_bins, self.config.frames), "tokens": tokens}

    def collate(self, samples: list[Sample]) -> Batch:
        """Return a micro-batch."""
        return collate(samples, self.config, self.step)


def text_step(recipe: Recipe) -> int:
    """Return what a length of text must be a multiple of, so that tensor-parallel ranks can share a micro-batch's."""
    parallel = recipe.parallel
    return parallel.tp // math.gcd(parallel.tp, recipe.micro_batch) if parallel.sequence else 1


def longest_text(config: WhisperConfig, step: int) -> int:
    """Return the longest text that the network writes, of those that are a multiple of ``step``."""
    return config.max_target_positions // step * step


def collate(samples: Sequence[Mapping[str, Any]], config: WhisperConfig, step: int = 1) -> Batch:
    """Return ``mel [batch, mels, frames]`` and ``tokens``, ``labels`` ``[batch, length]``: each token's is the next.

    ``length`` is a multiple of ``step``, and of ``MULTIPLE`` where the network's longest text allows it.
    """
    longest, multiple = max(len(sample["tokens"]) for sample in samples) - 1, math.lcm(MULTIPLE, step)
    length = min(-(-longest // multiple) * multiple, longest_text(config, step))
    tokens = torch.full((len(samples), length), config.pad_token_id)
    labels = torch.full((len(samples), length), IGNORE)
    for row, sample in enumerate(samples):
        known = torch.tensor(sample["tokens"])
        tokens[row, : len(known) - 1], labels[row, : len(known) - 1] = known[:-1], known[1:]
    return {"mel": torch.stack([sample["mel"] for sample in samples]), "tokens": tokens, "labels": labels}


class Random:
    """Random features and tokens of the recipe's length, to measure with."""

    keys = (0,)
    identity: Mapping[str, Any] = {}

    def __init__(self, length: int, config: WhisperConfig, step: int = 1) -> None:
        self.length, self.config, self.step = min(length, longest_text(config, step)), config, step

    def read(self, index: int, seed: int) -> Sample:
        """Return a sample that follows from its seed."""
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.config.eos_token_id, (self.length + 1,), generator=draw).tolist()
        return {"mel": noise((self.config.num_mel_bins, self.config.frames), seed), "tokens": tokens}

    def collate(self, samples: list[Sample]) -> Batch:
        """Return a micro-batch."""
        return collate(samples, self.config, self.step)


def open_data(recipe: Recipe, config: WhisperConfig, rank: int, ranks: int) -> SlotLoader:
    """Return the loader of a recipe's sounds for one data rank."""
    data: WhisperData = recipe.data  # type: ignore[attr-defined]
    if data.path is None:
        raise UserError("data.path: this field is required; give a list of sounds and their texts")
    prompts = Prompts(open_tokenizer(data, recipe.init_from, config), config)
    reader = Speech(Path(data.path).expanduser(), data, prompts, text_step(recipe))
    return open_reader(reader, recipe, rank, ranks, workers=data.workers)


def synthetic_data(recipe: Recipe, config: WhisperConfig, rank: int, ranks: int) -> SlotLoader:
    """Return the loader of random samples of the recipe's length."""
    source = Random(recipe.data.synthetic, config, text_step(recipe))  # type: ignore[attr-defined]
    return open_reader(source, recipe, rank, ranks)
