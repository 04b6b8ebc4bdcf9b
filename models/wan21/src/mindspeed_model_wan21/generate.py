"""Sampling videos: diffusers' pipelines and schedulers around our network, on one device or several."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from mindspeed_model_core import launch, weights
from mindspeed_model_core.data.media import read_frames, write_video
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.files import check_fixed
from mindspeed_model_core.frozen import quiet
from mindspeed_model_core.sampling import (
    Cp,
    Denoiser,
    DType,
    Ema,
    Guidance,
    Overwrite,
    Seed,
    Source,
    Steps,
    Tp,
    check_options,
    check_range,
    find_encoders,
    find_scheduler,
    load_network,
    open_devices,
    pick_dtype,
)
from torch import Tensor

from .config import Wan21Config
from .encoders import NEEDED, Encoders
from .model import Wan21
from .weights import ORIGINAL

NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
"""The negative prompt that Wan2.1 was released with."""


class Transformer(Denoiser):
    """A Wan21 network as diffusers' Wan pipelines call theirs."""

    def __init__(self, net: Wan21) -> None:
        c = net.config
        super().__init__(net, patch_size=c.patch_size, in_channels=c.in_channels, image_dim=c.image_dim)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        """Return the predicted velocity of latents ``[batch, channels, frames, height, width]``."""
        batch = {"x": hidden_states, "time": timestep, "text": encoder_hidden_states}
        if encoder_hidden_states_image is not None:
            batch["image"] = encoder_hidden_states_image.reshape(len(hidden_states), -1, self.config.image_dim or 1)
        return (self.net(batch),)  # type: ignore[return-value]


@dataclass(frozen=True)
class Sampling:
    """What to sample: ``height`` and ``width`` in pixels, ``frames`` 4n + 1; ``image`` and ``last_image`` are files.

    ``shift`` of the noise levels, None: the network's. UserError for a size that cannot be.
    """

    prompt: str
    negative: str = NEGATIVE
    image: Path | None = None
    last_image: Path | None = None
    height: int = 480
    width: int = 832
    frames: int = 81
    steps: int = 50
    guidance: float = 5.0
    shift: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, side in (("--height", self.height), ("--width", self.width)):
            if side < 16 or side % 16:
                raise UserError(f"{name}={side}: must be a multiple of 16; try {max(1, round(side / 16)) * 16}")
        if self.frames < 1 or self.frames % 4 != 1:
            near = max(0, round((self.frames - 1) / 4)) * 4 + 1
            raise UserError(f"--frames={self.frames}: must be 4n + 1; try {near}")


