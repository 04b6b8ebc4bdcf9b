"""Encode images, captions and references once, into a folder that training reads: ``mindspeed-flux prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from mindspeed_model_core.data.media import Item, read_items
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
from torch import Tensor

from .data import FluxData
from .encoders import Encoders, fingerprint


def prepare(
    source: Path,
    destination: Path,
    encoders: Path,
    data: FluxData,
    *,
    pairs: bool = False,
    shard_bytes: int = 512 * 2**20,
) -> str:
    """Encode the images of a list or a folder that ``destination`` does not hold yet; return what was done.

    Every process of a job calls this. A sample is ``latents`` ``[channels, h, w]`` in fp32, ``text`` ``[tokens,
    width]`` and ``pooled`` ``[width]``, with ``pairs`` also ``reference`` as ``latents`` are. Raises UserError as
    core's ``prepare`` does.
    """
    items = read_items(source, prompt=data.prompt, references=pairs)
    opened = open_encoders(Encoders, encoders)

    def encode(item: Item, frames: Tensor) -> dict[str, Tensor]:
        latents = opened.images(frames)
        text = {name: tensor[0] for name, tensor in opened.text([item.caption], data.text_tokens).items()}
        return {"latents": latents[0], **text, **({"reference": latents[1]} if pairs else {})}

    return prepare_items(
        items,
        destination,
        data,
        encode,
        empty_text=lambda: {name: tensor[0] for name, tensor in opened.text([""], data.text_tokens).items()},
        settings={"encoders": fingerprint(encoders), "pairs": pairs},
        shard_bytes=shard_bytes,
    )


def prepare_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A .jsonl or .csv file, path and caption of an image on each line; or a folder of images.",
        ),
    ],
    destination: Destination,
    encoders: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The folder with vae/, text_encoder/, text_encoder_2/ and their tokenizers."),
    ],
    height: Annotated[int, typer.Option(metavar="N", help="Pixels.")] = 1024,
    width: Annotated[int, typer.Option(metavar="N", help="Pixels.")] = 1024,
    ratio: Ratios = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The caption of images in a folder that have no .txt beside them."),
    ] = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Each line has a reference, from which the image is made, for Kontext.")
    ] = False,
    text_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of T5 that captions are brought to.")] = 512,
    on_bad: OnBad = "stop",
    shard_size: ShardSize = 512,
    nproc: NProc = None,
) -> None:
    """Encode images and captions once, so that training reads features and no encoder runs in it.

    Stopped by Ctrl-C, SIGTERM or a bad file, the same command goes on where it was: what is done is kept, nothing is
    done twice. Lines may be added at the list's end, images anywhere in the folder, and the command run again.

    $ mindspeed-flux prepare photos features --prompt "a photo of sks dog" --encoders FLUX.1-dev

    $ mindspeed-flux prepare pairs.jsonl features --pairs --encoders FLUX.1-Kontext-dev --nproc auto

    $ mindspeed-flux train NAME data.path=features
    """
    given = {"height": height, "width": width, "text_tokens": text_tokens, "on_bad": on_bad, "prompt": prompt}
    data = from_options(FluxData, {**given, "ratios": tuple(ratio or ())})
    in_processes(
        nproc, lambda: prepare(source, destination, encoders, data, pairs=pairs, shard_bytes=shard_size * 10**6)
    )
