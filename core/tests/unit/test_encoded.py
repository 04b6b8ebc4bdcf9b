"""Encoded samples are the same batches under every layout, and a folder or file that does not fit is named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from mindspeed_model_core.data import SlotLoader
from mindspeed_model_core.data.clips import PictureData, Reader, Sample, drops_text, open_reader
from mindspeed_model_core.data.encoded import (
    EMPTY_TEXT,
    FeatureFiles,
    PreparedFeatures,
    RandomFeatures,
    open_prepared,
    write_empty_text,
)
from mindspeed_model_core.data.features import INDEX, FeatureWriter, write_index
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.recipe import Recipe
from mindspeed_model_core.testing.clips import drawn, equal
from mindspeed_model_core.trunk import Batch
from pydantic import PositiveInt
from torch import Tensor

COUNT, WIDTH = 9, 6


class Pictures(PictureData):
    stride: ClassVar[int] = 16
    encoder_parts: ClassVar[tuple[str, ...]] = ("vae",)
    height: PositiveInt = 32
    width: PositiveInt = 48


def sample(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    shape = (4, 2, 3) if number % 3 else (4, 3, 2)
    return {
        "latents": torch.randn(shape, generator=generator),
        "text": torch.randn(5, WIDTH, generator=generator),
        "pooled": torch.full((WIDTH,), float(number)),
        "unused": torch.ones(2),
    }


def collate(samples: list[Sample]) -> Batch:
    names = ("latents", "text", "pooled")
    return {**{n: torch.stack([s[n] for s in samples]) for n in names}, "seeds": tuple(s["seed"] for s in samples)}


def check(where: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if shapes["text"][-1] != WIDTH:
        raise UserError(f"{where}: 'text' is {list(shapes['text'])}")


def load(path: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(path, weights_only=True)
    except Exception:
        raise UserError(f"{path}: cannot be read") from None
    return {name: held[name] for name in ("latents", "text", "pooled")}


def open_loader(reader: Reader, rank: int = 0, ranks: int = 1, workers: int = 0) -> SlotLoader:
    recipe = Recipe(preset="toy", global_batch=4, micro_batch=2, seed=3)
    return open_reader(reader, recipe, rank, ranks, workers=workers)


def prepared(folder: Path, **data: Any) -> PreparedFeatures:
    names = ("latents", "text", "pooled")
    return PreparedFeatures(open_prepared(folder), Pictures(**data), collate, names=names, check=check)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with FeatureWriter(tmp_path / "made", shard_bytes=600) as writer:
        for number in range(COUNT):
            writer.add(f"{number:08d}", sample(number))
    write_empty_text(tmp_path / "made", {"text": torch.full((5, WIDTH), 7.0), "pooled": torch.full((WIDTH,), -7.0)})
    write_index(tmp_path / "made", {})
    return tmp_path / "made"


def write_files(folder: Path) -> Path:
    folder.mkdir()
    for number in range(COUNT):
        torch.save(sample(number), folder / f"{number}.pt")
    listed = folder / "data.jsonl"
    listed.write_text("".join(json.dumps({"file": f"{number}.pt"}) + "\n" for number in range(COUNT)))
    return listed


def check_batches(loader: SlotLoader) -> None:
    """Fail unless an epoch's batches hold every sample, of one shape a batch, and no tensor that is not asked for."""
    seen = set()
    for step in drawn([pickle.loads(pickle.dumps(loader))], 5):
        for batch in step:
            assert set(batch) == {"latents", "text", "pooled", "seeds"} and len(set(batch["seeds"])) == 2
            for i, pooled in enumerate(batch["pooled"]):
                want = sample(int(pooled[0]))
                assert all(torch.equal(batch[name][i], want[name]) for name in ("latents", "text", "pooled"))
                seen.add(int(pooled[0]))
    assert seen == set(range(COUNT))


def test_a_prepared_folder_gives_its_samples(folder: Path) -> None:
    check_batches(open_loader(prepared(folder)))


