"""Loading that is the same under every number of ranks and workers, and resumes exactly.

A global batch has ``global_batch`` slots. Each slot is an endless stream of samples of its own, and each sample
carries the position of its stream after it. Ranks and workers only decide who reads which slots, never what they
hold; and because positions travel with the samples, what was prefetched and never used leaves no trace.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import UserError
from ..trunk import Batch

CONTENT = "data.path (content)"
"""The fact of ``identity`` that mending a broken file changes; the others tell whether a position still holds."""

Position = list[int]
Drawn = tuple[Any, Position]


class Source(Protocol):
    """Gives every slot its stream; picklable."""

    def start(self, slot: int) -> Position:
        """Return where a slot begins."""
        ...

    def stream(self, slot: int, position: Position) -> Iterator[Drawn]:
        """Yield (sample, position after it) without end, from ``position`` on."""
        ...


class SlotLoader:
    """A ``task.Loader`` over a Source: the micro-batches of data rank ``rank`` of ``ranks``, step by step.

    Slot ``s`` belongs to rank ``s // micro_batch % ranks``. ``collate`` makes a micro-batch of its samples.
    ``workers`` processes read ahead, each the slots it owns; 0 reads in this process. ``identity`` are facts about the
    data that a saved position depends on, by the name a user knows them under.
    """

    def __init__(
        self,
        source: Source,
        collate: Callable[[list[Any]], Batch],
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        ranks: int,
        workers: int = 0,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.collate, self.global_batch, self.micro_batch = source, collate, global_batch, micro_batch
        self.slots = owned(global_batch, micro_batch, rank, ranks)
        self.workers = min(workers, len(self.slots))
        self.identity = dict(identity or {})
        self.positions = {slot: source.start(slot) for slot in self.slots}

    def __iter__(self) -> Iterator[list[Batch]]:
        dataset = _Steps(self.source, self.slots, [self.positions[s] for s in self.slots])
        loader = DataLoader(
            dataset,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=self.workers,
            worker_init_fn=_settle if self.workers else None,
            persistent_workers=bool(self.workers),
            prefetch_factor=2 if self.workers else None,
            # Without one of its own it would draw from, and so move, the process's random state.
            generator=torch.Generator(),
        )
        shares, lanes = iter(loader), max(1, self.workers)
        while True:
            drawn: list[Drawn] = [(None, [])] * len(self.slots)
            for lane in range(lanes):
                share = next(shares)
                if isinstance(share, _Mistake):
                    raise UserError(share.message)
                drawn[lane::lanes] = share
            # A mistake above leaves the positions as they were after the last whole step.
            self.positions = {slot: position for slot, (_, position) in zip(self.slots, drawn, strict=True)}
            samples = [sample for sample, _ in drawn]
            yield [self.collate(samples[i : i + self.micro_batch]) for i in range(0, len(samples), self.micro_batch)]

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"slots": {slot: position}, **identity}``, of this rank's slots after the last step yielded."""
        return {"slots": {str(slot): list(position) for slot, position in self.positions.items()}, **self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the positions of all slots, merged over data ranks; the next ``iter`` starts there.

        Raises UserError if they are not those of ``global_batch`` slots, or of other data.
        """
        saved = state.get("slots", {})
        if set(saved) != {str(slot) for slot in range(self.global_batch)}:
            raise UserError(
                f"global_batch={self.global_batch}: the saved data position is of {len(saved)} slots; "
                f"resume with global_batch={len(saved)}"
            )
        for key, value in self.identity.items():
            if state.get(key, value) != value:
                raise UserError(
                    f"{key}: is {value} now and was {state[key]} when the run was saved; "
                    "resume with what the run began with, or begin another run from its weights"
                )
        self.positions = {slot: list(saved[str(slot)]) for slot in self.slots}


def owned(global_batch: int, micro_batch: int, rank: int, ranks: int) -> list[int]:
    """Return the slots of a data rank in order; UserError if the global batch does not divide."""
    if global_batch % (micro_batch * ranks):
        raise UserError(
            f"global_batch={global_batch}: must be a multiple of micro_batch={micro_batch} x {ranks} data ranks; "
            f"try {max(1, round(global_batch / (micro_batch * ranks))) * micro_batch * ranks}"
        )
    return [slot for slot in range(global_batch) if slot // micro_batch % ranks == rank]


class _Mistake:
    """A UserError on its way out of a worker; raised there, the DataLoader would wrap it in a traceback."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Steps(IterableDataset[Any]):
    """One item per step: what each of this worker's slots draws. Worker w of n owns every n-th slot from w."""

    def __init__(self, source: Source, slots: Sequence[int], positions: Sequence[Position]) -> None:
        self.source, self.slots, self.positions = source, list(slots), list(positions)

    def __iter__(self) -> Iterator[list[Drawn] | _Mistake]:
        info = get_worker_info()
        lane, lanes = (info.id, info.num_workers) if info else (0, 1)
        try:
            mine = list(zip(self.slots, self.positions, strict=True))[lane::lanes]
            streams = [self.source.stream(slot, position) for slot, position in mine]
            while True:
                yield [next(stream) for stream in streams]
        except UserError as error:
            yield _Mistake(str(error))


def _settle(worker: int) -> None:
    # The tokenizer's threads do not survive a fork, and the workers already are the parallelism.
    # A SIGTERM or Ctrl-C to the whole process group asks the run to save; its readers must live until it has.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _as_is(item: Any) -> Any:
    return item
