"""Clips and features become the same batches under every layout, and what does not fit is refused by name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core.data.features import INDEX, FeatureWriter, write_index
from mindspeed_model_core.data.media import read_frames
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.recipe import Recipe, validate
from mindspeed_model_wan21.config import PRESETS, Wan21Config
from mindspeed_model_wan21.data import EMPTY_TEXT, WanData, drops_text, open_data, synthetic_data
from safetensors.torch import save_file
from torch import Tensor

from .clips import write_clips

T2V, I2V = PRESETS["tiny-t2v"], PRESETS["tiny-i2v"]
BATCH = 4
SHAPES = [(5, 32, 48), (9, 48, 32), (5, 32, 48), (6, 40, 60), (1, 32, 48), (9, 48, 32), (7, 32, 48)]
BUCKETS = [(5, 32, 48), (9, 48, 32), (5, 32, 48), (5, 32, 48), (1, 32, 48), (9, 48, 32), (5, 32, 48)]


class WithData(Recipe):
    data: WanData


def recipe(path: Path | None, *, micro: int = 2, seed: int = 3, **data: Any) -> WithData:
    shapes = {"height": 32, "width": 48, "frames": (1, 5, 9), "ratios": ("3:2", "2:3")}
    section = WanData(**{**shapes, "path": None if path is None else str(path), **data})
    return WithData(preset="tiny-t2v", global_batch=BATCH, micro_batch=micro, seed=seed, data=section)


def steps(loaders: list[Any], count: int) -> Iterator[list[dict[str, Any]]]:
    """Yield each step's micro-batches in the order of their slots."""
    iterators = [iter(each) for each in loaders]
    for _ in range(count):
        per_rank = [next(iterator) for iterator in iterators]
        yield [batch for group in zip(*per_rank, strict=True) for batch in group]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), SHAPES)


