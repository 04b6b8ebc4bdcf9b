"""Clips are sampled by time, fitted and written; a damaged file is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from mindspeed_model_core.data import media
from mindspeed_model_core.data.media import Clip, contact_sheet, image_kinds, probe, read_frames, write_video
from mindspeed_model_core.errors import UserError
from PIL import Image
from torch import Tensor

H, W = 48, 64


def counting(frames: int, height: int = H, width: int = W) -> Tensor:
    """Frames of one grey each, 4 levels brighter from frame to frame."""
    levels = (torch.arange(frames) * 4 + 16).to(torch.uint8)
    return levels[:, None, None, None].expand(frames, 3, height, width)


def numbers(frames: Tensor) -> list[int]:
    """Return which frame of ``counting`` each is."""
    return [round((float(f.float().mean()) - 16) / 4) for f in frames]


def pan(frames: int, height: int = H, width: int = W) -> Tensor:
    """A window moving over a photo."""
    import skimage.data

    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)
    return torch.stack([photo[:, 100 : 100 + height, 150 + 2 * i : 150 + 2 * i + width] for i in range(frames)])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "counting.mp4"
    write_video(path, counting(49), 24)
    return path


def test_a_written_clip_reads_back(tmp_path: Path) -> None:
    frames = pan(9)
    write_video(tmp_path / "pan.mp4", iter(frames), 16)
    assert probe(tmp_path / "pan.mp4") == Clip(tmp_path / "pan.mp4", W, H, 9, 16.0)
    got = read_frames(tmp_path / "pan.mp4", 9, fps=16, size=(H, W))
    error = (got.float() - frames.float()).square().mean()
    assert got.dtype == torch.uint8 and 10 * math.log10(255**2 / float(error)) > 30
    assert [p.name for p in tmp_path.iterdir()] == ["pan.mp4"]


@pytest.mark.parametrize(
    ("fps", "count", "offset", "want"),
    [
        (24, 5, 0.0, [0, 1, 2, 3, 4]),
        (12, 5, 0.0, [0, 2, 4, 6, 8]),
        (48, 5, 0.0, [0, 0, 1, 1, 2]),
        (16, 7, 0.0, [0, 1, 3, 4, 6, 7, 9]),
        (24, 49, 0.0, list(range(49))),
        (24, 9, None, list(range(20, 29))),
        (None, 3, 1.5, [36, 37, 38]),
        (10, 3, 1.25, [30, 32, 35]),
    ],
)
def test_frames_are_chosen_by_their_time(
    clip: Path, fps: float | None, count: int, offset: float | None, want: list[int]
) -> None:
    assert numbers(read_frames(clip, count, fps=fps, size=(H, W), offset=offset)) == want


def test_time_stamps_that_are_rounded_or_uneven_do_not_shift_the_choice(tmp_path: Path) -> None:
    """Matroska rounds to milliseconds, and so to both sides; here a pause of half a second comes on top."""
    path = tmp_path / "pause.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("h264", rate=24)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for i, frame in enumerate(counting(24)):
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            picture.pts = i if i < 12 else i + 12
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert numbers(read_frames(path, 11, fps=24, size=(H, W), offset=0.0)) == list(range(11))
    assert numbers(read_frames(path, 6, fps=4, size=(H, W), offset=0.0)) == [0, 6, 11, 11, 12, 18]


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
def test_time_stamps_need_not_begin_at_zero(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"late.{suffix}"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("h264", rate=20)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        for i, frame in enumerate(counting(20)):
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            picture.pts = 100 + i
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert probe(path).frames == 20
    assert numbers(read_frames(path, 20, fps=20, size=(H, W))) == list(range(20))


def test_the_last_frame_and_not_one_more_can_be_had(clip: Path) -> None:
    assert probe(clip).length(24) == 49 and probe(clip).length(16) == 33
    assert numbers(read_frames(clip, 33, fps=16, size=(H, W)))[-1] == 48
    with pytest.raises(UserError, match=r"counting.mp4: fills 33 frames at 16 fps, 34 were asked for"):
        read_frames(clip, 34, fps=16, size=(H, W))


def test_far_frames_are_sought_and_not_all_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.mp4"
    levels = (torch.arange(600) % 56 * 4 + 16).to(torch.uint8)
    write_video(path, levels[:, None, None, None].expand(600, 3, 16, 16), 24)
    fitted = []
    from mindspeed_model_core.data import media

    spans = media._spans
    monkeypatch.setattr(media, "_spans", lambda *a: (fitted.append(1) or each for each in spans(*a)))
    got = read_frames(path, 2, fps=24, size=(16, 16), offset=590 / 24)
    assert numbers(got) == [590 % 56, 591 % 56] and len(fitted) < 300


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((H, W), (0, 0, 96, 128)),
        ((32, 64), (16, 0, 64, 128)),
        ((48, 48), (0, 16, 96, 96)),
        ((96, 128), (0, 0, 96, 128)),
    ],
)
def test_a_frame_is_scaled_to_cover_and_cropped_at_the_centre(
    tmp_path: Path, size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    photo = pan(1, 96, 128)[0]
    Image.fromarray(photo.permute(1, 2, 0).contiguous().numpy()).save(tmp_path / "photo.png")
    (got,) = read_frames(tmp_path / "photo.png", 1, fps=None, size=size)
    top, left, height, width = box
    part = photo[None, :, top : top + height, left : left + width].float()
    want = torch.nn.functional.interpolate(part, size, mode="bicubic", antialias=True)[0].clamp(0, 255)
    assert got.shape == (3, *size) and float((got.float() - want).abs().mean()) < 1


def test_images_of_every_kind_become_upright_rgb(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 4), "red")
    red.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    red.save(tmp_path / "turned.png", exif=exif)
    assert probe(tmp_path / "turned.png") == Clip(tmp_path / "turned.png", 4, 8, 1, 0.0)
    (turned,) = read_frames(tmp_path / "turned.png", 1, fps=None, size=(8, 4))
    assert turned[:, 0, 3].tolist() == [0, 0, 255] and turned[:, 4, 2].tolist() == [255, 0, 0]

    def colour(name: str) -> list[int]:
        return read_frames(tmp_path / name, 1, fps=None, size=(4, 4))[0, :, 1, 1].tolist()

    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (4, 4), (0, 127)).save(tmp_path / "half.png")
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    Image.fromarray(np.full((4, 4), 51 * 256, np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (4, 4), 9).save(tmp_path / "grey.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "first.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), "white")])
    assert colour("clear.png") == [255] * 3 and colour("half.png") == [128] * 3 and colour("print.jpg") == [255] * 3
    assert colour("deep.png") == [51] * 3 and colour("grey.png") == [9] * 3 and colour("first.gif") == [10, 20, 30]
    assert probe(tmp_path / "first.gif").frames == 1 and probe(tmp_path / "first.gif").length(16) == 1


def test_deep_images_are_scaled_and_those_without_white_refused(tmp_path: Path) -> None:
    grey = np.array([[0, 128, 257 * 7 + 128, 65535]] * 4, np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        (got,) = read_frames(tmp_path / name, 1, fps=None, size=(4, 4))
        assert got[0, 0].tolist() == [0, 0, 7, 255]
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(grey).save(tmp_path / "deep.png", exif=exif)
    assert read_frames(tmp_path / "deep.png", 1, fps=None, size=(4, 4))[0, 0, 0].tolist() == [255, 7, 0, 0]
    for mode, kind in ((np.float32, "floating-point values"), (np.int32, "32-bit or signed values")):
        Image.fromarray(np.ones((4, 4), mode)).save(tmp_path / "other.tif")
        for look in (probe, lambda path: read_frames(path, 1, fps=None, size=(4, 4))):
            with pytest.raises(UserError, match=f"other.tif: has {kind} .*save it with 8 or 16 bits"):
                look(tmp_path / "other.tif")


@pytest.mark.filterwarnings("error")
def test_damaged_exif_does_not_damage_the_image(tmp_path: Path) -> None:
    """Cut anywhere, or with a byte changed, it tells the orientation or nothing."""
    red = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    whole = exif.tobytes()
    damaged = [whole[:end] for end in range(6, len(whole), 3)]
    damaged += [whole[:at] + value + whole[at + 1 :] for at in range(6, len(whole)) for value in (b"\0", b"\xff")]
    for number, data in enumerate(damaged):
        path = tmp_path / f"{number}.{('jpg', 'png')[number % 2]}"
        red.save(path, exif=data)
        assert {probe(path).width, probe(path).height} == {8, 4}
        assert read_frames(path, 1, fps=None, size=(4, 8)).shape == (1, 3, 4, 8)


def test_avif_is_read_where_pillow_has_it_and_foreign_pictures_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import features

    picture = tmp_path / "picture.avif"
    if features.check("avif"):
        Image.new("RGB", (16, 16), "white").save(picture)
        assert read_frames(picture, 1, fps=None, size=(16, 16)).min() > 250
    else:
        picture.write_bytes(b"0")
    image_kinds.cache_clear()
    monkeypatch.setattr(features, "check", lambda name: False)
    try:
        assert ".avif" not in image_kinds()
        for name in ("picture.avif", "phone.HEIC"):
            (tmp_path / "phone.HEIC").write_bytes(b"0")
            with pytest.raises(UserError, match=f"{name}: pictures of this kind are not read here; convert it to .png"):
                probe(tmp_path / name)
    finally:
        image_kinds.cache_clear()


def test_a_video_recorded_sideways_is_turned_upright(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    frames = torch.zeros(4, 3, H, W, dtype=torch.uint8)
    frames[:, :, :, : W // 2] = 255
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("h264", rate=16)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        stream.set_display_rotation(90)
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    clip = probe(path)
    assert (clip.width, clip.height) == (H, W)
    got = read_frames(path, 1, fps=16, size=(W, H))[0].float().mean(0)
    want = torch.rot90(frames[0].float().mean(0))  # counter-clockwise, as the matrix says
    assert float((got - want).abs().mean()) < 8


def test_damaged_files_are_named(clip: Path, tmp_path: Path) -> None:
    whole = clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "empty.mp4").write_bytes(b"")
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    picture = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(picture[: len(picture) // 2])
    (tmp_path / "noise.jpg").write_bytes(bytes(range(256)) * 40)
    for name in ("cut.mp4", "noise.mp4", "empty.mp4", "cut.png", "noise.jpg", "missing.mp4", "missing.png"):
        with pytest.raises(UserError) as caught:
            read_frames(tmp_path / name, 1, fps=16, size=(H, W))
        assert str(caught.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"whole.png: is an image, 2 frames were asked for"):
        read_frames(tmp_path / "whole.png", 2, fps=16, size=(H, W))


def test_a_file_that_ends_before_its_header_says_is_truncated(tmp_path: Path) -> None:
    """A header in front outlives what it tells of, so only decoding finds the end."""
    noise = torch.randint(256, (49, 3, H, W), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole, front = tmp_path / "whole.mp4", tmp_path / "front.mp4"
    write_video(whole, noise, 24)
    with av.open(str(whole)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(front.read_bytes()[: front.stat().st_size // 2])
    assert probe(cut).frames == 49
    assert torch.equal(
        read_frames(cut, 5, fps=24, size=(H, W), offset=0), read_frames(front, 5, fps=24, size=(H, W), offset=0)
    )
    with pytest.raises(UserError, match=r"cut.mp4: .*(truncated|damaged)"):
        read_frames(cut, 49, fps=24, size=(H, W))


def test_a_frame_that_was_overwritten_is_refused_and_the_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "scratched.mp4"
    noise = torch.randint(256, (49, 3, H, W), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    write_video(path, noise, 24)
    before = read_frames(path, 5, fps=24, size=(H, W), offset=0)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    path.write_bytes(data)
    assert torch.equal(read_frames(path, 5, fps=24, size=(H, W), offset=0), before)
    with pytest.raises(UserError, match=r"scratched.mp4: .*(damaged|truncated)"):
        read_frames(path, 49, fps=24, size=(H, W))


def test_a_contact_sheet_holds_its_rows(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", [counting(3), counting(2, 24, 32)])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 + 3 * (W + 4), 4 + H + 4 + 24 + 4)
        assert sheet.getpixel((4 + W + 4, 4)) == (20, 20, 20) and sheet.getpixel((0, 0)) == (255, 255, 255)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    for frames, message in ((counting(2, 47), "needs an even height"), (counting(0), "no frames to write")):
        with pytest.raises(UserError, match=message):
            write_video(tmp_path / "new.mp4", frames, 16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("image", "size"),
    [((225, 225), (896, 896)), ((5472, 3648), (832, 1248)), ((6000, 4000), (880, 1184)), ((1600, 1067), (832, 1248))],
    ids=str,
)
def test_a_part_begins_and_ends_within_its_image(image: tuple[int, int], size: tuple[int, int]) -> None:
    """Widths of which a product rounds to more than the image has."""
    assert media._fit(Image.new("RGB", image, "red"), size).shape == (3, *size)
