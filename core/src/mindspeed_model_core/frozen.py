"""Frozen parts in the folders of diffusers' pipelines: VAEs, text and image encoders, loaded on first use."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from . import device as devices
from .errors import UserError
from .files import check_fixed, read_json

_SAMPLE = 64 * 2**10


class FrozenParts:
    """A folder with a subfolder for each frozen part, of which a model's own class says what it computes with them.

    ``needed`` are the subfolders that must be there. What encodes text computes in ``text_dtype``, the others in
    ``dtype``. Nothing is downloaded. Raises UserError for a part that is missing or cannot be read.
    """

    needed: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        folder: str | Path,
        device: torch.device | str = "cpu",
        *,
        text_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.folder, self.device = Path(folder).expanduser(), torch.device(device)
        self.text_dtype, self.dtype = text_dtype, dtype
        check_parts(self.folder, self.needed, "encoders=")

    def part(self, name: str) -> Path:
        """Return the folder of a part."""
        check_parts(self.folder, tuple(dict.fromkeys((*self.needed, name))), "encoders=")
        return self.folder / name

    def load(self, name: str, kind: Any, **dtype: torch.dtype) -> Any:
        """Return a part as a network of diffusers' or transformers' class ``kind``, on the device, frozen."""
        from transformers.utils import logging

        folder = self.part(name)
        logging.disable_progress_bar()  # one for each model of each process
        try:
            network = kind.from_pretrained(str(folder), local_files_only=True, **dtype)
        except Exception as error:  # what from_pretrained raises has no common kind
            raise UserError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None
        return network.to(self.device).requires_grad_(False).eval()

    def load_tokenizer(self, name: str, kind: Any) -> Any:
        """Return a part that is a tokenizer of transformers' class ``kind``."""
        folder = self.part(name)
        files = ("tokenizer.json", *kind.vocab_files_names.values())
        if not any((folder / file).is_file() for file in files):
            # Of nothing, transformers makes an empty tokenizer.
            raise UserError(f"{folder}: cannot be loaded: holds none of {', '.join(dict.fromkeys(files))}")
        try:
            return kind.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # as above
            raise UserError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let transformers say nothing but errors, and show no bars, while it does what it is known to do."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_parts(folder: str | Path, names: Sequence[str], field: str) -> None:
    """Raise UserError, naming ``field``, unless a folder holds all of these parts."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"{field}{folder}: {'is a file' if path.exists() else 'no such folder'}")
    missing = [name for name in names if not (path / name).is_dir()]
    if missing:
        wanted = ", ".join(f"{name}/" for name in names)
        raise UserError(f"{field}{folder}: no {missing[0]}/ there; a folder in diffusers' layout holds {wanted}")


def has_parts(folder: str | Path, names: Sequence[str]) -> bool:
    """Return whether a folder holds all of these parts."""
    return all((Path(folder).expanduser() / name).is_dir() for name in names)


def fingerprint(folder: str | Path, names: Sequence[str]) -> str:
    """Return 12 hex digits of the files of these parts: their names, sizes, and first and last 64 KiB."""
    digest = hashlib.sha256()
    folder = Path(folder).expanduser()
    for name in names:
        for path in sorted(p for p in (folder / name).rglob("*") if p.is_file() and not p.name.startswith(".")):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)}/{size}/".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE))
                file.seek(max(0, size - _SAMPLE))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:12]


def pad_rows(rows: Sequence[Tensor], length: int) -> Tensor:
    """Return ``[B, length, width]`` of embeddings ``[tokens, width]``, zero beyond each one's tokens."""
    out = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row[:length]
    return out


def signed(pixels: Tensor, device: torch.device) -> Tensor:
    """Return uint8 pixels as fp32 in [-1, 1], what VAEs see, on the device."""
    return devices.send(pixels, device).float() / 127.5 - 1


def unsigned(pixels: Tensor) -> Tensor:
    """Return pixels in [-1, 1] as uint8, those beyond at the ends."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ------------------------------------------------------------------------------------------------ images for CLIP

PREPROCESSOR = "preprocessor_config.json"


def clip_settings(size: int = 224) -> dict[str, Any]:
    """Return what a pipeline's image processor says of itself, for a CLIP that sees squares of ``size`` pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


_CLIP_STEPS = ("do_convert_rgb", "do_resize", "resample", "do_center_crop", "do_rescale", "do_normalize")
_CLIP_FIXED = {name: clip_settings()[name] for name in (*_CLIP_STEPS, "rescale_factor")}


class ClipProcessor:
    """What transformers' CLIPImageProcessor does, with Pillow alone: its own needs torchvision.

    Sizes, mean and deviation are those of the first folder with a preprocessor_config.json, else the published ones.
    UserError for one whose steps are others.
    """

    def __init__(self, *folders: Path) -> None:
        path = next((folder / PREPROCESSOR for folder in folders if (folder / PREPROCESSOR).is_file()), None)
        said = {} if path is None else read_json(path)
        if path is not None:
            check_fixed(said, _CLIP_FIXED, path, "CLIP's processor")
        settings = {**clip_settings(), **said}
        try:
            size, crop = settings["size"], settings["crop_size"]
            # The older form is one number: of the shorter edge, or of both sides of what is cut out.
            size = {"shortest_edge": size} if isinstance(size, int) else size
            crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
            self.edge = int(size["shortest_edge"]) if "shortest_edge" in size else None
            self.size = None if self.edge is not None else (int(size["width"]), int(size["height"]))
            self.crop = int(crop["width"]), int(crop["height"])
            self.mean, self.std = (torch.tensor(settings[n]).view(3, 1, 1) for n in ("image_mean", "image_std"))
        except (KeyError, TypeError, ValueError, RuntimeError):
            shown = ", ".join(f"{name}={settings[name]!r}" for name in ("size", "crop_size", "image_mean", "image_std"))
            raise UserError(f"{path}: cannot be read as CLIP's: {shown}") from None

    def __call__(self, images: Any, return_tensors: str = "pt") -> Any:
        """Return the pixels of a PIL image or a list of them, as diffusers' pipelines ask for them."""
        from transformers import BatchFeature

        images = images if isinstance(images, list) else [images]
        frames = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]
        return BatchFeature({"pixel_values": torch.stack([self.pixels(frame) for frame in frames])})

    def pixels(self, frame: Tensor) -> Tensor:
        """Return what CLIP sees of a uint8 image ``[3, H, W]``: resized, cropped and normalised, on the host."""
        from PIL import Image

        image = Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).cpu().numpy()))
        short = min(image.size)
        wanted = self.size or tuple((self.edge or short) * side // short for side in image.size)
        image = image.resize(wanted, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
        width, height = self.crop
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std
