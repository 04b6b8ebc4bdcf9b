"""Wan2.1's data: videos and images with captions, or what was encoded of them, in buckets of one shape."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from mindspeed_model_core import launch
from mindspeed_model_core.data import SlotLoader
from mindspeed_model_core.data.buckets import Bucket, BucketSource, aspect_buckets, assign
from mindspeed_model_core.data.features import INDEX, FeatureSet
from mindspeed_model_core.data.media import Item, read_frames, read_list
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.recipe import Recipe, Section, local
from mindspeed_model_core.trunk import Batch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from .config import Wan21Config
from .encoders import has_encoders, pad_text

EMPTY_TEXT = "empty_text.safetensors"
"""The file of a prepared folder that holds the embedding of the empty prompt, ``text`` ``[tokens, width]``."""

_CLIP_TOKENS = 257  # of the published CLIP, for each given frame
_SHOWN = 5  # bad files named one by one when a run begins
_STRIDE = (4, 8, 8)  # of the VAE, over frames, rows and columns

Sample = dict[str, Any]


class WanData(Section):
    """Which clips the network learns from, and the shapes they are brought to.

    ``path`` is a .jsonl or .csv list of clips and captions, a folder made by ``prepare``, or a .jsonl list of feature
    files (.pt) made by MindSpeed-MM. The shapes matter to the first alone: features have theirs.
    """

    path: str | None = local(None, description="a list of clips (.jsonl, .csv), a prepared folder, a list of .pt files")
    kind: Literal["raw", "features"] | None = local(None, description="what path is; null: what it looks like")
    encoders: str | None = local(
        None, description="the folder with vae/, text_encoder/, tokenizer/ and image_encoder/; null: that of init_from"
    )
    height: PositiveInt = 480
    width: PositiveInt = 832
    frames: tuple[PositiveInt, ...] = Field((81,), description="lengths, 4n + 1; a clip gets the longest it fills")
    fps: float = Field(16.0, gt=0, description="frames per second that clips are sampled at")
    ratios: tuple[str, ...] = Field(
        (), description="aspects that clips may keep, as 16:9, at the area of height x width; none: that of both"
    )
    multiple: PositiveInt = Field(16, description="what heights and widths are multiples of: 16, or a multiple of it")
    text_drop: float = Field(0.0, ge=0, le=1, description="share of samples whose text is empty, for guidance")
    on_bad: Literal["stop", "skip"] = Field("stop", description="what a file that cannot be used does to the run")
    workers: NonNegativeInt = local(0, description="processes that read ahead on each rank; 0: the training process")
    synthetic: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        (81, 480, 832), description="frames, height and width of measure's random batches"
    )

    @model_validator(mode="after")
    def _check(self) -> WanData:
        if not self.frames:
            raise ValueError("frames: give one length or more, such as 81")
        for name, length in (*(("frames", n) for n in self.frames), ("synthetic", self.synthetic[0])):
            if length % 4 != 1:
                raise ValueError(f"{name}: {length} is not 4n + 1; try {max(0, round((length - 1) / 4)) * 4 + 1}")
        if self.multiple % 16:
            raise ValueError(f"multiple={self.multiple}: must be a multiple of 16, the VAE's and the patches' stride")
        sides = {"height": self.height, "width": self.width}
        sides |= {f"synthetic[{i}]": self.synthetic[i] for i in (1, 2)}
        for name, side in sides.items():
            step = self.multiple if "synthetic" not in name else 16
            if side % step:
                raise ValueError(
                    f"{name}={side}: must be a multiple of {step}; try {max(1, round(side / step)) * step}"
                )
        for ratio in self.ratios:
            _ratio(ratio)
        return self

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the (height, width) that clips may be brought to."""
        if not self.ratios:
            return ((self.height, self.width),)
        return aspect_buckets(self.height * self.width, self.multiple, [_ratio(r) for r in self.ratios])

    def encoder_folder(self, init_from: str | None) -> str:
        """Return the folder of the encoders: ``encoders``, or ``init_from`` or the folder it is in, if they are there.

        Raises UserError if there are none.
        """
        if self.encoders is not None:
            return self.encoders
        for folder in (Path(init_from), Path(init_from).absolute().parent) if init_from else ():
            if has_encoders(folder):
                return str(folder)
        where = f"init_from={init_from} holds none" if init_from else "this field is required without init_from"
        raise UserError(f"data.encoders: {where}; give a folder in diffusers' layout, with vae/ and text_encoder/")


def check_frames(data: WanData, conditioning: str) -> None:
    """Raise UserError for a length of 1 where the network is given frames."""
    if conditioning != "none" and 1 in data.frames:
        raise UserError("frames=1: an image leaves nothing to predict when its frame is given; leave the length 1 out")


