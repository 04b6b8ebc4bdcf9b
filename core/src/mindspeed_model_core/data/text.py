"""Language-model batches: from text files, or random ones of the same shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from ..errors import UserError
from ..recipe import Section, local
from . import packing
from .documents import Documents, open_documents
from .order import Order
from .packing import Packed, Tokens
from .slots import CONTENT, Position, SlotLoader
from .tokenizer import encode, fingerprint


class TextData(Section):
    """Which text a language model learns from, and how long its sequences are."""

    path: str | None = local(
        None,
        description="a file, a folder or a glob: .txt (blank lines separate documents), .jsonl, .parquet",
    )
    text_key: str = Field("text", description="the key of a .jsonl object, or the column of a .parquet file")
    tokenizer: str | None = local(None, description="a folder with a tokenizer; null: the one in init_from")
    sequence_length: PositiveInt = Field(4096, description="tokens per sample; documents are cut to fill it exactly")
    shuffle: bool = Field(True, description="a new order of documents each epoch; false: the order of the files")
    workers: NonNegativeInt = local(0, description="processes that read ahead on each rank; 0: the training process")
    synthetic_document: PositiveInt | None = Field(
        None, description="mean document length of measure's random batches; null: one document fills a sequence"
    )


class PackedText(SlotLoader):
    """Endless packed sequences of tokenized documents; see ``SlotLoader`` for the order and for resuming.

    ``tokenizer`` is a transformers tokenizer. Slot s reads the documents that stand at s, s + global_batch, ... in
    each epoch's ``Order``, every one as ``[bos] + tokens + [eos]``. A slot's position is (epoch, place in the order,
    tokens of that document already used). Raises UserError for data it cannot read or that has too few documents.
    """

    def __init__(
        self, data: TextData, tokenizer: Any, *, global_batch: int, micro_batch: int, seed: int, rank: int, ranks: int
    ) -> None:
        if data.path is None:
            raise UserError(
                "data.path: this field is required; give a file, a folder or a glob, data.path=corpus.jsonl"
            )
        documents = open_documents(data.path, data.text_key)
        if len(documents) < global_batch:
            for number in range(len(documents)):
                documents[number]  # a broken line may be why there are so few
            share = micro_batch * ranks
            fits = len(documents) // share * share
            lower = f"lower global_batch to {fits} or less, or " if fits else ""
            raise UserError(
                f"{data.path}: {len(documents)} document{'s' * (len(documents) > 1)} for global_batch={global_batch}, "
                f"each of whose samples reads its own; {lower}add documents"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {tokenizer.name_or_path}: has no end-of-text token (eos_token)")
        super().__init__(
            _Text(documents, tokenizer, data.sequence_length, global_batch, seed if data.shuffle else None),
            packing.pack,
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            ranks=ranks,
            workers=data.workers,
            identity={
                "data.path (documents)": len(documents),
                CONTENT: documents.fingerprint(),
                "data.text_key": data.text_key,
                "data.tokenizer (content)": fingerprint(tokenizer),
                "data.sequence_length": data.sequence_length,
                "data.shuffle": data.shuffle,
            },
        )
        self.documents = documents


class _Text:
    def __init__(self, documents: Documents, tokenizer: Any, length: int, slots: int, seed: int | None) -> None:
        self.documents, self.tokenizer, self.length, self.slots = documents, tokenizer, length, slots
        self.order = Order(len(documents), documents.groups(), seed)

    def start(self, slot: int) -> Position:
        return [0, slot, 0]

    def stream(self, slot: int, position: Position) -> Iterator[tuple[Packed, Position]]:
        epoch, place, offset = position
        ahead: dict[tuple[int, int], str] = {}

        def following() -> Tokens:
            nonlocal epoch, place
            place += self.slots
            if place >= len(self.documents):
                epoch, place = epoch + 1, slot
            return self._tokens(self._read(epoch, place, ahead))

        document = self._tokens(self._read(epoch, place, ahead))
        if offset > len(document):
            raise UserError(
                f"the saved data position is at token {offset} of a document that has {len(document)}; "
                "resume with the data and tokenizer the run began with"
            )
        while True:
            sample, document, offset = packing.fill(document, offset, self.length, following)
            yield sample, [epoch, place, offset]

    def _read(self, epoch: int, place: int, ahead: dict[tuple[int, int], str]) -> str:
        """Return the text at a place; where texts are read in groups, take the slot's whole share of the window ahead.

        Slots drift apart, as their documents differ in length, and would have each other's groups decoded in turn.
        """
        if self.order.groups is None:
            return self.documents[self.order.document(epoch, place)]
        if (epoch, place) not in ahead:
            places = range(place, self.order.window_end(epoch, place), self.slots)
            texts = self.documents.gather([self.order.document(epoch, each) for each in places])
            ahead.clear()
            ahead.update({(epoch, each): text for each, text in zip(places, texts, strict=True)})
        return ahead.pop((epoch, place))

    def _tokens(self, text: str) -> Tokens:
        tokenizer = self.tokenizer
        tokens = encode(tokenizer, text)
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return np.array([*begin, *tokens, tokenizer.eos_token_id], np.int32)


class RandomText(SlotLoader):
    """Endless sequences of random tokens in documents of random length, the same under any number of ranks.

    Document lengths are drawn geometrically with mean ``mean_document``; None: one document fills each sequence.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        sequence_length: int,
        mean_document: int | None = None,
        global_batch: int,
        micro_batch: int,
        seed: int,
        rank: int,
        ranks: int,
    ) -> None:
        super().__init__(
            _Random(vocab_size, sequence_length, mean_document, seed),
            packing.pack,
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            ranks=ranks,
        )


class _Random:
    def __init__(self, vocab_size: int, length: int, mean: int | None, seed: int) -> None:
        self.vocab_size, self.length, self.mean, self.seed = vocab_size, length, mean, seed

    def start(self, slot: int) -> Position:
        return [0]

    def stream(self, slot: int, position: Position) -> Iterator[tuple[Packed, Position]]:
        (step,) = position
        while True:
            draw = np.random.default_rng([self.seed, slot, step])

            def following(draw: np.random.Generator = draw) -> Tokens:
                # One token longer than a sequence when unbounded, so that every position has a label.
                length = self.length + 1 if self.mean is None else 1 + draw.geometric(1 / self.mean)
                return draw.integers(self.vocab_size, size=length, dtype=np.int32)

            sample, _, _ = packing.fill(following(), 0, self.length, following)
            step += 1
            yield sample, [step]
