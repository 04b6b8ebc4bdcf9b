"""The encoders give what diffusers' own pipelines compute with the same weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from mindspeed_model_core.errors import UserError
from mindspeed_model_wan21.encoders import Encoders, clean, fingerprint
from mindspeed_model_wan21.tiny import IMAGE_TOKENS, IMAGE_WIDTH, TEXT_WIDTH, train_tiny_vae, write_tiny_encoders
from torch import Tensor

FRAMES, HEIGHT, WIDTH = 5, 32, 48
PROMPTS = ["A cat  &amp;amp; a dog,\n\tâ€œrunningâ€\x9d", "", "word " * 200]


def pan(frames: int = FRAMES, top: int = 60) -> Tensor:
    """A window moving over a photo, uint8 ``[F, 3, H, W]``."""
    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)
    return torch.stack([photo[:, top : top + HEIGHT, 180 + 2 * i : 180 + 2 * i + WIDTH] for i in range(frames)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def encoders(folder: Path) -> Encoders:
    return Encoders(folder, text_dtype=torch.float32)


@pytest.fixture(scope="module")
def pipeline(encoders: Encoders) -> Any:
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return WanImageToVideoPipeline(
        tokenizer=encoders.tokenizer,
        text_encoder=encoders.text_encoder,
        image_encoder=encoders.image_encoder,
        image_processor=CLIPImageProcessorPil.from_pretrained(encoders.folder / "image_processor"),
        transformer=None,
        vae=encoders.vae,
        scheduler=UniPCMultistepScheduler(),
    )


def test_text_is_the_pipelines(encoders: Encoders, pipeline: Any) -> None:
    want = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=512)
    got = encoders.text(PROMPTS)
    assert got.shape == (3, 512, TEXT_WIDTH) and torch.equal(got, want)
    rows = encoders.text_rows(PROMPTS)
    assert [len(row) for row in rows][1:] == [1, 512] and not got[0, len(rows[0]) :].any()
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert [clean(p) for p in PROMPTS] == [prompt_clean(p) for p in PROMPTS]
    assert clean(PROMPTS[0]) == 'A cat & a dog, "running"'


def test_an_embedding_does_not_depend_on_its_neighbours(encoders: Encoders) -> None:
    together = encoders.text_rows(PROMPTS)
    for prompt, want in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(encoders.text_rows([prompt])[0], want)


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (100, 37)])
def test_images_are_the_pipelines(encoders: Encoders, pipeline: Any, size: tuple[int, int]) -> None:
    from PIL import Image

    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[:, : size[0], 200 : 200 + size[1]]
    want = pipeline.encode_image(Image.fromarray(photo.permute(1, 2, 0).contiguous().numpy()))
    got = encoders.image(photo[None])
    assert got.shape == (1, IMAGE_TOKENS, IMAGE_WIDTH)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_the_condition_is_the_pipelines(encoders: Encoders, pipeline: Any, last: bool) -> None:
    clip = pan()
    ends = [pipeline.video_processor.preprocess(f[None].float() / 255) for f in (clip[0], clip[-1])]
    _, want = pipeline.prepare_latents(
        ends[0],
        1,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        dtype=torch.float32,
        device=torch.device("cpu"),
        last_image=ends[1] if last else None,
    )
    got = encoders.condition(clip[None, 0], clip[None, -1] if last else None, FRAMES)
    assert got.shape == (1, 16, 2, HEIGHT // 8, WIDTH // 8)
    torch.testing.assert_close(got, want[:, 4:], rtol=1e-5, atol=1e-5)


def test_latents_are_the_normalised_mode(encoders: Encoders) -> None:
    clips = torch.stack([pan(), pan(top=90)])
    got = encoders.video(clips)
    vae = encoders.vae
    for clip, latents in zip(clips, got, strict=True):
        want = vae.encode((clip.float() / 255 * 2 - 1).transpose(0, 1)[None]).latent_dist.mode()[0]
        for channel, (mean, std) in enumerate(zip(vae.config.latents_mean, vae.config.latents_std, strict=True)):
            torch.testing.assert_close(latents[channel], (want[channel] - mean) / std, rtol=1e-4, atol=1e-4)
    assert got.dtype == torch.float32 and not got.requires_grad
    assert (got[0] - got[1]).abs().max() > 0.01, "the clips are told apart"


@pytest.mark.parametrize("conditioning", ["none", "first", "first-last"])
def test_a_raw_batch_becomes_one_of_features(encoders: Encoders, conditioning: str) -> None:
    video = torch.stack([pan(), pan(top=90)])
    got = encoders.batch({"video": video, "captions": ("a", "b c"), "seeds": (4, 5)}, conditioning)
    assert got["seeds"] == (4, 5) and torch.equal(got["latents"], encoders.video(video))
    assert torch.equal(got["text"], encoders.text(["a", "b c"]))
    if conditioning == "none":
        assert set(got) == {"latents", "text", "seeds"}
        return
    ends = [video[:, 0]] + [video[:, -1]] * (conditioning == "first-last")
    assert torch.equal(got["image"], torch.cat([encoders.image(each) for each in ends], 1))
    assert torch.equal(got["condition"], encoders.condition(ends[0], ends[1] if len(ends) > 1 else None, FRAMES))


def test_the_encoders_are_frozen_in_their_types_and_always_the_same(folder: Path, tmp_path: Path, capfd: Any) -> None:
    ours = Encoders(folder)
    assert ours.text([""]).dtype == torch.bfloat16 and ours.image(pan()[:1]).dtype == torch.float32
    for model in (ours.vae, ours.text_encoder, ours.image_encoder):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    again = write_tiny_encoders(tmp_path)
    assert capfd.readouterr().err == ""
    assert fingerprint(again) == fingerprint(folder)
    config = again / "vae" / "config.json"
    config.write_text(config.read_text().replace("2.8184", "2.8185"))
    assert fingerprint(again) != fingerprint(folder)


def test_a_trained_tiny_vae_shows_the_clip(folder: Path, tmp_path: Path) -> None:
    write_tiny_encoders(tmp_path, image=False)
    clip = pan()
    psnr = train_tiny_vae(tmp_path, [clip], steps=30)
    ours = Encoders(tmp_path)
    latents = ours.video(clip[None])
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.01
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(16), rtol=0.02, atol=0.02)
    shown = ours.decode(latents)
    error = (shown[0].float() - clip.float()).square().mean()
    assert shown.shape == (1, FRAMES, 3, HEIGHT, WIDTH)
    assert psnr > 15 and abs(10 * math.log10(255**2 / float(error)) - psnr) < 0.5


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoders=.*: no vae/ there; a folder in diffusers' layout holds vae/"):
        Encoders(tmp_path)
    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
    ours = Encoders(tmp_path)
    with pytest.raises(UserError, match=r"no image_encoder/ there; .* image_encoder/"):
        ours.image(pan()[:1])
    for use in (lambda: ours.video(pan()[None]), lambda: ours.text([""])):
        with pytest.raises(UserError, match="^[^\n]*$"):
            use()
