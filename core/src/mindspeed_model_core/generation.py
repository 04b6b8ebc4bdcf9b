"""Text from a language model: sampling, cached decoding, streaming, batches and conversations.

A network here is a ``Trunk`` of tokens: it reads batches of ``tokens``, ``positions``, ``lengths`` and a ``cache`` and
gives logits, and its ``config`` has the hub's field names.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from .data.tokenizer import encode
from .errors import UserError
from .nn import KVCache

_PREFILL = 512
_WINDOW = 8


class Sampler:
    """Chooses the next token of each row: the likeliest at ``temperature`` 0, else a draw.

    A draw is among the ``top_k`` likeliest tokens (0: all), then among the fewest whose probabilities reach ``top_p``.
    Draws happen on the CPU, so that ``seed`` means the same on every device. Raises UserError for impossible values.
    """

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> None:
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature={temperature}: must be 0 (greedy) or more")
        if top_k < 0:
            raise UserError(f"top_k={top_k}: must be 0 (no limit) or more")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p={top_p}: must be above 0 and at most 1 (no limit)")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed={seed}: must be from 0 to {2**63 - 1}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return int64 ``[rows]`` on the CPU from ``[rows, vocab]`` logits."""
        if self.temperature == 0:
            return logits.float().argmax(-1).cpu()
        return torch.multinomial(self.probabilities(logits), 1, generator=self.generator)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return what is drawn from, ``[rows, vocab]`` in fp32 on the CPU."""
        scores = logits.float().cpu() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        chances = scores.softmax(-1)
        if self.top_p < 1:
            ordered, order = chances.sort(descending=True, stable=True)
            surplus = ordered.cumsum(-1) - ordered >= self.top_p
            chances = chances.masked_fill(surplus.scatter(-1, order, surplus), 0)
        return chances


class Decoder:
    """Rows of tokens that grow together, and the keys and values of those the network has read."""

    def __init__(self, net: Any, rows: int, capacity: int) -> None:
        c, weight = net.config, next(net.parameters())
        self.net, self.rows = net, rows
        self.cache = KVCache(
            c.num_hidden_layers,
            c.num_key_value_heads,
            c.head_dim,
            capacity,
            batch=rows,
            device=weight.device,
            dtype=weight.dtype,
        )

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """Read int64 ``[rows, new]`` and return the logits ``[rows, vocab]`` of what follows.

        Long inputs are read in parts, which bounds the memory of their logits.
        """
        before = self.cache.length
        try:
            for part in tokens.split(_PREFILL, 1):
                logits = self._read(part)
        except BaseException:  # Ctrl-C too leaves the cache as it was
            self.cache.truncate(before)
            raise
        return logits

    def _read(self, tokens: Tensor) -> Tensor:
        count, held, device = tokens.shape[1], self.cache.length, self.cache.store.device
        batch = {
            "tokens": tokens.flatten().to(device),
            "positions": torch.arange(held, held + count, device=device).repeat(self.rows),
            "lengths": (count,) * self.rows,
            "cache": self.cache,
        }
        return self.net(batch).unflatten(0, (self.rows, count))[:, -1]


class TextStream:
    """Turns tokens into text one at a time, holding back bytes until they make a character.

    ``before`` are the tokens that precede: they decide about a leading space and are not shown.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before)[-_WINDOW:]
        self.start, self.end = 0, len(self.ids)

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes, perhaps none."""
        self.ids.append(token)
        piece = self._rest()
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.start, self.end = self.end, len(self.ids)
        return piece

    def flush(self) -> str:
        """Return what is still held back; incomplete bytes show as U+FFFD."""
        piece = self._rest()
        self.start, self.end = self.end, len(self.ids)
        return piece

    def _rest(self) -> str:
        shown = self._text(self.ids[self.start : self.end])
        return self._text(self.ids[self.start :])[len(shown) :]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode(net: Any, prompts: Tensor, sampler: Sampler, max_new_tokens: int) -> Iterator[list[int]]:
    """Yield the next token of each row of ``prompts`` (int64 ``[rows, tokens]``) until all have ended.

    A row that has ended stays at the end token. Stops at the model's context length. Raises UserError for prompts
    that leave no room in it.
    """
    limit, end = net.config.max_position_embeddings, net.config.eos_token_id
    rows, length = prompts.shape
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be 1 or more")
    if length >= limit:
        raise UserError(f"the prompt has {length} tokens; the model's context is {limit} with the answer, shorten it")
    count = min(max_new_tokens, limit - length)
    decoder = Decoder(net, rows, length + count)
    ended = torch.zeros(rows, dtype=torch.bool)
    tokens = prompts
    for _ in range(count):
        chosen = sampler(decoder.feed(tokens)).masked_fill(ended, end)
        ended |= chosen == end
        yield chosen.tolist()
        if ended.all():
            return
        tokens = chosen[:, None]


def begin(tokenizer: Any, text: str) -> list[int]:
    """Return the begin token and the text's."""
    return [tokenizer.bos_token_id, *encode(tokenizer, text)]