def features(number: int, image: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    shape = (16, 2, 4, 6) if number % 3 else (16, 3, 6, 4)
    sample = {
        "latents": torch.randn(shape, generator=generator),
        "text": torch.randn(number + 2, 32, generator=generator).bfloat16(),
    }
    if image:
        sample |= {
            "image": torch.randn(5, 20, generator=generator),
            "condition": torch.randn(shape, generator=generator),
        }
    return sample


def write_features(folder: Path, image: bool = True, conditioning: str = "first") -> Path:
    with FeatureWriter(folder, shard_bytes=30_000) as writer:
        for number in range(9):
            writer.add(f"{number:08d}", features(number, image))
    save_file({"text": torch.full((1, 32), 7.0)}, folder / EMPTY_TEXT)
    write_index(folder, {"conditioning": conditioning})
    return folder


def test_raw_batches_hold_the_clips_in_one_shape(clips: Path) -> None:
    seen = {}
    for step in steps([open_data(recipe(clips), T2V, 0, 1)], 4):
        for batch in step:
            video, captions = batch["video"], batch["captions"]
            assert video.dtype == torch.uint8 and len(video) == len(captions) == len(batch["seeds"]) == 2
            for each, caption in zip(video, captions, strict=True):
                seen[caption] = each
    assert sorted(caption.split()[-1] for caption in seen) == [str(i) for i in range(len(SHAPES))]
    for caption, video in seen.items():
        number = int(caption.split()[-1])
        frames, height, width = BUCKETS[number]
        path = clips.parent / f"part-{number}" / ("clip.png" if frames == 1 else "clip.mp4")
        assert torch.equal(video, read_frames(path, frames, fps=16, size=(height, width)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", ["raw", "features"])
def test_order_and_resuming_depend_on_no_layout(clips: Path, tmp_path: Path, kind: str) -> None:
    path, config = (clips, T2V) if kind == "raw" else (write_features(tmp_path), I2V)

    def loaders(ranks: int, workers: int = 0) -> list[Any]:
        return [open_data(recipe(path, text_drop=0.5, workers=workers), config, r, ranks) for r in range(ranks)]

    reference = list(steps(loaders(1), 7))
    parted = loaders(2, workers=1)
    assert equal(list(steps(parted, 4)), reference[:4])
    states = [json.loads(json.dumps(each.state_dict())) for each in parted]
    merged = {**states[0], "slots": {k: v for state in states for k, v in state["slots"].items()}}
    for resumed in (loaders(1), loaders(2)):
        for each in resumed:
            each.load_state_dict(merged)
        assert equal(list(steps(resumed, 3)), reference[4:])
    assert not equal(list(steps([open_data(recipe(path, seed=4), config, 0, 1)], 1)), reference[:1])
    with pytest.raises(UserError, match="micro_batch: is 1 now and was 2"):
        open_data(recipe(path, micro=1), config, 0, 1).load_state_dict(merged)


@pytest.mark.parametrize("config", [T2V, I2V])
def test_feature_batches_are_padded_and_stacked(tmp_path: Path, config: Wan21Config) -> None:
    loader = open_data(recipe(write_features(tmp_path)), config, 0, 1)
    by_text = {len(features(i)["text"]): i for i in range(9)}
    seen = set()
    for step in steps([pickle.loads(pickle.dumps(loader))], 5):
        for batch in step:
            assert ("image" in batch) == ("condition" in batch) == (config is I2V)
            assert batch["text"].shape == (2, 512, 32) and len(set(batch["seeds"])) == 2
            for i in range(2):
                length = int(batch["text"][i].any(1).sum())
                want = features(by_text[length])
                seen.add(by_text[length])
                assert torch.equal(batch["text"][i, :length], want["text"])
                assert torch.equal(batch["latents"][i], want["latents"])
                assert config is T2V or torch.equal(batch["image"][i], want["image"])
    assert seen == set(range(9))


def test_text_is_dropped_by_the_samples_seed(clips: Path, tmp_path: Path) -> None:
    folder = write_features(tmp_path)
    for share in (0.0, 0.5, 1.0):
        for path, config in ((clips, T2V), (folder, I2V)):
            for step in steps([open_data(recipe(path, text_drop=share), config, 0, 1)], 4):
                for batch in step:
                    for i, seed in enumerate(batch["seeds"]):
                        if path is clips:
                            empty = batch["captions"][i] == ""
                        else:
                            empty = bool((batch["text"][i, 0] == 7).all()) and not batch["text"][i, 1:].any()
                        assert empty == drops_text(seed, share)
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
    with pytest.raises(UserError, match=r"cut.mp4: .*\(data.on_bad=skip leaves such files out\)"):
        open_data(recipe(listed), T2V, 0, 1)
    loader = open_data(recipe(listed, on_bad="skip"), T2V, 0, 1)
    said = capsys.readouterr().err
    assert "2 of 6 files are skipped:" in said and "cut.mp4: " in said and "gone.mp4: no such file" in said
    captions = {caption for step in steps([loader], 3) for batch in step for caption in batch["captions"]}
    assert captions == {row["text"] for row in rows}
    listed.write_text("".join(json.dumps(row) + "\n" for row in bad))
    with pytest.raises(UserError, match="none of its 2 clips can be used"):
        open_data(recipe(listed, on_bad="skip"), T2V, 0, 1)


def test_a_file_that_turns_bad_is_replaced_by_the_next_of_its_bucket(tmp_path: Path, capsys: Any) -> None:
    listed = write_clips(tmp_path, SHAPES[:4])
    loader = open_data(recipe(listed, on_bad="skip"), T2V, 0, 1)
    (tmp_path / "part-0" / "clip.mp4").write_bytes(b"overwritten")
    captions = [caption for step in steps([loader], 4) for batch in step for caption in batch["captions"]]
    assert {caption.split()[-1] for caption in captions} == {"1", "2", "3"}
    assert capsys.readouterr().err.count("part-0/clip.mp4") == 1
    with pytest.raises(UserError, match="part-0/clip.mp4"):
        strict = recipe(listed)
        (tmp_path / "part-0" / "clip.mp4").write_bytes((tmp_path / "part-2" / "clip.mp4").read_bytes())
        loader = open_data(strict, T2V, 0, 1)
        (tmp_path / "part-0" / "clip.mp4").write_bytes(b"overwritten")
        list(steps([loader], 4))


def test_csv_lists_with_other_column_names(clips: Path) -> None:
    listed = clips.with_name("clips.csv")
    listed.write_text('video,prompt\npart-0/clip.mp4,"one, two"\npart-2/clip.mp4,three\n')
    (step,) = steps([open_data(recipe(listed), T2V, 0, 1)], 1)
    assert {caption for batch in step for caption in batch["captions"]} == {"one, two", "three"}


def write_incumbents(folder: Path, wrapped: bool) -> Path:
    """Write features as MindSpeed-MM does: some tensors with a batch dim, some lists of one."""
    (folder / "features").mkdir()
    for number in range(4):
        sample = features(number)
        text = torch.zeros(512, 32)
        text[: number + 2] = sample["text"].float()
        mask = (torch.arange(512) < number + 2).long()
        condition = torch.cat((torch.ones(4, *sample["latents"].shape[1:]), sample["condition"]))
        held: dict[str, Any] = {
            "video": sample["latents"],
            "prompt_ids": text,
            "prompt_mask": mask,
            "i2v_clip_feature": sample["image"],
            "i2v_vae_feature": condition,
        }
        if wrapped:
            held = {key: value[None] for key, value in held.items()}
            held |= {key: [held[key]] for key in ("prompt_ids", "prompt_mask")}
        torch.save(held, folder / "features" / f"clip_{number}.pt")
    lines = [{"path": "x.mp4", "cap": "x", "file": f"features/clip_{i}.pt"} for i in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("wrapped", [False, True])
def test_mindspeed_mm_features_are_read(tmp_path: Path, wrapped: bool) -> None:
    write_incumbents(tmp_path, wrapped)
    seen = {}
    for path in (tmp_path, tmp_path / "data.jsonl"):
        for step in steps([open_data(recipe(path), I2V, 0, 1)], 4):
            for batch in step:
                for i in range(2):
                    seen[int(batch["text"][i].any(1).sum()) - 2] = {
                        k: batch[k][i] for k in ("latents", "image", "condition", "text")
                    }
    for number in range(4):
        want = features(number)
        assert torch.equal(seen[number]["latents"], want["latents"])
        assert torch.equal(seen[number]["image"], want["image"])
        assert torch.equal(seen[number]["condition"], want["condition"])
        assert torch.equal(seen[number]["text"][: number + 2], want["text"].float())


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def test_a_mindspeed_mm_file_that_is_no_tensors_is_refused(tmp_path: Path, capsys: Any) -> None:
    write_incumbents(tmp_path, False)
    torch.save({"video": Evil()}, tmp_path / "features" / "clip_1.pt")
    with pytest.raises(UserError, match="clip_1.pt: not a readable file of features"):
        open_data(recipe(tmp_path), I2V, 0, 1)
    assert "must not run" not in capsys.readouterr().out
    loader = open_data(recipe(tmp_path, on_bad="skip"), I2V, 0, 1)
    assert len(loader.source.read.__self__.files) == 3  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no embedding of the empty text; set data.text_drop=0"):
        open_data(recipe(tmp_path, text_drop=0.1), I2V, 0, 1)


@pytest.mark.parametrize("preset", ["tiny-t2v", "tiny-i2v"])
def test_synthetic_batches_have_the_recipes_shape(preset: str) -> None:
    config = PRESETS[preset]
    made = recipe(None, synthetic=(9, 32, 64))
    (first,), (again,) = (steps([synthetic_data(made, config, r, 2) for r in range(2)], 1) for _ in range(2))
    assert equal(first, again) and not torch.equal(first[0]["latents"][0], first[0]["latents"][1])
    assert first[0]["latents"].shape == (2, 16, 3, 4, 8) and first[0]["text"].shape == (2, 512, 32)
    assert ("image" in first[0]) == (preset == "tiny-i2v")
    if preset == "tiny-i2v":
        assert first[0]["image"].shape == (2, 257, 20) and first[0]["condition"].shape == (2, 16, 3, 4, 8)
    assert WanData().synthetic == (81, 480, 832)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": (80,)}, "80 is not 4n \\+ 1; try 81"),
        ({"height": 470}, "height=470: must be a multiple of 16; try 464"),
        ({"ratios": ("16/9",)}, "'16/9' is not width:height"),
        ({"multiple": 8}, "multiple=8: must be a multiple of 16"),
        ({"synthetic": (81, 480, 830)}, r"synthetic\[2\]=830: must be a multiple of 16; try 832"),
        ({"text_drop": 2}, "less than or equal to 1"),
        ({"encoder": "x"}, "did you mean 'encoders'"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(WanData, fields, "data")


def test_data_that_does_not_fit_the_network_is_refused(clips: Path, tmp_path: Path) -> None:
    def refused(message: str, path: Path | None, config: Wan21Config = I2V, **data: Any) -> None:
        with pytest.raises(UserError, match=f"^[^\n]*{message}"):
            open_data(recipe(path, **data), config, 0, 1)

    folder = write_features(tmp_path / "made")
    plain = write_features(tmp_path / "plain", image=False, conditioning="none")
    refused("data.path: this field is required", None)
    refused("no such file or folder", tmp_path / "nothing")
    refused("prepared with --conditioning none, the network takes first", plain)
    refused("'text' is .*, the network takes 4096 columns", folder, PRESETS["t2v-1.3b"])
    refused("'image' is .*, the network takes 1280 columns", folder, I2V.model_copy(update={"image_dim": 1280}))
    refused("data.kind=raw: .* is features", folder, kind="raw")
    refused("data.kind=features: .* is a list of clips", clips, kind="features")
    refused("frames=1: an image leaves nothing to predict", clips)
    (folder / EMPTY_TEXT).unlink()
    refused("empty_text.safetensors: missing or damaged", folder, text_drop=0.1)
    (folder / INDEX).unlink()
    refused("is not finished; run the prepare command again", folder)
    for text, message in (
        ("{}", "list.jsonl:1: no key path or video or image"),
        ("", "lists no clip"),
        ("[", "not a JSON"),
    ):
        (tmp_path / "list.jsonl").write_text(text + "\n")
        refused(message, tmp_path / "list.jsonl", T2V)
    refused("a list of clips is a .jsonl or .csv file", clips.parent / "part-0" / "clip.mp4", T2V)


def test_the_encoders_folder_is_found_beside_the_weights(tmp_path: Path) -> None:
    for part in ("vae", "text_encoder", "tokenizer", "transformer"):
        (tmp_path / part).mkdir()
    data = WanData()
    assert data.encoder_folder(str(tmp_path)) == str(tmp_path)
    assert data.encoder_folder(str(tmp_path / "transformer")) == str(tmp_path)
    assert WanData(encoders="else").encoder_folder(str(tmp_path)) == "else"
    for init_from in (None, str(tmp_path / "vae" / "deeper")):
        with pytest.raises(UserError, match="data.encoders: "):
            data.encoder_folder(init_from)
