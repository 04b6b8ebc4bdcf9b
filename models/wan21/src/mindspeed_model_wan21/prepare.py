"""Encode videos, captions and given frames once, into a folder that training reads: ``mindspeed-wan21 prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from mindspeed_model_core.data.media import Item, read_list
from mindspeed_model_core.data.prepare import (
    Destination,
    NProc,
    OnBad,
    Ratios,
    ShardSize,
    from_options,
    in_processes,
    open_encoders,
)
from mindspeed_model_core.data.prepare import prepare as prepare_items
from mindspeed_model_core.errors import UserError, nearest
from torch import Tensor

from .data import WanData
from .encoders import IMAGE, Encoders, fingerprint

_CONDITIONING = ("none", "first", "first-last")


def prepare(
    source: Path,
    destination: Path,
    encoders: Path,
    data: WanData,
    conditioning: str = "none",
    *,
    shard_bytes: int = 512 * 2**20,
) -> str:
    """Encode what a list of clips names and ``destination`` does not hold yet; return a line that says what was done.

    Every process of a job calls this. A sample is ``latents`` ``[z, T, h, w]`` in fp32, ``text`` ``[tokens, width]``
    and, with ``conditioning``, ``image`` and ``condition``. Raises UserError as core's ``prepare`` does, and for a
    length of 1 or encoders that do not go with ``conditioning``.
    """
    items, encoders = read_list(source), encoders.expanduser()
    if conditioning != "none" and 1 in data.frames:
        raise UserError(
            f"--conditioning {conditioning} with --frames 1: of an image whose frame is given nothing is left to "
            "predict; leave --frames 1 out, or prepare the images into a folder of their own with --conditioning none"
        )
    if conditioning != "none" and not (encoders / IMAGE).is_dir():
        raise UserError(f"--encoders={encoders}: no {IMAGE}/ there, which --conditioning {conditioning} needs")
    opened = open_encoders(Encoders, encoders)

    def encode(item: Item, frames: Tensor) -> dict[str, Tensor]:
        video = frames[None]
        sample = {"latents": opened.video(video), **opened.given(video, conditioning)}
        text = opened.text_rows([item.caption])[0]
        return {**{name: tensor[0] for name, tensor in sample.items()}, "text": text}

    return prepare_items(
        items,
        destination,
        data,
        encode,
        empty_text=lambda: {"text": opened.text_rows([""])[0]},
        settings={"encoders": fingerprint(encoders), "conditioning": conditioning},
        shard_bytes=shard_bytes,
    )


def prepare_command(
    source: Annotated[
        Path, typer.Argument(metavar="LIST", help="A .jsonl or .csv file: path and caption of a clip on each line.")
    ],
    destination: Destination,
    encoders: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder with vae/, text_encoder/, tokenizer/ and image_encoder/.")
    ],
    height: Annotated[int, typer.Option(metavar="N", help="Pixels.")] = 480,
    width: Annotated[int, typer.Option(metavar="N", help="Pixels.")] = 832,
    frames: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="A length, 4n + 1; several times: the longest filled.  \\[default: 81]"),
    ] = None,
    fps: Annotated[float, typer.Option(metavar="F", help="Frames per second clips are sampled at.")] = 16.0,
    ratio: Ratios = None,
    conditioning: Annotated[
        str,
        typer.Option(metavar="[none|first|first-last]", help="Frames given to the network, for image-to-video."),
    ] = "none",
    on_bad: OnBad = "stop",
    shard_size: ShardSize = 512,
    nproc: NProc = None,
) -> None:
    """Encode a list of clips once, so that training reads features and no encoder runs in it.

    Stopped by Ctrl-C, SIGTERM or a bad file, the same command goes on where it was: what is done is kept, nothing is
    done twice. Killed, it loses what the last five minutes made. Lines may be added to the list and the command run
    again.

    $ mindspeed-wan21 prepare clips.jsonl features --encoders Wan2.1-T2V-1.3B-Diffusers --nproc auto

    $ mindspeed-wan21 train NAME data.path=features
    """
    if conditioning not in _CONDITIONING:
        raise UserError(f"--conditioning={conditioning}: no such choice{nearest(conditioning, _CONDITIONING)}")
    given = {"height": height, "width": width, "fps": fps, "on_bad": on_bad}
    data = from_options(WanData, {**given, "frames": tuple(frames or (81,)), "ratios": tuple(ratio or ())})
    in_processes(
        nproc, lambda: prepare(source, destination, encoders, data, conditioning, shard_bytes=shard_size * 10**6)
    )
