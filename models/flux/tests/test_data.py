"""Images, pairs and features become the same batches; what the network cannot take is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core.data.features import FeatureSet, FeatureWriter, write_index
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing.clips import drawn, equal
from mindspeed_model_flux import MODEL, FluxConfig
from mindspeed_model_flux.data import FluxData, open_data
from mindspeed_model_flux.encoders import Encoders
from mindspeed_model_flux.prepare import prepare, prepare_command
from mindspeed_model_flux.task import FluxRecipe, RectifiedFlow
from mindspeed_model_flux.tiny import write_tiny_encoders
from PIL import Image

from .photos import RATIOS, SHAPES, SIZES, write_photos
from .random_features import write_features

TINY = MODEL.presets["tiny"]
SHAPE: dict[str, Any] = {"height": 32, "width": 48, "ratios": RATIOS, "text_tokens": 16}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), pairs=True)


def recipe(path: Path, **data: Any) -> FluxRecipe:
    return FluxRecipe(preset="tiny", global_batch=4, micro_batch=2, data={"path": str(path), **data})


def config(kontext: bool) -> FluxConfig:
    return TINY.model_copy(update={"kontext": kontext})


@pytest.mark.parametrize("kontext", [False, True])
def test_prepared_features_are_what_training_makes_of_the_images(
    kontext: bool, photos: Path, encoders: Path, tmp_path: Path
) -> None:
    """Batch by batch, in the same order and with the same noise; a position in an epoch means the same."""
    line = prepare(photos, tmp_path / "made", encoders, FluxData(**SHAPE), pairs=kontext)
    assert re.fullmatch(rf"{tmp_path}/made: 6 samples encoded in \d+ s, [\d.]+ a second; 6 in all", line)
    raw = recipe(photos, **SHAPE, encoders=str(encoders))
    ready = recipe(tmp_path / "made", text_tokens=16)
    steps = []
    for each in (raw, ready):
        loader = open_data(each, config(kontext), 0, 1)
        task = RectifiedFlow(each, config(kontext))
        steps.append([])
        for step in drawn([loader], 3):
            for batch in step:
                work = task.work(batch)
                encoded = task.encode(batch)
                assert task.work(encoded) == work and task.count(batch) == 2
                steps[-1].append(encoded)
    assert len(steps[0]) == 6
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)  # texts in bf16, batch by batch
        assert ("reference" in a) == kontext
        if kontext:
            assert a["reference"].shape == a["x"].shape
    assert {tuple(batch["x"].shape[2:]) for batch in steps[0]} == {(4, 6), (6, 4)}


def test_samples_are_what_the_encoders_give(photos: Path, encoders: Path, tmp_path: Path) -> None:
    """The image and its reference, brought to one size; the empty caption beside them."""
    prepare(photos, tmp_path / "made", encoders, FluxData(**SHAPE), pairs=True)
    found, ours = FeatureSet(tmp_path / "made"), Encoders(encoders)
    assert found.meta["pairs"] is True and found.meta["text_tokens"] == 16
    for number, (height, width) in enumerate(SIZES):
        sample = found.read(number)
        assert sample["latents"].shape == sample["reference"].shape == (16, height // 8, width // 8)
        if SHAPES[number] != (height, width):
            continue
        for name, file in (("latents", f"{number}.png"), ("reference", f"{number}-before.png")):
            pixels = torch.from_numpy(_pixels(photos.parent / file)).permute(2, 0, 1)
            torch.testing.assert_close(sample[name], ours.images(pixels[None])[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(sample["latents"], sample["reference"])
    with pytest.raises(UserError, match="was prepared with pairs True, now it is False"):
        prepare(photos, tmp_path / "made", encoders, FluxData(**SHAPE))
    with pytest.raises(UserError, match="text_tokens=8: .* was prepared with text_tokens 16, not 8"):
        open_data(recipe(tmp_path / "made", text_tokens=8), TINY.model_copy(update={"kontext": True}), 0, 1)
    with pytest.raises(UserError, match="made: was prepared with --pairs, and this network takes no reference"):
        open_data(recipe(tmp_path / "made"), TINY, 0, 1)


def _pixels(path: Path) -> Any:
    import numpy as np

    return np.array(Image.open(path))


def test_text_is_dropped_for_guidance(photos: Path, encoders: Path, tmp_path: Path) -> None:
    prepare(photos, tmp_path / "made", encoders, FluxData(**SHAPE))
    empty = Encoders(encoders).text([""], 16)
    for path, more in ((tmp_path / "made", {"text_tokens": 16}), (photos, {**SHAPE, "encoders": str(encoders)})):
        each = recipe(path, **more, text_drop=1.0)
        (step,) = drawn([open_data(each, TINY, 0, 1)], 1)
        batch = RectifiedFlow(each, TINY).encode(step[0])
        for name in ("text", "pooled"):
            assert all(torch.allclose(row.float(), empty[name][0].float(), atol=2e-2) for row in batch[name]), name


def test_a_folder_of_photos_with_one_prompt(encoders: Path, tmp_path: Path) -> None:
    """DreamBooth's: the same caption for all, but for those that have one of their own."""
    listed = write_photos(tmp_path / "dogs")
    listed.unlink()
    (tmp_path / "dogs" / "3.txt").write_text("a dog\n  asleep\n")
    each = recipe(tmp_path / "dogs", **SHAPE, prompt="a photo of sks dog")
    seen = [caption for step in drawn([open_data(each, TINY, 0, 1)], 4) for b in step for caption in b["captions"]]
    assert set(seen) == {"a photo of sks dog", "a dog asleep"}
    command = {"source": tmp_path / "dogs", "destination": tmp_path / "made", "encoders": encoders}
    prepare_command(**command, height=32, width=48, text_tokens=16, prompt="a photo of sks dog")
    assert len(FeatureSet(tmp_path / "made")) == 6
    with pytest.raises(UserError, match=r"0.png: no caption; write it to 0.txt, or give a prompt"):
        open_data(recipe(tmp_path / "dogs", **SHAPE), TINY, 0, 1)
    with pytest.raises(UserError, match="pairs of images are listed in a .jsonl or .csv file"):
        open_data(each, config(True), 0, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: Image.new("RGB", (1, 1)).save(path), "is 1 x 1 pixels, the least is 16 along a side"),
        (lambda path: path.write_bytes(b"no image"), "not a readable image"),
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(_header(20_000, 20_000)), "has more than [0-9,]+ pixels; scale it down"),
    ],
    ids=["one pixel", "damaged", "missing", "huge"],
)
@pytest.mark.parametrize("name", ["0.png", "0-before.png"])
def test_a_bad_image_is_named_and_skipped_or_stops_the_run(
    make: Any, message: str, name: str, tmp_path: Path, encoders: Path, capsys: Any
) -> None:
    photos = write_photos(tmp_path / "photos", pairs=True)
    (photos.parent / name).unlink()
    make(photos.parent / name)
    with pytest.raises(UserError, match=rf"^{photos}:1: [^\n]*{name}: {message}[^\n]*$"):
        open_data(recipe(photos, **SHAPE), config(True), 0, 1)
    open_data(recipe(photos, **SHAPE, on_bad="skip"), config(True), 0, 1)
    assert re.search(rf"1 of 6 files are skipped:\n[^\n]*{message}", capsys.readouterr().err)