def _ratio(text: str) -> float:
    width, colon, height = text.partition(":")
    try:
        ratio = float(width) / float(height) if colon else float(width)
    except (ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratios: {text!r} is not width:height; write 16:9")
    return ratio


def open_data(recipe: Recipe, config: Wan21Config, rank: int, ranks: int) -> SlotLoader:
    """Return the loader of a recipe's data for one data rank; see ``BucketSource`` for the order.

    Of videos a batch holds ``video`` uint8 ``[B, F, 3, H, W]`` and ``captions``; of features ``latents``
    ``[B, z, T, h, w]``, ``text`` ``[B, 512, width]``, zero beyond each text, and for image-to-video ``image`` and
    ``condition``. Both have ``seeds``, one number a sample, the same under every layout. Raises UserError for data
    that cannot be read or is not what the network takes.
    """
    data: WanData = recipe.data  # type: ignore[attr-defined]
    if data.path is None:
        raise UserError("data.path: this field is required; give a list of clips or a prepared folder")
    reader = _reader(data, config)
    return _loader(reader, recipe, rank, ranks, data.workers, {"micro_batch": recipe.micro_batch, **reader.identity})


def synthetic_data(recipe: Recipe, config: Wan21Config, rank: int, ranks: int) -> SlotLoader:
    """Return the loader of random features of the recipe's synthetic shape."""
    data: WanData = recipe.data  # type: ignore[attr-defined]
    images = {"none": 0, "first": _CLIP_TOKENS, "first-last": config.pos_embed_seq_len or 0}[config.conditioning]
    reader = RandomFeatures(
        data.synthetic,
        channels=config.out_channels,
        text_width=config.text_dim,
        image=(images, config.image_dim) if config.image_dim else None,
    )
    return _loader(reader, recipe, rank, ranks, 0, {})


def _loader(reader: Any, recipe: Recipe, rank: int, ranks: int, workers: int, identity: dict[str, Any]) -> SlotLoader:
    sizes = {"global_batch": recipe.global_batch, "micro_batch": recipe.micro_batch}
    source = BucketSource(reader.keys, reader.read, seed=recipe.seed, **sizes)
    return SlotLoader(source, reader.collate, rank=rank, ranks=ranks, workers=workers, identity=identity, **sizes)


def _reader(data: WanData, config: Wan21Config) -> Any:
    path = Path(data.path or "").expanduser()
    if not path.exists():
        raise UserError(f"data.path={data.path}: no such file or folder")
    if path.is_dir() and (path / "data.jsonl").is_file() and not (path / INDEX).is_file():
        path = path / "data.jsonl"
    features = path.is_dir() or _lists_features(path)
    if data.kind is not None and features != (data.kind == "features"):
        looks = "features" if features else "a list of clips"
        raise UserError(f"data.kind={data.kind}: {path} is {looks}; set data.kind=null or another data.path")
    if path.is_dir():
        return PreparedFeatures(path, data, config)
    if features:
        return FeatureFiles(path, data, config)
    check_frames(data, config.conditioning)
    return Videos(path, data)


def _lists_features(path: Path) -> bool:
    if path.suffix != ".jsonl":
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        return str(json.loads(first).get("file", "")).endswith(".pt")
    except (ValueError, AttributeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()[:12]


def drops_text(seed: int, share: float) -> bool:
    """Return whether the sample of a seed goes without its text; independent of what else is drawn from the seed."""
    digest = hashlib.sha256(f"{seed}/text".encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


class BadFiles:
    """The files that cannot be used: fatal, or named, counted and left out."""

    def __init__(self, on_bad: str) -> None:
        self.on_bad = on_bad
        self.reasons: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, reason: str) -> None:
        """Take note of a file; UserError if it is to stop the run."""
        if self.on_bad == "stop":
            raise UserError(f"{reason} (data.on_bad=skip leaves such files out)")
        self.reasons[reason] = None

    def found_late(self, reason: str) -> None:
        """Take note of a file that only reading showed to be bad, and say so once."""
        if reason not in self.reasons:
            self.add(reason)
            print(f"skipped ({len(self)} so far): {reason}", file=sys.stderr, flush=True)

    def report(self, total: int) -> None:
        """Say, on the first rank, which of ``total`` files are left out."""
        if not self.reasons or not launch.first_rank():
            return
        print(f"{len(self)} of {total} files are skipped:", file=sys.stderr)
        for reason in list(self.reasons)[:_SHOWN]:
            print(f"  {reason}", file=sys.stderr)
        if len(self) > _SHOWN:
            print(f"  and {len(self) - _SHOWN} more", file=sys.stderr, flush=True)


def usable(items: Sequence[Item], data: WanData, bad: BadFiles) -> list[tuple[Item, Bucket]]:
    """Return the clips of a list that fit a bucket, each with it; the others go to ``bad``."""
    found = []
    for item, bucket in zip(items, assign([i.path for i in items], data.sizes, data.frames, data.fps), strict=True):
        if isinstance(bucket, str):
            bad.add(bucket)
        else:
            found.append((item, bucket))
    return found


def read_clip(item: Item, bucket: Bucket, fps: float) -> Tensor:
    """Return a clip's frames in its bucket's shape, uint8 ``[F, 3, H, W]``: from its middle, at ``fps``."""
    return read_frames(item.path, bucket.frames, fps=fps, size=(bucket.height, bucket.width))


class Videos:
    """Reads a list of clips and their captions."""

    def __init__(self, path: Path, data: WanData) -> None:
        items = read_list(path)
        self.bad = BadFiles(data.on_bad)
        self.clips = usable(items, data, self.bad)
        self.bad.report(len(items))
        if not self.clips:
            raise UserError(f"{path}: none of its {len(items)} clips can be used")
        self.keys = [bucket for _, bucket in self.clips]
        self.fps, self.text_drop = data.fps, data.text_drop
        self.identity = {
            "data.path (content)": _digest(path),
            "data.path (clips that can be used)": len(self.clips),
            "data.fps": data.fps,
            "data.frames": list(data.frames),
            "data.height, width and ratios": [list(size) for size in data.sizes],
        }

    def read(self, index: int, seed: int) -> Sample | None:
        """Return a clip's frames and caption, or None if the file is bad."""
        item, bucket = self.clips[index]
        try:
            video = read_clip(item, bucket, self.fps)
        except UserError as error:
            self.bad.found_late(str(error))
            return None
        return {"video": video, "caption": "" if drops_text(seed, self.text_drop) else item.caption, "seed": seed}

    @staticmethod
    def collate(samples: list[Sample]) -> Batch:
        """Return a micro-batch."""
        return {
            "video": torch.stack([s["video"] for s in samples]),
            "captions": tuple(s["caption"] for s in samples),
            "seeds": tuple(s["seed"] for s in samples),
        }


def collate_features(samples: list[Sample]) -> Batch:
    """Return a micro-batch of features: texts padded with zeros, the rest stacked in fp32."""
    batch: Batch = {
        name: torch.stack([s[name].float() for s in samples])
        for name in ("latents", "image", "condition")
        if name in samples[0]
    }
    batch["text"] = pad_text([s["text"] for s in samples])
    batch["seeds"] = tuple(s["seed"] for s in samples)
    return batch


class PreparedFeatures:
    """Reads a folder made by ``prepare``."""

    collate = staticmethod(collate_features)

    def __init__(self, folder: Path, data: WanData, config: Wan21Config) -> None:
        self.set = FeatureSet(folder)
        if not self.set.finished:
            raise UserError(f"{folder}: is not finished; run the prepare command again to go on")
        if not len(self.set):
            raise UserError(f"{folder}: holds no sample")
        self.names = _taken(config)
        self.text_drop = data.text_drop
        self.empty = _empty_text(folder) if data.text_drop else None
        prepared = self.set.meta.get("conditioning", "none")
        if config.conditioning != "none" and prepared != config.conditioning:
            raise UserError(
                f"{folder}: was prepared with --conditioning {prepared}, the network takes {config.conditioning}; "
                f"prepare it with --conditioning {config.conditioning}"
            )
        self.keys = []
        for number in range(len(self.set)):
            shapes = self.set.shapes(number)
            _check_shapes(f"{folder}: {self.set.keys[number]}" if not number else f"{folder}", shapes, config)
            self.keys.append(shapes["latents"])
        self.identity = {"data.path (content)": _digest(folder / INDEX)}

    def read(self, index: int, seed: int) -> Sample:
        """Return a sample's features."""
        tensors = self.set.read(index)
        if self.empty is not None and drops_text(seed, self.text_drop):
            tensors["text"] = self.empty
        return {**{name: tensors[name] for name in self.names}, "seed": seed}


class FeatureFiles:
    """Reads a .jsonl list whose lines name the .pt files of MindSpeed-MM's feature extraction."""

    collate = staticmethod(collate_features)

    def __init__(self, path: Path, data: WanData, config: Wan21Config) -> None:
        if data.text_drop:
            raise UserError(
                f"data.text_drop={data.text_drop}: {path} has no embedding of the empty text; set data.text_drop=0, or "
                "encode the videos with the prepare command"
            )
        self.names = _taken(config)
        self.bad = BadFiles(data.on_bad)
        self.files: list[Path] = []
        self.keys: list[tuple[int, ...]] = []
        files = _listed(path)

        def shapes(file: Path) -> dict[str, tuple[int, ...]] | str:
            try:
                found = {name: tuple(tensor.shape) for name, tensor in _load(file, self.names).items()}
                _check_shapes(str(file), found, config)
            except UserError as error:
                return str(error)
            return found

        with ThreadPoolExecutor() as pool:
            for file, found in zip(files, pool.map(shapes, files), strict=True):
                if isinstance(found, str):
                    self.bad.add(found)
                else:
                    self.files.append(file)
                    self.keys.append(found["latents"])
        self.bad.report(len(files))
        if not self.files:
            raise UserError(f"{path}: none of its {len(files)} files can be used")
        self.identity = {"data.path (content)": _digest(path), "data.path (files that can be used)": len(self.files)}

    def read(self, index: int, seed: int) -> Sample | None:
        """Return a file's features, or None if it is bad."""
        try:
            return {**_load(self.files[index], self.names), "seed": seed}
        except UserError as error:
            self.bad.found_late(str(error))
            return None


class RandomFeatures:
    """Makes random features of one shape, which follow from the sample's seed alone."""

    collate = staticmethod(collate_features)
    keys = ("random",)

    def __init__(
        self, shape: tuple[int, int, int], *, channels: int, text_width: int, image: tuple[int, int] | None
    ) -> None:
        frames, *sides = shape
        latents = (channels, (frames - 1) // _STRIDE[0] + 1, *(s // n for s, n in zip(sides, _STRIDE[1:], strict=True)))
        self.shapes: dict[str, tuple[int, ...]] = {"latents": latents, "text": (512, text_width)}
        if image is not None:
            self.shapes |= {"image": image, "condition": latents}

    def read(self, index: int, seed: int) -> Sample:
        """Return a sample."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}
        return {**tensors, "seed": seed}


def _taken(config: Wan21Config) -> tuple[str, ...]:
    return ("latents", "text") if config.conditioning == "none" else ("latents", "text", "image", "condition")


def _check_shapes(where: str, shapes: dict[str, tuple[int, ...]], config: Wan21Config) -> None:
    """Raise UserError unless a sample's features are as wide as what the network takes."""
    wanted = {"latents": (0, config.out_channels, "channels"), "text": (-1, config.text_dim, "columns")}
    if config.image_dim:
        wanted |= {"image": (-1, config.image_dim, "columns"), "condition": (0, config.out_channels, "channels")}
    for name, (dim, size, what) in wanted.items():
        if name not in shapes:
            raise UserError(f"{where}: has no {name!r}, which the network takes; encode the videos for it")
        if not shapes[name] or shapes[name][dim] != size:
            raise UserError(
                f"{where}: {name!r} is {list(shapes[name])}, the network takes {size} {what}; "
                "encode the videos with the encoders that go with it"
            )
    if "condition" in wanted and shapes["condition"] != shapes["latents"]:
        raise UserError(f"{where}: 'condition' is {list(shapes['condition'])}, 'latents' {list(shapes['latents'])}")


def _empty_text(folder: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / EMPTY_TEXT)["text"]
    except (OSError, SafetensorError, KeyError):
        raise UserError(f"{folder / EMPTY_TEXT}: missing or damaged; run the prepare command again") from None


def _listed(path: Path) -> list[Path]:
    files = []
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if text.strip():
            try:
                files.append(path.parent / json.loads(text)["file"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{line}: not a JSON object with the key 'file'") from None
    return files


def _load(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the features of a MindSpeed-MM file under our names; nothing but tensors is unpickled."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        text, mask = (_only(held[name]) for name in ("prompt_ids", "prompt_mask"))
        found = {"latents": _sample(held["video"], 4), "text": _sample(text, 2)[: int(mask.sum())]}
        if "image" in names:
            found["image"] = _sample(held["i2v_clip_feature"], 2)
            # Its first channels are the mask of the given frames, which follows from the shape.
            found["condition"] = _sample(held["i2v_vae_feature"], 4)[-len(found["latents"]) :]
        return found
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except KeyError as error:
        raise UserError(f"{path}: holds no {error.args[0]!r}") from None
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError ...
        raise UserError(f"{path}: not a readable file of features: {' '.join(str(error).split())[:120]}") from None


def _only(value: Any) -> Tensor:
    """Return a tensor, or that of a list of one: MindSpeed-MM writes a list where there may be several encoders."""
    return value[0] if isinstance(value, (list, tuple)) else value


def _sample(tensor: Tensor, dims: int) -> Tensor:
    """Return a tensor without the batch dim of 1 that it may have."""
    return tensor[0] if tensor.dim() == dims + 1 else tensor
