"""Ranks train on the same samples whatever one of them cannot read, or end with one error."""

import dataclasses
import json
import shutil
from typing import ClassVar

import pytest
import torch.distributed as dist
from mindspeed_model_core import train
from mindspeed_model_core.data.clips import Clips, PictureData, open_reader
from mindspeed_model_core.data.ranks import spread
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing import toy
from mindspeed_model_core.testing.clips import write_clips
from mindspeed_model_core.testing.dist import run_dist
from pydantic import PositiveInt

FILES = 6


class Pictures(PictureData):
    stride: ClassVar[int] = 16
    encoder_parts: ClassVar[tuple[str, ...]] = ("vae",)
    height: PositiveInt = 32
    width: PositiveInt = 48


@pytest.fixture
def hosts(tmp_path):
    """Two folders with the same list of pictures, as two hosts have."""
    write_clips(tmp_path / "0", [(1, 32, 48)] * FILES)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    return tmp_path


def _opened(hosts, on_bad):
    try:
        reader = Clips(hosts / str(dist.get_rank()) / "clips.jsonl", Pictures(on_bad=on_bad))
    except UserError as error:
        return str(error)
    return [item.line for item, _ in reader.clips], reader.identity


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_one_rank_finds_bad_is_bad_for_all(hosts, rank):
    bad = FILES - 2 + rank  # the ranks take turns, so this one looks at it
    (hosts / str(rank) / f"part-{bad}" / "clip.png").unlink()
    first, second = run_dist(_opened, 2, hosts, "skip")
    assert first == second and first[0] == [i + 1 for i in range(FILES) if i != bad]
    said = run_dist(_opened, 2, hosts, "stop")
    assert said[0] == said[1] and f"part-{bad}/clip.png: no such file" in said[0]


def test_lists_that_differ_are_refused(hosts):
    listed = hosts / "1" / "clips.jsonl"
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    listed.write_text("".join(json.dumps({**row, "text": "other"}) + "\n" for row in rows))
    first, second = run_dist(_opened, 2, hosts, "skip")
    assert first == second and first.startswith("data.path (content): is ") and " on rank 1 and " in first


def _squares():
    calls = []

    def look(number):
        calls.append(number)
        if number == 3:
            raise UserError("three")
        return number**2

    return [str(found) for found in spread(look, range(7))], sorted(calls)


def test_ranks_share_out_what_is_looked_at():
    answers = run_dist(_squares, 3)
    assert [found for found, _ in answers] == [["0", "1", "4", "three", "16", "25", "36"]] * 3
    assert [calls for _, calls in answers] == [[0, 3, 6], [1, 4], [2, 5]]


class Numbers:
    """Samples that are numbers; ``late`` one of them is found bad, on this rank."""

    def __init__(self, late):
        self.keys, self.identity, self.late = ["only"] * FILES, {}, late

    def read(self, index, seed):
        return None if index == self.late else index

    @staticmethod
    def collate(samples):
        return toy.batch(samples[0])


class NumberTask(toy.ToyTask):
    late: ClassVar[tuple[int | None, ...]] = ()

    def data(self, rank, ranks):
        return open_reader(Numbers(self.late[dist.get_rank()]), self.recipe, rank, ranks)


def _trained(folder, late, parallel):
    NumberTask.late = late
    recipe, model = toy.recipe(global_batch=2, parallel=parallel), dataclasses.replace(toy.TOY, task=NumberTask)
    losses = []
    try:
        train.run(recipe, model, folder, watch=[lambda record: losses.append(record.loss)])
    except UserError as error:
        return str(error)
    return losses


@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_a_file_that_turns_bad_for_one_of_the_ranks_of_a_batch_ends_the_run(tmp_path, axis):
    first, second = run_dist(_trained, 2, tmp_path / "apart", (None, 3), {axis: 2})
    assert first == second and "\n" not in first
    assert first.startswith("data: ranks 0 and 1 share a batch but drew different samples")


def test_a_file_that_turns_bad_for_all_ranks_of_a_batch_is_replaced(tmp_path):
    losses, _ = run_dist(_trained, 2, tmp_path / "alike", (3, 3), {"tp": 2})
    assert len(losses) == 6
    # Data ranks have batches of their own.
    losses, _ = run_dist(_trained, 2, tmp_path / "data", (None, 3), {})
    assert len(losses) == 6
