"""Lists of clips become the same batches under every layout, and what cannot be read or used is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from mindspeed_model_core.data import SlotLoader
from mindspeed_model_core.data.clips import Clips, PictureData, drops_text, open_reader
from mindspeed_model_core.data.media import read_frames, read_list, read_rows
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.recipe import Recipe, validate
from mindspeed_model_core.testing.clips import drawn, equal, write_clips
from pydantic import PositiveInt

from .toy_prepare import Videos

BATCH = 4
SHAPES = [(5, 32, 48), (9, 48, 32), (5, 32, 48), (6, 40, 60), (1, 32, 48), (9, 48, 32), (7, 32, 48)]
BUCKETS = [(5, 32, 48), (9, 48, 32), (5, 32, 48), (5, 32, 48), (1, 32, 48), (9, 48, 32), (5, 32, 48)]


class Pictures(PictureData):
    stride: ClassVar[int] = 16
    encoder_parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    height: PositiveInt = 32
    width: PositiveInt = 48


def load(
    path: Path,
    rank: int = 0,
    ranks: int = 1,
    *,
    micro: int = 2,
    seed: int = 3,
    kind: type[PictureData] = Videos,
    **data: Any,
) -> SlotLoader:
    section = kind(path=str(path), **data)
    found, place = section.source()
    assert found == "raw"
    recipe = Recipe(preset="toy", global_batch=BATCH, micro_batch=micro, seed=seed)
    return open_reader(Clips(place, section), recipe, rank, ranks, workers=section.workers)


def captions(loader: SlotLoader, steps: int) -> list[str]:
    return [caption for step in drawn([loader], steps) for batch in step for caption in batch["captions"]]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), SHAPES)


def test_batches_hold_the_clips_in_one_shape(clips: Path) -> None:
    seen = {}
    for step in drawn([load(clips)], 4):
        for batch in step:
            video, texts = batch["video"], batch["captions"]
            assert video.dtype == torch.uint8 and len(video) == len(texts) == len(batch["seeds"]) == 2
            for each, caption in zip(video, texts, strict=True):
                seen[caption] = each
    assert sorted(caption.split()[-1] for caption in seen) == [str(i) for i in range(len(SHAPES))]
    for caption, video in seen.items():
        number = int(caption.split()[-1])
        frames, height, width = BUCKETS[number]
        path = clips.parent / f"part-{number}" / ("clip.png" if frames == 1 else "clip.mp4")
        assert torch.equal(video, read_frames(path, frames, fps=16, size=(height, width)))


def test_a_model_of_pictures_sees_one_frame_of_each_file(clips: Path) -> None:
    seen = {}
    for step in drawn([load(clips, kind=Pictures)], 4):
        for batch in step:
            assert batch["video"].shape == (2, 1, 3, 32, 48)
            seen |= dict(zip(batch["captions"], batch["video"], strict=True))
    assert len(seen) == len(SHAPES)
    for caption, video in seen.items():
        number = int(caption.split()[-1])
        path = clips.parent / f"part-{number}" / ("clip.png" if SHAPES[number][0] == 1 else "clip.mp4")
        assert torch.equal(video, read_frames(path, 1, fps=None, size=(32, 48)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_order_and_resuming_depend_on_no_layout(clips: Path) -> None:
    def loaders(ranks: int, workers: int = 0) -> list[SlotLoader]:
        return [load(clips, r, ranks, text_drop=0.5, workers=workers) for r in range(ranks)]

    reference = list(drawn(loaders(1), 7))
    parted = loaders(2, workers=1)
    assert equal(list(drawn(parted, 4)), reference[:4])
    states = [json.loads(json.dumps(each.state_dict())) for each in parted]
    merged = {**states[0], "slots": {k: v for state in states for k, v in state["slots"].items()}}
    for resumed in (loaders(1), loaders(2)):
        for each in resumed:
            each.load_state_dict(merged)
        assert equal(list(drawn(resumed, 3)), reference[4:])
    assert not equal(list(drawn([load(clips, seed=4)], 1)), reference[:1])


def test_a_position_is_of_one_list_and_its_settings(clips: Path, tmp_path: Path) -> None:
    state = load(clips).state_dict()
    assert set(state) == {
        "slots",
        "micro_batch",
        "data.path (content)",
        "data.path (files listed)",
        "data.path (clips that can be used)",
        "data.fps",
        "data.frames",
        "data.height, width and ratios",
    }
    for changes, message in (
        ({"micro": 1}, "micro_batch: is 1 now and was 2"),
        ({"frames": (1, 5)}, r"data.frames: is \[1, 5\] now and was \[1, 5, 9\]"),
        ({"fps": 15.0}, "data.fps: is 15.0 now and was 16.0"),
        ({"ratios": ("3:2",)}, r"data.height, width and ratios: is \[\[32, 48\]\] now"),
    ):
        with pytest.raises(UserError, match=message):
            load(clips, **changes).load_state_dict(state)
    other = clips.with_name("other.jsonl")
    other.write_text(clips.read_text().replace("number", "No."))
    with pytest.raises(UserError, match=r"data.path \(content\): is "):
        load(other).load_state_dict(state)


def test_text_is_dropped_by_the_samples_seed(clips: Path) -> None:
    for share in (0.0, 0.5, 1.0):
        for step in drawn([load(clips, text_drop=share)], 4):
            for batch in step:
                for caption, seed in zip(batch["captions"], batch["seeds"], strict=True):
                    assert (caption == "") == drops_text(seed, share)
    dropped = sum(drops_text(seed, 0.1) for seed in range(10_000))
    assert 900 < dropped < 1100 and not drops_text(1, 0.0) and drops_text(1, 1.0)


def test_a_bad_file_is_named_and_skipped_or_stops_the_run(clips: Path, tmp_path: Path, capsys: Any) -> None:
    whole = (clips.parent / "part-0" / "clip.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    rows = [json.loads(line) for line in clips.read_text().splitlines()]
    rows = [{**row, "path": str(clips.parent / row["path"])} for row in rows[:4]]
    bad = [{"path": "cut.mp4", "text": "cut"}, {"path": "gone.mp4", "text": "gone"}]
    listed = tmp_path / "list.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bad]))
    with pytest.raises(UserError, match=r"list.jsonl:5: .*cut.mp4: .*\(data.on_bad=skip leaves such files out\)"):
        load(listed)
    loader = load(listed, on_bad="skip")
    said = capsys.readouterr().err
    assert "2 of 6 files are skipped:" in said and "cut.mp4: " in said and "gone.mp4: no such file" in said
    assert set(captions(loader, 3)) == {row["text"] for row in rows}
    (tmp_path / "gone.mp4").symlink_to("gone.mp4")  # root may read what has no permissions
    with pytest.raises(UserError, match="list.jsonl:6: .*gone.mp4: cannot be opened: Too many .*; make it readable$"):
        load(listed, on_bad="skip")
    (tmp_path / "gone.mp4").unlink()
    listed.write_text("".join(json.dumps(row) + "\n" for row in bad))
    with pytest.raises(UserError, match="none of its 2 samples can be used"):
        load(listed, on_bad="skip")


def test_a_file_that_turns_bad_is_replaced_by_the_next_of_its_bucket(tmp_path: Path, capsys: Any) -> None:
    listed = write_clips(tmp_path, SHAPES[:4])
    loader = load(listed, on_bad="skip")
    (tmp_path / "part-0" / "clip.mp4").write_bytes(b"overwritten")
    assert {caption.split()[-1] for caption in captions(loader, 4)} == {"1", "2", "3"}
    assert capsys.readouterr().err.count("part-0/clip.mp4") == 1
    (tmp_path / "part-0" / "clip.mp4").write_bytes((tmp_path / "part-2" / "clip.mp4").read_bytes())
    strict, lenient = load(listed), load(listed, on_bad="skip")
    (tmp_path / "part-0" / "clip.mp4").write_bytes(b"overwritten")
    with pytest.raises(UserError, match="clips.jsonl:1: .*part-0/clip.mp4: not a readable video"):
        captions(strict, 4)
    (tmp_path / "part-0" / "clip.mp4").unlink()
    (tmp_path / "part-0" / "clip.mp4").symlink_to("clip.mp4")
    with pytest.raises(UserError, match="clips.jsonl:1: .*part-0/clip.mp4: cannot be opened"):
        captions(lenient, 4)


def test_lists_with_tabs_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    listed = tmp_path / "list.tsv"
    listed.write_text('path\tsentence\na.mp3\tsay "hi\tthere\n', encoding="utf-8")
    with pytest.raises(UserError, match="list.tsv:2: 3 values for 2 columns"):
        list(read_rows(listed, tabs=True))
    listed.write_text('path\tsentence\na.mp3\tsay "hi\n', encoding="utf-8")
    assert list(read_rows(listed, tabs=True)) == [(2, f"{listed}:2", {"path": "a.mp3", "sentence": 'say "hi'})]
    with pytest.raises(UserError, match=r"a list is a \.jsonl or \.csv file, not \.tsv"):
        list(read_rows(listed))
    with pytest.raises(UserError, match="texts: no such file"):
        list(read_rows(tmp_path / "texts"))


def test_csv_lists_with_other_column_names(clips: Path) -> None:
    listed = clips.with_name("clips.csv")
    listed.write_text('video,prompt\npart-0/clip.mp4,"one, two"\npart-2/clip.mp4,three\n')
    assert set(captions(load(listed), 1)) == {"one, two", "three"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.jsonl", "{}", "list.jsonl:1: no key path or video or image or file_name; it has none$"),
        ("list.jsonl", '{"film": "a", "text": "b"}', "1: no key path or .* or file_name; it has film, text$"),
        ("list.jsonl", '{"video": 3, "text": "b"}', "1: 'video' must hold text, got int"),
        ("list.jsonl", '{"video": null, "text": "b"}', "1: 'video' must hold text, got NoneType"),
        ("list.jsonl", '{"video": "A", "path": "B", "text": "x"}', "1: 'path' and 'video' differ, .* all but one out"),
        ("list.jsonl", '{"video": "A", "caption": "x", "text": "y"}', "1: 'text' and 'caption' differ"),
        ("list.jsonl", "", "lists no file"),
        ("list.jsonl", "[", "list.jsonl:1: not a JSON"),
        ("list.csv", "path,text", "lists no file"),
        ("list.csv", "path,text\na.mp4,one, two", "list.csv:2: 3 values for 2 columns; quote the caption"),
        ("list.csv", "path,text\n\na.mp4", "list.csv:3: only 1 of 2 columns; add 'text'"),
        ("list.csv", "vid;cap\na.mp4;x", "list.csv:2: no key path or .* or file_name; values must be .* by commas"),
        (
            "list.csv",
            'path,text\na.mp4,"' + "x" * 200_000,
            "list.csv:2: not CSV .*; look for a quote that is not closed",
        ),
    ],
)
def test_lists_that_cannot_be_read_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text + "\n")
    with pytest.raises(UserError, match=f"^[^\n]*{message}"):
        read_list(tmp_path / name)


def test_columns_that_hold_the_same_or_nothing_are_no_matter(tmp_path: Path) -> None:
    row = {"path": "a.mp4", "video": "a.mp4", "image": None, "text": "x", "prompt": "x"}
    (tmp_path / "list.jsonl").write_text(json.dumps(row) + "\n")
    (item,) = read_list(tmp_path / "list.jsonl")
    assert (item.path, item.written, item.caption) == (tmp_path / "a.mp4", "a.mp4", "x")


def test_what_a_path_is(clips: Path, tmp_path: Path) -> None:
    def refused(message: str, path: Path | None, **data: Any) -> None:
        with pytest.raises(UserError, match=f"^[^\n]*{message}"):
            Videos(path=None if path is None else str(path), **data).source()

    assert Videos(path=str(clips), kind="raw").source() == ("raw", clips)
    assert Videos(path=str(tmp_path), kind="features").source() == ("prepared", tmp_path)
    listed = tmp_path / "data.jsonl"
    listed.write_text('\n{"file": "features/0.pt"}\n')
    for path in (tmp_path, listed):
        assert Videos(path=str(path), kind="features").source() == ("files", listed)
    refused("data.path: this field is required", None)
    refused("no such file or folder", tmp_path / "nothing")
    refused("data.kind=raw: .* is features", tmp_path, kind="raw")
    refused("data.kind=features: .* is a list", clips, kind="features")
    for path, said in ((clips.parent / "part-0" / "clip.mp4", "not .mp4"), (clips.parent, "is a folder")):
        with pytest.raises(UserError, match=f"a list is a .jsonl or .csv file, {said}|{said}; a list is"):
            read_list(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": (80,)}, "80 is not 4n \\+ 1; try 81"),
        ({"frames": ()}, "give one length or more"),
        ({"height": 470}, "height=470: must be a multiple of 16; try 464"),
        ({"multiple": 32, "width": 48}, "width=48: must be a multiple of 32; try 64"),
        ({"ratios": ("16/9",)}, "'16/9' is not width:height"),
        ({"multiple": 8}, "multiple=8: must be a multiple of 16"),
        ({"synthetic": (80, 480, 832)}, r"synthetic: 80 is not 4n \+ 1; try 81"),
        ({"synthetic": (81, 480, 830)}, r"synthetic\[2\]=830: must be a multiple of 16; try 832"),
        ({"fps": 0}, "greater than 0"),
        ({"text_drop": 2}, "less than or equal to 1"),
        ({"encoder": "x"}, "did you mean 'encoders'"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Videos, fields, "data")


def test_pictures_have_no_lengths() -> None:
    assert Pictures().lengths == (1,) and Pictures().shapes == {"sizes": [[32, 48]]}
    with pytest.raises(UserError, match="unknown key"):
        validate(Pictures, {"frames": (1,)}, "data")


def test_the_encoders_folder_is_found_beside_the_weights(tmp_path: Path) -> None:
    for part in ("vae", "text_encoder", "transformer"):
        (tmp_path / part).mkdir()
    data = Videos()
    assert data.encoder_folder(str(tmp_path)) == str(tmp_path)
    assert data.encoder_folder(str(tmp_path / "transformer")) == str(tmp_path)
    assert Videos(encoders="else").encoder_folder(str(tmp_path)) == "else"
    for init_from in (None, str(tmp_path / "vae" / "deeper")):
        with pytest.raises(UserError, match="data.encoders: .*, with vae/, text_encoder/"):
            data.encoder_folder(init_from)


def test_a_folder_of_images_is_a_list(tmp_path: Path) -> None:
    """Captions beside the images, in a list among them, or one for all; a caption that changes is another list."""
    write_clips(tmp_path / "made", [(1, 32, 48)] * 3)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (tmp_path / "made" / f"part-{number}" / "clip.png").rename(folder / f"{number}.png")
    (folder / "notes.md").write_text("no image")
    (folder / "1.txt").write_text("one\nof its own ")
    loader = load(folder, kind=Pictures, prompt="all")
    assert set(captions(loader, 4)) == {"all", "one of its own"}
    state = loader.state_dict()
    (folder / "1.txt").write_text("another")
    with pytest.raises(UserError, match="data"):
        load(folder, kind=Pictures, prompt="all").load_state_dict(state)
    with pytest.raises(UserError, match=r"0.png: no caption; write it to 0.txt, or give a prompt"):
        load(folder, kind=Pictures)
    (folder / "metadata.jsonl").write_text("".join(f'{{"file_name": "{n}.png", "text": "t{n}"}}\n' for n in range(3)))
    assert set(captions(load(folder, kind=Pictures), 4)) == {"t0", "t1", "t2"}
    with pytest.raises(UserError, match="metadata.jsonl: a list has its captions on its lines; leave the prompt"):
        load(folder, kind=Pictures, prompt="all")
    with pytest.raises(UserError, match="data.prompt='all': is for a folder of images, which .* is not; leave it out"):
        Pictures(path=str(folder / "metadata.jsonl"), prompt="all").source()


def test_a_folder_with_the_name_of_an_image_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "photos" / "album.png").mkdir(parents=True)
    with pytest.raises(UserError, match=r"album.png: is a folder; name a file"):
        load(tmp_path / "photos", kind=Pictures, prompt="all")


def test_a_folder_that_grew_is_another_one(tmp_path: Path) -> None:
    write_clips(tmp_path, [(1, 32, 48)] * 3)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in (0, 2):
        (tmp_path / f"part-{number}" / "clip.png").rename(folder / f"{number}.png")
    state = load(folder, kind=Pictures, prompt="all").state_dict()
    (tmp_path / "part-1" / "clip.png").rename(folder / "1.png")
    grown = load(folder, kind=Pictures, prompt="all")
    with pytest.raises(UserError, match=r"data.path \(files listed\): is 3 now and was 2 .*, or begin another run"):
        grown.load_state_dict(state)


def test_what_is_left_out_of_a_folder_is_said(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("a.HEIC", "b.heic", "c.mov", "notes", ".hidden"):
        (folder / name).write_bytes(b"")
    said = r"4 files \(2 .heic, 1 .mov, 1 without an ending\) and 1 folder; known are .*convert"
    with pytest.raises(UserError, match=rf"photos: holds no image, but {said}"):
        load(folder, kind=Pictures, prompt="all")
    write_clips(tmp_path, [(1, 32, 48)])
    (tmp_path / "part-0" / "clip.png").rename(folder / "clip.png")
    (folder / "clip.txt").write_text("a caption")
    (folder / "d.txt").write_text("of no image")
    load(folder, kind=Pictures)
    said = said.replace("4 files", "5 files").replace("1 without", "1 .txt, 1 without")
    assert re.match(rf"{folder}: left out: {said}", capsys.readouterr().err)
    monkeypatch.setenv("RANK", "1")
    load(folder, kind=Pictures)
    assert not capsys.readouterr().err


def test_references_come_in_the_shape_of_what_is_made_of_them(tmp_path: Path) -> None:
    write_clips(tmp_path, [(1, 32, 48), (1, 80, 40)])
    listed = tmp_path / "pairs.jsonl"
    rows = [{"path": f"part-{n}/clip.png", "text": "t", "reference": f"part-{1 - n}/clip.png"} for n in range(2)]
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = Clips(listed, Pictures(path=str(listed)), references=True)
    sample = reader.read(0, 5)
    assert sample is not None and sample["reference"].shape == sample["video"].shape == (1, 3, 32, 48)
    assert torch.equal(sample["reference"], read_frames(tmp_path / "part-1/clip.png", 1, fps=None, size=(32, 48)))
    assert reader.collate([sample, sample])["reference"].shape == (2, 1, 3, 32, 48)
    (tmp_path / "part-1/clip.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"pairs.jsonl:1: .*part-1/clip.png: not a readable image"):
        Clips(listed, Pictures(path=str(listed)), references=True)
    with pytest.raises(UserError, match="pairs.jsonl:1: no key reference or source or control"):
        listed.write_text('{"path": "part-0/clip.png", "text": "t"}\n')
        Clips(listed, Pictures(path=str(listed)), references=True)
