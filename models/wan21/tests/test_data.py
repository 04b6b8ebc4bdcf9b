"""What the network takes is made of clips, prepared folders and MindSpeed-MM's files, or refused by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core.data.clips import drops_text
from mindspeed_model_core.data.encoded import EMPTY_TEXT
from mindspeed_model_core.data.features import FeatureWriter, write_index
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.recipe import Recipe, validate
from mindspeed_model_core.testing.clips import drawn, equal, write_clips
from mindspeed_model_wan21.config import PRESETS, Wan21Config
from mindspeed_model_wan21.data import WanData, _check_shapes, open_data, synthetic_data
from safetensors.torch import save_file
from torch import Tensor

T2V, I2V = PRESETS["tiny-t2v"], PRESETS["tiny-i2v"]
SHAPES = [(5, 32, 48), (9, 48, 32), (6, 40, 60), (1, 32, 48)]


class WithData(Recipe):
    data: WanData


def recipe(path: Path | None, **data: Any) -> WithData:
    shapes = {"height": 32, "width": 48, "frames": (1, 5, 9), "ratios": ("3:2", "2:3")}
    section = WanData(**{**shapes, "path": None if path is None else str(path), **data})
    return WithData(preset="tiny-t2v", global_batch=4, micro_batch=2, seed=3, data=section)


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


def test_clips_are_read_with_their_captions(clips: Path) -> None:
    seen = {}
    for step in drawn([open_data(recipe(clips), T2V, 0, 1)], 4):
        for batch in step:
            seen |= {caption: tuple(v.shape) for caption, v in zip(batch["captions"], batch["video"], strict=True)}
    assert {int(caption.split()[-1]): shape for caption, shape in seen.items()} == {
        0: (5, 3, 32, 48),
        1: (9, 3, 48, 32),
        2: (5, 3, 32, 48),
        3: (1, 3, 32, 48),
    }


@pytest.mark.parametrize("config", [T2V, I2V])
def test_feature_batches_are_padded_and_stacked(tmp_path: Path, config: Wan21Config) -> None:
    loader = open_data(recipe(write_features(tmp_path)), config, 0, 1)
    by_text = {len(features(i)["text"]): i for i in range(9)}
    seen = set()
    for step in drawn([pickle.loads(pickle.dumps(loader))], 5):
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


def test_a_dropped_text_is_the_empty_prompts_embedding(tmp_path: Path) -> None:
    seen = set()
    for step in drawn([open_data(recipe(write_features(tmp_path), text_drop=0.5), I2V, 0, 1)], 4):
        for batch in step:
            for text, seed in zip(batch["text"], batch["seeds"], strict=True):
                empty = bool((text[0] == 7).all()) and not text[1:].any()
                assert empty == drops_text(seed, 0.5)
                seen.add(empty)
    assert seen == {True, False}


def write_incumbents(folder: Path, wrapped: bool, last: bool = False) -> Path:
    """Write features as MindSpeed-MM does: some tensors with a batch dim, some lists of one; also with a last frame."""
    (folder / "features").mkdir()
    for number in range(4):
        sample = features(number)
        text = torch.full((512, 32), 9.0)  # its encoder embeds the padding too
        text[: number + 2] = sample["text"].float()
        mask = (torch.arange(512) < number + 2).long()
        given = torch.zeros(4, *sample["latents"].shape[1:])
        given[:, 0] = 1
        if last:
            given[-1, -1] = 1
        condition = torch.cat((given, sample["condition"]))
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
        for step in drawn([open_data(recipe(path), I2V, 0, 1)], 4):
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


def test_mindspeed_mm_features_of_another_kind_are_refused(tmp_path: Path) -> None:
    both = I2V.model_copy(update={"pos_embed_seq_len": 10})
    for last in (False, True):
        folder = tmp_path / str(last)
        folder.mkdir()
        write_incumbents(folder, True, last)
        right, wrong = (both.model_copy(update={"pos_embed_seq_len": 5}), I2V) if last else (I2V, both)
        open_data(recipe(folder), right, 0, 1)
        with pytest.raises(
            UserError, match=f"clip_0.pt: its mask .* is not that of conditioning '{wrong.conditioning}'"
        ):
            open_data(recipe(folder), wrong, 0, 1)
    with pytest.raises(UserError, match="'image' has 5 tokens, the network takes 10: its conditioning is 'first-last'"):
        open_data(recipe(folder), both, 0, 1)
    published = I2V.model_copy(update={"image_dim": 1280})
    shapes = {"latents": (16, 2, 4, 6), "text": (3, 32), "image": (514, 1280), "condition": (16, 2, 4, 6)}
    with pytest.raises(UserError, match="x: 'image' has 514 tokens, the network takes 257"):
        _check_shapes(published, "x", shapes)
    _check_shapes(published, "x", {**shapes, "image": (257, 1280)})
    with pytest.raises(UserError, match=r"x: 'latents' is \[16, 2, 5, 6\], .* in multiples of \[1, 2, 2\]"):
        _check_shapes(T2V, "x", {**shapes, "latents": (16, 2, 5, 6)})


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
    (first,), (again,) = (drawn([synthetic_data(made, config, r, 2) for r in range(2)], 1) for _ in range(2))
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
        ({"multiple": 8}, "multiple=8: must be a multiple of 16"),
        ({"synthetic": (81, 480, 830)}, r"synthetic\[2\]=830: must be a multiple of 16; try 832"),
        ({"fps": 0}, "greater than 0"),
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
    refused("prepared with --conditioning none, the network takes first", plain)
    refused("made: 00000000: 'text' is .*, the network takes 4096 columns", folder, PRESETS["t2v-1.3b"])
    refused("'image' is .*, the network takes 1280 columns", folder, I2V.model_copy(update={"image_dim": 1280}))
    refused("data.frames=1: an image leaves nothing to predict", clips)


def test_the_encoders_folder_is_found_beside_the_weights(tmp_path: Path) -> None:
    for part in ("vae", "text_encoder", "tokenizer", "transformer"):
        (tmp_path / part).mkdir()
    assert WanData().encoder_folder(str(tmp_path / "transformer")) == str(tmp_path)
    (tmp_path / "tokenizer").rmdir()
    with pytest.raises(UserError, match="data.encoders: .*, with vae/, text_encoder/, tokenizer/"):
        WanData().encoder_folder(str(tmp_path))
