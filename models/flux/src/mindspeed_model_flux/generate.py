"""Sampling images: diffusers' pipelines and scheduler around our network, on one device or several."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from mindspeed_model_core import launch, weights
from mindspeed_model_core.data.buckets import probe_fit
from mindspeed_model_core.data.media import is_image, probe, read_frames, write_image
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.frozen import quiet
from mindspeed_model_core.sampling import (
    Cp,
    Denoiser,
    DType,
    Ema,
    Overwrite,
    Seed,
    Source,
    Tp,
    check_options,
    check_range,
    find_encoders,
    find_scheduler,
    load_network,
    open_devices,
    pick_dtype,
    recipe_of,
)
from torch import Tensor

from .config import PATCH, FluxConfig
from .data import VAE
from .encoders import NEEDED, Encoders
from .model import TIMES, Flux, pack, unpack
from .weights import is_bare
from .weights import scheduler as settings

_STRIDE = VAE * PATCH
_CLASS = "FlowMatchEulerDiscreteScheduler"


class Transformer(Denoiser):
    """A Flux network as diffusers' FLUX pipelines call theirs."""

    def __init__(self, net: Flux) -> None:
        super().__init__(net, in_channels=net.config.in_channels, guidance_embeds=net.config.guidance_embeds)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        img_ids: Tensor,
        guidance: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        """Return the predicted velocity ``[batch, tokens, in_channels]`` of the image's tokens, not the reference's."""
        batch = {"time": TIMES * timestep.float(), "text": encoder_hidden_states, "pooled": pooled_projections}
        if guidance is not None:
            batch["guidance"] = guidance
        tokens = hidden_states.transpose(0, 1)
        for number, name in enumerate(("x", "reference")):
            cells = img_ids[img_ids[:, 0] == number]
            if len(cells):
                rows, columns = (int(side) + 1 for side in cells[:, 1:].amax(0))
                batch[name] = unpack(tokens, (PATCH * rows, PATCH * columns))
                tokens = tokens[rows * columns :]
        return (pack(self.net(batch)).transpose(0, 1),)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sampling:
    """What to sample: ``height`` and ``width`` in pixels; ``image`` is the file of Kontext's reference.

    Without a size it is 1024 x 1024, for Kontext the size it was trained at that is nearest the reference's aspect.
    None stands for what the releases are sampled with: 28 ``steps``, for schnell 4; ``guidance`` 3.5, for Kontext 2.5
    and for schnell none; 512 ``text_tokens``, for schnell 256. UserError for a size that cannot be.
    """

    prompt: str
    image: Path | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    text_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, side in (("--height", self.height), ("--width", self.width)):
            if side is not None and (side < _STRIDE or side % _STRIDE):
                near = max(1, round(side / _STRIDE)) * _STRIDE
                raise UserError(f"{name}={side}: must be a multiple of {_STRIDE}; try {near}")
        if (self.height is None) != (self.width is None):
            given, missing = ("--height", "--width") if self.width is None else ("--width", "--height")
            raise UserError(f"{missing}: {given} is given, so this is required too")

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        if self.image is None:
            return 1024, 1024
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        given = probe(self.image)
        aspect = given.width / given.height
        width, height = min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda size: abs(aspect - size[0] / size[1]))
        return height, width