_SHIFTS = {"UniPCMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}
"""How a scheduler's settings call the shift, by its class."""
_FLOW = {
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting"), False),
    "shift_terminal": None,
}


def find_shift(source: Path) -> float | None:
    """Return the shift of the noise levels that the scheduler beside the weights has, or None: there is none.

    UserError for one that is not of flow matching, or changes the levels in another way too.
    """
    path, said = find_scheduler(source) or (None, {})
    if path is None:
        return None
    kind = said.get("_class_name", "UniPCMultistepScheduler")
    if kind not in _SHIFTS:
        raise UserError(f"{path}: _class_name={kind!r}: known are {' and '.join(_SHIFTS)}; or give --shift")
    check_fixed(said, _FLOW, path, "Wan2.1")
    name = _SHIFTS[kind]
    shift = said.get(name)
    if shift is not None and (not isinstance(shift, int | float) or not 0 < shift < math.inf):
        raise UserError(f"{path}: {name}={shift!r}: expected a number above 0; or give --shift")
    return shift


def sample(net: Wan21, encoders: Encoders, what: Sampling) -> Tensor:
    """Return uint8 frames ``[frames, 3, height, width]``, by diffusers' pipeline with its UniPC scheduler."""
    from diffusers import UniPCMultistepScheduler

    given = _given(net.config, what)
    shift = net.config.shift if what.shift is None else what.shift
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )
    pipeline = _pipeline_class(bool(given))(
        tokenizer=encoders.tokenizer,
        text_encoder=encoders.text_encoder,
        vae=encoders.vae,
        scheduler=scheduler,
        transformer=Transformer(net),
        **({"image_encoder": encoders.image_encoder, "image_processor": encoders.image_processor} if given else {}),
    )
    pipeline.set_progress_bar_config(disable=not launch.first_rank(), desc="sampling")
    # Drawn on the host, so that a seed means the same video on every device and under every layout.
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(what.seed), "output_type": "pt"}
    if given:
        from PIL import Image

        pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in given]
        options |= dict(zip(("image", "last_image"), pictures, strict=False))
    video = pipeline(
        prompt=what.prompt,
        negative_prompt=what.negative,
        height=what.height,
        width=what.width,
        num_frames=what.frames,
        num_inference_steps=what.steps,
        guidance_scale=what.guidance,
        **options,
    ).frames[0]
    return (video.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _pipeline_class(image: bool) -> Any:
    import diffusers

    if not image:
        return diffusers.WanPipeline
    with quiet():  # of CLIP's own processor, which needs torchvision and is not used
        return diffusers.WanImageToVideoPipeline


def _given(config: Wan21Config, what: Sampling) -> list[Tensor]:
    """Return the given frames, uint8 ``[3, height, width]``; UserError unless they are those the network takes."""
    files = {"--image": what.image, "--last-image": what.last_image}
    wanted = {"none": (), "first": ("--image",), "first-last": ("--image", "--last-image")}[config.conditioning]
    for name, file in files.items():
        if name in wanted and file is None:
            raise UserError(f"{name}: this network makes a video from {' and '.join(wanted)}; give it")
        if name not in wanted and file is not None:
            takes = " and ".join(wanted) or "a prompt alone"
            raise UserError(f"{name}={file}: this network takes {takes}; leave it out")
    size = (what.height, what.width)
    return [read_frames(file, 1, fps=1.0, size=size)[0] for name in wanted if (file := files[name]) is not None]


def _find_encoders(source: Path, given: Path | None) -> Path:
    try:
        return find_encoders(source, given, NEEDED)
    except UserError:
        if given is not None or not ORIGINAL.detect(source):
            raise
        raise UserError(
            f"{source}: the VAE and text encoder of an original release are not read; sample from what "
            f"'convert {source} DST --layout hub' writes, or name others with --encoders"
        ) from None


def generate_command(
    source: Source,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the video shows.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .mp4 to write.")] = Path("video.mp4"),
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help=r"What it does not.  \[default: that of the release]")
    ] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="The first frame, for image-to-video.")] = None,
    last_image: Annotated[Path | None, typer.Option(metavar="FILE", help="The last frame as well.")] = None,
    encoders: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help=r"The folder of VAE and text encoder.  \[default: SRC, or its recipe's]"),
    ] = None,
    height: Annotated[int, typer.Option(metavar="N", help="Pixels, a multiple of 16.")] = 480,
    width: Annotated[int, typer.Option(metavar="N", help="Pixels, a multiple of 16.")] = 832,
    frames: Annotated[int, typer.Option(metavar="N", help="4n + 1.")] = 81,
    fps: Annotated[float, typer.Option(metavar="F", help="Frames per second of the file, 1 to 240.")] = 16.0,
    steps: Steps = 50,
    guidance: Guidance = 5.0,
    shift: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help=r"Shift of the noise levels.  \[default: that of the scheduler with SRC; else 5 for text-to-video, "
            "3 with a first frame (the release has 5 in 720p), 16 with a last one too]",
        ),
    ] = None,
    seed: Seed = 0,
    dtype: DType = None,
    tp: Tp = 1,
    cp: Cp = 1,
    ema: Ema = False,
    overwrite: Overwrite = False,
) -> None:
    """Sample a video from a prompt and, for image-to-video, the frames it begins and ends with.

    $ mindspeed-wan21 generate Wan2.1-T2V-1.3B-Diffusers --prompt "a cat on a wall" --out cat.mp4

    $ mindspeed-wan21 generate runs/first --prompt "a cat on a wall" --image cat.png --cp 2
    """
    from . import MODEL

    check_options(out, (".mp4",), overwrite, dtype)
    check_range("--fps", fps, 1, 240)
    check_range("--guidance", guidance, 1, 100)
    if shift is not None and not 0 < shift < math.inf:
        raise UserError(f"--shift={shift:g}: must be above 0; 1 leaves the noise levels as they are")
    where = _find_encoders(weights.check_folder(source), encoders)
    what = Sampling(
        prompt,
        NEGATIVE if negative_prompt is None else negative_prompt,
        image,
        last_image,
        height,
        width,
        frames,
        steps,
        guidance,
        find_shift(source) if shift is None else shift,
        seed,
    )
    # Before devices are taken and weights read: a mistake in what is given costs nothing.
    _given(weights.read_config(source, MODEL, ema=ema), what)
    with open_devices(tp, cp) as mesh:
        kind = pick_dtype(dtype, mesh.device)
        net = load_network(source, MODEL, mesh, kind, ema=ema)
        video = sample(net, Encoders(where, mesh.device, text_dtype=kind), what)
        if mesh.rank == 0:
            write_video(out, video, fps)
            typer.echo(f"{out}: {len(video)} frames of {width}x{height} at {fps:g} per second")