def generate(
    net: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the prompt's continuation in pieces of whole characters as they are generated.

    Ends at the end token, after ``max_new_tokens`` or at the context length. Raises UserError for impossible values
    and for a prompt longer than the context.
    """
    sampler = Sampler(temperature, top_k, top_p, seed)
    ids = begin(tokenizer, prompt)
    stream = TextStream(tokenizer, ids)
    for (token,) in decode(net, torch.tensor([ids]), sampler, max_new_tokens):
        if token != net.config.eos_token_id and (piece := stream.push(token)):
            yield piece
    if piece := stream.flush():
        yield piece


def complete(
    net: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Return the continuations of many prompts; those of equal length in tokens run as one batch."""
    sampler = Sampler(temperature, top_k, top_p, seed)
    ids = [begin(tokenizer, prompt) for prompt in prompts]
    out = [""] * len(prompts)
    for length in sorted({len(row) for row in ids}):
        group = [i for i, row in enumerate(ids) if len(row) == length]
        streams = [TextStream(tokenizer, ids[i]) for i in group]
        for chosen in decode(net, torch.tensor([ids[i] for i in group]), sampler, max_new_tokens):
            for i, stream, token in zip(group, streams, chosen, strict=True):
                if token != net.config.eos_token_id:
                    out[i] += stream.push(token)
        for i, stream in zip(group, streams, strict=True):
            out[i] += stream.flush()
    return out


class Chat(ABC):
    """A conversation; what was said stays in the cache, so each turn reads only itself. Models give its ``turn``."""

    def __init__(
        self, net: Any, tokenizer: Any, sampler: Sampler, *, max_new_tokens: int = 512, system: str | None = None
    ) -> None:
        self.net, self.tokenizer, self.sampler = net, tokenizer, sampler
        self.max_new_tokens, self.system = max_new_tokens, system
        self.decoder = Decoder(net, 1, net.config.max_position_embeddings)
        self.pending: list[int] = []
        self.answering = False

    @abstractmethod
    def turn(self, text: str, *, first: bool) -> list[int]:
        """Return the tokens of what the user says, up to where the answer begins."""

    def reset(self) -> None:
        """Forget the conversation."""
        self.decoder.cache.truncate(0)
        self.pending, self.answering = [], False

    def say(self, text: str) -> Iterator[str]:
        """Yield the answer to ``text`` in pieces; one may stop reading at any time and go on with another turn.

        Raises UserError, with the conversation as it was, if the turn does not fit in what is left of the context.
        """
        turn = self.turn(text, first=not self.decoder.cache.length and not self.pending)
        end = [self.net.config.eos_token_id] if self.answering else []
        used, room = self.decoder.cache.length, self.decoder.cache.capacity
        asked = [*self.pending, *end, *turn]
        if used + len(asked) >= room:
            raise UserError(
                f"the conversation would have {used + len(asked)} tokens and the model's context is {room}; "
                "begin a new one with /reset, or shorten the message"
            )
        self.pending, self.answering = asked, True
        stream = TextStream(self.tokenizer, turn)
        shown = False
        for _ in range(min(self.max_new_tokens, room - used - len(asked))):
            logits = self.decoder.feed(torch.tensor([self.pending]))
            token = int(self.sampler(logits)[0])
            # The cache lags by the newest token: what the network has yet to read goes before the next turn.
            self.pending = [token]
            if token == self.net.config.eos_token_id:
                self.answering = False
                break
            piece = stream.push(token)
            piece = piece if shown else piece.lstrip()
            shown = shown or bool(piece)
            if piece:
                yield piece
        if piece := stream.flush():
            yield piece


def converse(chat: Chat) -> None:
    """Hold a conversation on the terminal until /exit or the end of the input."""
    console = Console(highlight=False)
    prompt = "[bold]> [/bold]" if sys.stdin.isatty() else ""
    if prompt:
        console.print("Ctrl-C stops an answer; /reset begins a new conversation, /exit or Ctrl-D ends.", style="dim")
    while True:
        try:
            line = console.input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/exit":
            return
        if line == "/reset":
            chat.reset()
        elif line.startswith("/"):
            console.print(f"{line.split()[0]}: no such command; /reset or /exit")
        elif line:
            try:
                show(chat.say(line))
            except UserError as error:
                console.print(Text(str(error)), style="red")


def show(pieces: Iterator[str]) -> None:
    """Write pieces as they come; Ctrl-C ends them early."""
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    sys.stdout.write("\n")