def make_scheduler(source: Path, config: FluxConfig) -> Any:
    """Return the scheduler that goes with weights, or the release's where there is none; UserError for another kind."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    path, said = find_scheduler(source) or (None, settings(config))
    if said.get("_class_name", _CLASS) != _CLASS:
        raise UserError(f"{path}: _class_name={said['_class_name']!r} is not supported, FLUX.1 has {_CLASS}")
    return FlowMatchEulerDiscreteScheduler.from_config(dict(said))


def sample(net: Flux, encoders: Encoders, what: Sampling, scheduler: Any) -> Tensor:
    """Return a uint8 image ``[3, height, width]``, by diffusers' pipeline."""
    given, what = _given(net.config, what), settle(net.config, what)
    with quiet():  # of CLIP's own processor, which needs torchvision and is not used
        import diffusers

        kind = diffusers.FluxPipeline if given is None else diffusers.FluxKontextPipeline
    parts = {name: getattr(encoders, name) for name in NEEDED}
    pipeline = kind(**parts, scheduler=scheduler, transformer=Transformer(net))
    pipeline.set_progress_bar_config(disable=not launch.first_rank(), desc="sampling")
    height, width = what.size
    # Latents in place of an image stay as they are: it has been brought to its size, as in training.
    options = {} if given is None else {"image": encoders.images(given[None]), "max_area": height * width}
    latents = pipeline(
        prompt=what.prompt,
        height=height,
        width=width,
        num_inference_steps=what.steps,
        guidance_scale=what.guidance,
        max_sequence_length=what.text_tokens,
        # Drawn on the host, so that a seed means the same image on every device and under every layout.
        generator=torch.Generator().manual_seed(what.seed),
        output_type="latent",
        **options,
    ).images
    return encoders.decode(unpack(latents.transpose(0, 1), (height // VAE, width // VAE)))[0].cpu()


def settle(config: FluxConfig, what: Sampling) -> Sampling:
    """Return what to sample with the releases' own values in place of None."""
    schnell = not config.guidance_embeds
    return replace(
        what,
        steps=what.steps or (4 if schnell else 28),
        guidance=what.guidance if what.guidance is not None else 3.5 if what.image is None else 2.5,
        text_tokens=what.text_tokens or (256 if schnell else 512),
    )


def _given(config: FluxConfig, what: Sampling) -> Tensor | None:
    """Return the reference, uint8 ``[3, height, width]``, if the network takes one; UserError for what it does not."""
    if what.guidance is not None and not config.guidance_embeds:
        raise UserError(f"--guidance={what.guidance:g}: this network (schnell) is told none; leave it out")
    if config.kontext and what.image is None:
        raise UserError("--image: this network makes an image from another; give it")
    if what.image is None:
        return None
    if not config.kontext:
        raise UserError(f"--image={what.image}: this network takes a prompt alone; leave it out")
    if not is_image(what.image):
        raise UserError(f"--image={what.image}: is no image; known are .png, .jpg, .webp and others")
    probe_fit(what.image)
    return read_frames(what.image, 1, fps=1.0, size=what.size)[0]


def generate_command(
    source: Source,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the image shows, or what is to change in it.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .png or .jpg to write.")] = Path("image.png"),
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Kontext's reference; with it, a transformer alone is Kontext's."),
    ] = None,
    encoders: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help=r"The folder of VAE and text encoders.  \[default: SRC, or its recipe's]"),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(metavar="N", help=r"Pixels, a multiple of 16.  \[default: 1024, for Kontext by the reference]"),
    ] = None,
    width: Annotated[int | None, typer.Option(metavar="N", help="Pixels, a multiple of 16.")] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=r"Steps of the solver.  \[default: 28, for schnell 4]")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="G",
            help=r"The strength that the network is told.  \[default: 3.5, for Kontext 2.5; schnell takes none]",
        ),
    ] = None,
    text_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=512, help=r"Tokens of T5.  \[default: a run's own; else 512, for schnell 256]"
        ),
    ] = None,
    seed: Seed = 0,
    dtype: DType = None,
    tp: Tp = 1,
    cp: Cp = 1,
    ema: Ema = False,
    overwrite: Overwrite = False,
) -> None:
    """Sample an image from a prompt and, for Kontext, the image it is to be made from.

    $ mindspeed-flux generate FLUX.1-dev --prompt "a cat on a wall" --out cat.png

    $ mindspeed-flux generate FLUX.1-Kontext-dev --prompt "make it night" --image cat.png --cp 2
    """
    from . import MODEL

    check_options(out, (".png", ".jpg"), overwrite, dtype)
    if guidance is not None:
        check_range("--guidance", guidance, 0, 100)
    where = find_encoders(weights.check_folder(source), encoders, NEEDED)
    recipe = recipe_of(source)
    if text_tokens is None and recipe is not None:
        text_tokens = recipe["data"].get("text_tokens")
    what = Sampling(prompt, image, height, width, steps, guidance, text_tokens, seed)
    # Before devices are taken and weights read: a mistake in what is given costs nothing.
    config = weights.read_config(source, MODEL, ema=ema)
    if image is not None and config.guidance_embeds and is_bare(source):
        config = config.model_copy(update={"kontext": True})  # the tensors are the same
    _given(config, what)
    scheduler = make_scheduler(source, config)
    with open_devices(tp, cp) as mesh:
        kind = pick_dtype(dtype, mesh.device)
        net = load_network(source, MODEL, mesh, kind, ema=ema)
        net.config = config
        made = sample(net, Encoders(where, mesh.device, text_dtype=kind), what, scheduler)
        if mesh.rank == 0:
            write_image(out, made)
            typer.echo(f"{out}: {made.shape[2]}x{made.shape[1]}")
