"""Clips find their bucket, and bucketed samples keep one order under every layout."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from mindspeed_model_core.data import SlotLoader
from mindspeed_model_core.data.buckets import Bucket, BucketSource, aspect_buckets, choose
from mindspeed_model_core.errors import UserError

BATCH = 8
KEYS = ["wide"] * 7 + ["tall"] * 5 + ["square"] * 1 + ["wide"] * 4
Draw = tuple[int, int]


def draw(index: int, seed: int) -> Draw:
    return index, seed


def source(micro: int = 2, keys: list[str] = KEYS, seed: int = 3, read: Any = draw) -> BucketSource:
    return BucketSource(keys, read, seed=seed, global_batch=BATCH, micro_batch=micro)


def loader(rank: int, ranks: int, micro: int, workers: int = 0) -> SlotLoader:
    return SlotLoader(
        source(micro),
        lambda samples: {"samples": samples},
        global_batch=BATCH,
        micro_batch=micro,
        rank=rank,
        ranks=ranks,
        workers=workers,
    )


def steps(loaders: list[SlotLoader], count: int) -> Iterator[list[list[Draw]]]:
    """Yield each step's micro-batches in the order of their slots."""
    iterators = [iter(each) for each in loaders]
    for _ in range(count):
        per_rank = [next(iterator) for iterator in iterators]
        yield [batch["samples"] for group in zip(*per_rank, strict=True) for batch in group]


def test_sizes_have_the_area_and_the_ratios() -> None:
    assert aspect_buckets(480 * 832, 16, [832 / 480]) == ((480, 832),)
    sizes = aspect_buckets(480 * 832, 16, [16 / 9, 1.0, 9 / 16, 1.0])
    assert sizes == ((480, 848), (624, 624), (848, 480))
    for height, width in sizes:
        assert not height % 16 and not width % 16 and abs(height * width / (480 * 832) - 1) < 0.05


@pytest.mark.parametrize(
    ("clip", "want"),
    [
        ((1920, 1080, 100), Bucket(480, 832, 81)),
        ((1920, 1080, 81), Bucket(480, 832, 81)),
        ((1920, 1080, 80), Bucket(480, 832, 17)),
        ((500, 490, 17), Bucket(640, 640, 17)),
        ((100, 190, 200), Bucket(832, 480, 81)),
        ((100, 190, 1), Bucket(832, 480, 1)),
    ],
)
def test_a_clip_gets_the_nearest_aspect_and_the_longest_length_it_fills(
    clip: tuple[int, int, int], want: Bucket
) -> None:
    assert choose(*clip, [(480, 832), (640, 640), (832, 480)], (17, 81, 1)) == want


def test_what_fits_no_bucket() -> None:
    assert choose(64, 64, 16, [(64, 64)], (17, 81)) is None and choose(64, 64, 1, [(64, 64)], (17,)) is None


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_every_micro_batch_has_one_bucket_and_every_epoch_every_sample(micro: int) -> None:
    ours = source(micro)
    per_epoch = ours.groups * micro
    needed = 3 * per_epoch
    streams = [ours.stream(slot, ours.start(slot)) for slot in range(BATCH)]
    drawn: list[Draw] = []
    while len(drawn) < needed:
        drawn += [next(stream)[0] for stream in streams]
    orders = []
    for epoch in range(3):
        samples = [index for index, _ in drawn[epoch * per_epoch : (epoch + 1) * per_epoch]]
        groups = [samples[i : i + micro] for i in range(0, len(samples), micro)]
        assert all(len({KEYS[i] for i in group}) == 1 for group in groups)
        counts = Counter(samples)
        assert set(counts) == set(range(len(KEYS)))
        assert all(counts[i] <= 2 for i in range(len(KEYS)) if KEYS[i] != "square")
        assert sum(counts.values()) == sum(-(-KEYS.count(key) // micro) * micro for key in set(KEYS))
        orders.append(samples)
    assert orders[0] != orders[1] != orders[2]
    assert [KEYS[i] for i in orders[0]] != sorted(KEYS[i] for i in orders[0])
    assert len({seed for _, seed in drawn}) == len(drawn) and all(0 <= seed < 2**63 for _, seed in drawn)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (4, 0), (2, 1)])
def test_order_seeds_and_resuming_depend_on_no_layout(ranks: int, workers: int) -> None:
    reference = list(steps([loader(0, 1, 2)], 9))
    assert list(steps([loader(r, ranks, 2, workers) for r in range(ranks)], 9)) == reference
    once = [loader(r, ranks, 2, workers) for r in range(ranks)]
    list(steps(once, 4))
    states = [each.state_dict() for each in once]
    merged = {"slots": {slot: at for state in states for slot, at in state["slots"].items()}}
    assert {slot: at[0] for slot, at in merged["slots"].items()} == {str(slot): 4 for slot in range(BATCH)}
    for new in ([loader(0, 1, 2)], [loader(r, 2, 2, 1) for r in range(2)]):
        for each in new:
            each.load_state_dict(merged)
        assert list(steps(new, 5)) == reference[4:]


def test_another_seed_is_another_order_and_the_source_travels_to_workers() -> None:
    def first(ours: BucketSource) -> list[Draw]:
        return [next(ours.stream(slot, [0]))[0] for slot in range(BATCH)]

    assert first(source()) == first(pickle.loads(pickle.dumps(source())))
    assert [i for i, _ in first(source())] != [i for i, _ in first(source(seed=4))]


def test_buckets_of_one_size_have_orders_of_their_own() -> None:
    ours = source(1, ["wide"] * 20 + ["tall"] * 20)
    orders: dict[str, list[int]] = {"wide": [], "tall": []}
    for bucket, at, index in sorted(ours.order(0, place, 0) for place in range(ours.groups)):
        assert at == len(orders[ours.names[bucket]])
        orders[ours.names[bucket]].append(index % 20)
    assert sorted(orders["wide"]) == sorted(orders["tall"]) == list(range(20)) and orders["wide"] != orders["tall"]


def good(index: int, seed: int) -> Draw | None:
    return None if KEYS[index] == "tall" and index != 9 or index in (0, 3) else (index, seed)


def test_the_next_of_its_bucket_takes_a_bad_ones_place() -> None:
    ours, whole = source(read=good), source()
    for slot in range(BATCH):
        stream, reference = ours.stream(slot, [0]), whole.stream(slot, [0])
        for _ in range(9):
            ((index, seed), at), ((wanted, same), place) = next(stream), next(reference)
            assert KEYS[index] == KEYS[wanted] and seed == same and at == [place[0], index]
            assert index == wanted if good(wanted, 0) else good(index, 0)


def test_refusals() -> None:
    with pytest.raises(UserError, match="holds no samples"):
        source(keys=[])
    with pytest.raises(UserError, match="global_batch=8: must be a multiple of micro_batch=3"):
        source(micro=3)
    with pytest.raises(UserError, match="none of the 1 samples of bucket lonely can be read"):
        next(source(keys=["lonely"], read=lambda index, seed: None).stream(0, [0]))