def _header(width: int, height: int) -> bytes:
    """Return a picture's header that promises many pixels."""
    import struct
    import zlib

    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"IEND"
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, end)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_pictures_of_every_mode_are_read(tmp_path: Path) -> None:
    """Transparency lies on white; ink and grey become red, green and blue."""
    listed = write_photos(tmp_path, [(32, 48)] * 3)
    photo = Image.open(tmp_path / "0.png")
    photo.convert("L").save(tmp_path / "1.png")
    photo.putalpha(0)
    photo.save(tmp_path / "0.png")
    Image.open(tmp_path / "2.png").convert("CMYK").save(tmp_path / "2.jpg", quality=95)
    listed.write_text(listed.read_text().replace("2.png", "2.jpg"))
    loader = open_data(recipe(listed, height=32, width=48), TINY, 0, 1)
    seen: dict[str, torch.Tensor] = {}
    for step in drawn([loader], 2):
        for batch in step:
            seen |= dict(zip(batch["captions"], batch["video"][:, 0], strict=True))
    clear, ink, grey = (seen[name] for name in ("astronaut, number 0", "chelsea, number 2", "coffee, number 1"))
    assert bool((clear == 255).all()) and equal(grey[0], grey[1]) and grey.float().std() > 1
    assert ink.shape == (3, 32, 48) and ink.float().std() > 1


def test_features_the_network_cannot_take_are_refused(tmp_path: Path) -> None:
    good = {"latents": (16, 4, 6), "text": (8, 32), "pooled": (24,), "reference": (16, 4, 6)}
    for number, (changes, message) in enumerate(
        [
            ({"latents": (4, 4, 6)}, r"'latents' is \[4, 4, 6\], the network takes 16 along dim 0 of 3"),
            ({"latents": (16, 5, 6)}, "rows and columns must be even; encode images whose sides are multiples of 16"),
            ({"text": (8, 31)}, "'text' is .* the network takes 32"),
            ({"pooled": (1, 24)}, r"'pooled' is \[1, 24\], the network takes 24"),
            ({"pooled": None}, "has no 'pooled', which the network takes"),
            ({"reference": None}, "has no 'reference', .* prepare it with --pairs, or set config.kontext=false"),
            ({"reference": (16, 4, 4)}, r"'reference' is \[16, 4, 4\], 'latents' \[16, 4, 6\]"),
        ]
    ):
        folder = tmp_path / str(number)
        with FeatureWriter(folder) as writer:
            shapes = {**good, **changes}
            writer.add("one", {name: torch.zeros(shape) for name, shape in shapes.items() if shape is not None})
        write_index(folder, {})
        with pytest.raises(UserError, match=rf"^{folder}: one: .*{message}"):
            open_data(recipe(folder), config(True), 0, 1)
    folder = write_features(tmp_path / "random", TINY, [(4, 6)])
    with pytest.raises(UserError, match="data.prompt='x': is for a folder of images, which .* is not"):
        open_data(recipe(folder, prompt="x"), TINY, 0, 1)
    listed = tmp_path / "files.jsonl"
    listed.write_text('{"file": "a.pt"}\n')
    with pytest.raises(UserError, match="lists feature files; give a list of images, or a prepared folder"):
        open_data(recipe(listed), TINY, 0, 1)


def test_impossible_sizes_name_their_field(photos: Path, encoders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^--height=250: must be a multiple of 16; try 256"):
        prepare_command(photos, tmp_path / "made", encoders, height=250)
    with pytest.raises(UserError, match="^--encoders=.*nowhere: no such folder"):
        prepare_command(photos, tmp_path / "made", tmp_path / "nowhere", height=32, width=32)
    with pytest.raises(UserError, match="no key reference or source or control"):
        plain = write_photos(tmp_path / "plain")
        prepare_command(plain, tmp_path / "made", encoders, height=32, width=32, pairs=True)
    assert not (tmp_path / "made").exists()