def test_a_list_of_files_gives_their_samples(tmp_path: Path) -> None:
    listed = write_files(tmp_path / "files")
    check_batches(open_loader(FeatureFiles(listed, Pictures(), collate, load=load, check=check)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_order_and_resuming_depend_on_no_layout(folder: Path) -> None:
    def loaders(ranks: int, workers: int = 0) -> list[SlotLoader]:
        return [open_loader(prepared(folder, text_drop=0.5), r, ranks, workers) for r in range(ranks)]

    reference = list(drawn(loaders(1), 7))
    parted = loaders(2, workers=1)
    assert equal(list(drawn(parted, 4)), reference[:4])
    states = [json.loads(json.dumps(each.state_dict())) for each in parted]
    assert set(states[0]) == {"slots", "micro_batch", "data.path (content)", "data.path (samples)"}
    merged = {**states[0], "slots": {k: v for state in states for k, v in state["slots"].items()}}
    for resumed in (loaders(1), loaders(2)):
        for each in resumed:
            each.load_state_dict(merged)
        assert equal(list(drawn(resumed, 3)), reference[4:])


def test_a_position_is_of_as_many_samples(folder: Path) -> None:
    state = open_loader(prepared(folder)).state_dict()
    with FeatureWriter(folder, "rank-1") as writer:
        writer.add("00000000-more", sample(0))
    write_index(folder, {})
    with pytest.raises(UserError, match=rf"^data.path \(samples\): is {COUNT + 1} now and was {COUNT} when the run"):
        open_loader(prepared(folder)).load_state_dict(state)


def test_a_sample_without_its_text_has_all_that_the_empty_one_was_encoded_to(folder: Path) -> None:
    for share in (0.0, 0.5, 1.0):
        dropped = 0
        for step in drawn([open_loader(prepared(folder, text_drop=share))], 4):
            for batch in step:
                for i, seed in enumerate(batch["seeds"]):
                    empty = bool((batch["text"][i] == 7).all())
                    assert empty == bool((batch["pooled"][i] == -7).all()) == drops_text(seed, share)
                    dropped += empty
        assert (dropped > 0) == (share > 0) and (dropped < 16) == (share < 1)


def test_random_samples_follow_from_their_seeds() -> None:
    def first() -> Any:
        shapes = {"latents": (4, 2, 3), "text": (5, WIDTH), "pooled": (WIDTH,)}
        return next(drawn([open_loader(RandomFeatures(shapes, collate))], 1))

    (one, other), again = first(), first()
    assert equal([one, other], again) and one["latents"].shape == (2, 4, 2, 3)
    assert not torch.equal(one["latents"][0], one["latents"][1]) and not equal(one, other)
    alike = RandomFeatures({"latents": (4, 2), "reference": (4, 2)}, collate).read(0, 5)
    assert not torch.equal(alike["latents"], alike["reference"])


def test_folders_that_cannot_be_used_are_refused(folder: Path) -> None:
    def refused(message: str, **data: Any) -> None:
        with pytest.raises(UserError, match=f"^[^\n]*{message}"):
            prepared(folder, **data)

    with FeatureWriter(folder, "rank-1") as writer:
        writer.add("00000009", {**sample(9), "text": torch.ones(5, WIDTH + 1)})
    write_index(folder, {})
    refused(rf"made: 00000009: 'text' is \[5, {WIDTH + 1}\]")
    next((folder / "shards").glob("rank-1*")).unlink()
    write_index(folder, {})
    (folder / EMPTY_TEXT).write_bytes(b"cut")
    refused("empty_text.safetensors: missing or damaged", text_drop=0.1)
    (folder / EMPTY_TEXT).unlink()
    refused("empty_text.safetensors: missing or damaged", text_drop=0.1)
    write_empty_text(folder, {"other": torch.ones(2)})
    refused("empty_text.safetensors: holds none of latents, text, pooled; remove it and run", text_drop=0.1)
    prepared(folder)
    (folder / INDEX).unlink()
    refused("is not finished; run the prepare command again")
    for shard in (folder / "shards").iterdir():
        shard.unlink()
    write_index(folder, {})
    refused("holds no sample")


def test_a_size_that_is_set_must_be_the_folder_s(folder: Path) -> None:
    """What is left out is the folder's, and so is what equals it."""
    write_index(folder, {"sizes": [[64, 48]]})
    prepared(folder)
    prepared(folder, height=64, width=48)
    said = rf"data.height=32: {folder} was prepared with sizes \(height, width\) \[\[64, 48\]\], not \[\[32, 48\]\]"
    with pytest.raises(UserError, match=said):
        prepared(folder, height=32)
    with pytest.raises(UserError, match="data.ratios="):
        prepared(folder, ratios=("1:1",))


def test_files_that_cannot_be_used_are_named_and_skipped_or_stop_the_run(tmp_path: Path, capsys: Any) -> None:
    listed = write_files(tmp_path / "files")

    def opened(**data: Any) -> FeatureFiles:
        return FeatureFiles(listed, Pictures(**data), collate, load=load, check=check)

    with pytest.raises(UserError, match=r"no embedding of the empty text; set data.text_drop=0"):
        opened(text_drop=0.1)
    whole = opened(on_bad="skip")
    (listed.parent / "1.pt").write_bytes(b"cut")
    torch.save({**sample(2), "text": torch.ones(5, WIDTH + 1)}, listed.parent / "2.pt")
    with pytest.raises(
        UserError, match=r"files/data.jsonl:2: .*files/1.pt: cannot be read \(data.on_bad=skip leaves such files out\)"
    ):
        opened()
    found = opened(on_bad="skip")
    said = capsys.readouterr().err
    assert "2 of 9 files are skipped:" in said and "1.pt: cannot be read" in said and "2.pt: 'text' is" in said
    assert [file.name for _, file in found.files] == [f"{i}.pt" for i in range(COUNT) if i not in (1, 2)]
    assert whole.read(1, 0) is None and whole.read(1, 0) is None
    assert capsys.readouterr().err.count("1.pt: cannot be read") == 1
    (listed.parent / "2.pt").unlink()
    (listed.parent / "2.pt").symlink_to("2.pt")  # root may read what has no permissions
    for open_again in (lambda: opened(on_bad="skip"), lambda: whole.read(2, 0)):
        with pytest.raises(
            UserError, match=r"data.jsonl:3: .*2.pt: cannot be opened: Too many levels of symbolic links"
        ):
            open_again()
    for number in range(COUNT):
        (listed.parent / f"{number}.pt").unlink()
    with pytest.raises(UserError, match="none of its 9 files can be used"):
        opened(on_bad="skip")
    listed.write_text('{"file": "0.pt"}\n{"path": 1}\n')
    with pytest.raises(UserError, match="data.jsonl:2: not a JSON object with the key 'file'"):
        opened()
