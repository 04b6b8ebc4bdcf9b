"""Encoded samples survive a kill, keep their names apart, and are read without being loaded."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mindspeed_model_core.data import features
from mindspeed_model_core.data.features import INDEX, SHARDS, FeatureSet, FeatureWriter, done, write_index
from mindspeed_model_core.errors import UserError
from torch import Tensor


def sample(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "latents": torch.randn(4, 2 + number % 3, generator=generator),
        "text": torch.randn(number + 1, 8, generator=generator).bfloat16(),
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def key(number: int) -> str:
    return f"{number:08d}-clip"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rank in (1, 0):
        with FeatureWriter(tmp_path, f"rank-{rank}", shard_bytes=300) as writer:
            for number in range(rank, 10, 2):
                writer.add(key(number), sample(number))
    write_index(tmp_path, {"fps": 16, "who": "é"})
    return tmp_path


def test_what_was_written_is_read_in_the_order_of_the_keys(folder: Path) -> None:
    found = FeatureSet(folder)
    assert len(list((folder / SHARDS).iterdir())) >= 4 and found.finished
    assert found.keys == [key(i) for i in range(10)] and len(found) == 10 and found.meta == {"fps": 16, "who": "é"}
    for number in range(10):
        assert equal(found.read(number), sample(number))
        assert found.shapes(number) == {name: tuple(t.shape) for name, t in sample(number).items()}
    copied = pickle.loads(pickle.dumps(found))
    assert equal(copied.read(3), sample(3))


def test_a_folder_that_is_not_finished_is_read_from_its_headers(folder: Path) -> None:
    indexed = FeatureSet(folder)
    (folder / INDEX).unlink()
    found = FeatureSet(folder)
    assert not found.finished and found.meta == {} and found.keys == indexed.keys
    assert [found.shapes(i) for i in range(10)] == [indexed.shapes(i) for i in range(10)]
    assert equal(found.read(7), sample(7))


def write_forty(folder: Path, stop: int) -> None:
    """Write what is missing of 40 samples; die after adding number ``stop``."""
    have = done(folder)
    with FeatureWriter(folder, shard_bytes=2000) as writer:
        for number in range(40):
            if key(number) not in have:
                writer.add(key(number), {"x": torch.full((number + 1, 4), float(number))})
            if number == stop:
                os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_loses_the_unfinished_shard_only_and_writing_goes_on(tmp_path: Path) -> None:
    def write(folder: Path, stop: int) -> int | None:
        process = multiprocessing.get_context("fork").Process(target=write_forty, args=(folder, stop))
        process.start()
        process.join()
        return process.exitcode

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert write(killed, 30) == -signal.SIGKILL
    kept = done(killed)
    assert 0 < len(kept) < 31 and kept == {key(i) for i in range(len(kept))}
    (killed / SHARDS / ".rank-0-00099.safetensors.tmp").write_bytes(b"half")
    assert write(killed, -1) == 0 and write(whole, -1) == 0
    for folder in (killed, whole):
        write_index(folder, {})
    names = sorted(p.name for p in (whole / SHARDS).iterdir())
    assert sorted(p.name for p in (killed / SHARDS).iterdir()) == names
    assert all((killed / SHARDS / n).read_bytes() == (whole / SHARDS / n).read_bytes() for n in names)
    assert (killed / INDEX).read_bytes() == (whole / INDEX).read_bytes()


def test_leaving_by_an_error_keeps_whole_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), FeatureWriter(tmp_path) as writer:
        writer.add(key(0), sample(0))
        with pytest.raises(AttributeError):
            writer.add(key(1), {"x": torch.ones(2), "y": None})  # type: ignore[dict-item]
        raise KeyboardInterrupt
    assert done(tmp_path) == {key(0)} and equal(FeatureSet(tmp_path).read(0), sample(0))

    def full(draft: Path, path: Path) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(features, "publish", full)
    with pytest.raises(RuntimeError, match="first"), FeatureWriter(tmp_path) as writer:
        writer.add(key(2), sample(2))
        raise RuntimeError("first")
    with pytest.raises(OSError, match="no space"), FeatureWriter(tmp_path) as writer:
        writer.add(key(2), sample(2))


def test_samples_are_not_held_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(features, "time", SimpleNamespace(monotonic=lambda: now))
    writer = FeatureWriter(tmp_path, seconds=300)
    kept = []
    for number in range(6):
        writer.add(key(number), sample(number))
        kept.append(len(done(tmp_path)))
        now += 149
    assert kept == [0, 0, 0, 4, 4, 4]


def test_equal_names_are_an_error(folder: Path) -> None:
    with FeatureWriter(folder, "rank-0") as writer:
        writer.add(key(10), sample(0))
        for number in (10, 3):
            with pytest.raises(UserError, match=f"{key(number)}: is there already"):
                writer.add(key(number), sample(0))
        with pytest.raises(ValueError, match="no '/'"):
            writer.add("a/b", sample(0))
    assert equal(FeatureSet(folder).read(3), sample(3))
    shard = next((folder / SHARDS).glob("rank-1*"))
    (shard.with_name("rank-9-00000.safetensors")).write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match="rank-9-00000.safetensors: .* is in another shard too"):
        done(folder)


def test_the_writer_copies_what_it_takes(tmp_path: Path) -> None:
    base = torch.ones(4, 6)
    with FeatureWriter(tmp_path) as writer:
        writer.add("a", {"x": base.T})
        base.zero_()
    assert torch.equal(FeatureSet(tmp_path).read(0)["x"], torch.ones(6, 4))


def test_memory_does_not_grow_with_what_is_written(tmp_path: Path) -> None:
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    block = torch.randn(2**18)  # 1 MiB
    with FeatureWriter(tmp_path, shard_bytes=8 * 2**20) as writer:
        for number in range(24):
            writer.add(key(number), {"x": block})
        before = peak()
        for number in range(24, 200):
            writer.add(key(number), {"x": block})
    assert peak() - before < 64, "176 MiB were written"


def test_damaged_shards_are_named(folder: Path) -> None:
    shard = sorted((folder / SHARDS).iterdir())[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=f"{shard.name}: truncated: {len(whole) - 5} bytes"):
        FeatureSet(folder)
    with pytest.raises(UserError, match=f"{shard.name}: truncated or damaged"):
        done(folder)
    late = FeatureSet.__new__(FeatureSet)
    shard.write_bytes(whole)
    late.__init__(folder)  # type: ignore[misc]
    shard.unlink()
    numbers = [i for i, (_, s, _) in enumerate(late._samples) if late._shards[s] == shard.name]
    with pytest.raises(UserError, match=f"{shard.name}: missing"):
        late.read(numbers[0])
    with pytest.raises(UserError, match=f"{shard.name}: missing, though index.json lists it"):
        FeatureSet(folder)
    (folder / INDEX).write_text(json.dumps({"version": 1}))
    with pytest.raises(UserError, match="index.json: not an index of features"):
        FeatureSet(folder)
    (folder / INDEX).write_text("")
    with pytest.raises(UserError, match="index.json: not valid JSON: .*; run the prepare command again"):
        FeatureSet(folder)
    os.rename(folder / SHARDS, folder / "elsewhere")
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match="holds no features .*; the prepare command makes them"):
        FeatureSet(folder)


def test_a_reader_keeps_the_shards_open_that_it_used_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_HANDLES", 2)
    found = FeatureSet(folder)
    for number in [*range(10), 0, 9]:
        assert equal(found.read(number), sample(number))
        assert list(found._open)[-1] == found._samples[number][1] and len(found._open) <= 2
