"""The encoders give what diffusers' own pipelines compute with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing.clips import pan
from mindspeed_model_flux.encoders import NEEDED, Encoders, fingerprint
from mindspeed_model_flux.tiny import LATENTS, POOLED_WIDTH, TEXT_WIDTH, write_tiny_encoders

PROMPTS = ["A cat & a dog", "", "word " * 100]
TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def encoders(folder: Path) -> Encoders:
    return Encoders(folder, text_dtype=torch.float32)


@pytest.fixture(scope="module")
def pipeline(encoders: Encoders) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

    parts = {name: getattr(encoders, name) for name in NEEDED}
    return FluxKontextPipeline(**parts, transformer=None, scheduler=FlowMatchEulerDiscreteScheduler())


def test_text_is_the_pipelines(encoders: Encoders, pipeline: Any) -> None:
    want, pooled, _ = pipeline.encode_prompt(PROMPTS, None, device=torch.device("cpu"), max_sequence_length=TOKENS)
    got = encoders.text(PROMPTS, TOKENS)
    assert got["text"].shape == (3, TOKENS, TEXT_WIDTH) and torch.equal(got["text"], want)
    assert got["pooled"].shape == (3, POOLED_WIDTH) and torch.equal(got["pooled"], pooled)
    assert len({tuple(row.tolist()) for row in pooled}) == 3, "prompts are told apart"
    assert (got["text"][0] - got["text"][1]).abs().max() > 0.01


def test_latents_are_the_pipelines_and_decode_to_images(encoders: Encoders, pipeline: Any) -> None:
    photos = torch.cat((pan("astronaut", 1, 32, 48), pan("coffee", 1, 32, 48)))
    want = pipeline._encode_vae_image(pipeline.image_processor.preprocess(photos.float() / 255), None)
    got = encoders.images(photos)
    assert got.shape == (2, LATENTS, 4, 6) and got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got[0] - got[1]).abs().max() > 0.01, "photos are told apart"
    config = encoders.vae.config
    decoded = encoders.vae.decode(got / config.scaling_factor + config.shift_factor).sample
    shown = pipeline.image_processor.postprocess(decoded.detach(), output_type="pt")
    assert (encoders.decode(got).float() - 255 * shown).abs().max() <= 0.5 + 1e-3


def test_what_the_host_has_is_sent_behind_what_is_queued(encoders: Encoders, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain copy would wait for all that the device has to do."""
    sent, send = [], devices.send

    def note(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(tuple(tensor.shape))
        return send(tensor, device)

    monkeypatch.setattr(devices, "send", note)
    encoders.text(PROMPTS, TOKENS)
    assert sent == [(3, TOKENS), (3, 77)]
    latents = encoders.images(pan("astronaut", 1, 32, 48))
    encoders.decode(latents)
    assert sent[2:] == [(1, 3, 32, 48), (1, LATENTS, 4, 6)]


@pytest.mark.parametrize("pairs", [False, True])
def test_a_raw_batch_becomes_one_of_features(encoders: Encoders, pairs: bool) -> None:
    video = torch.stack([pan("astronaut", 1, 32, 48), pan("coffee", 1, 32, 48)])
    raw: dict[str, Any] = {"video": video, "captions": ("a", "b c"), "seeds": (4, 5)}
    if pairs:
        raw["reference"] = video.flip(0)
    got = encoders.batch(raw, TOKENS)
    assert set(got) == {"latents", "text", "pooled", "seeds"} | ({"reference"} if pairs else set())
    assert got["seeds"] == (4, 5) and torch.equal(got["latents"], encoders.images(video[:, 0]))
    assert torch.equal(got["text"], encoders.text(["a", "b c"], TOKENS)["text"])
    if pairs:
        assert torch.equal(got["reference"], encoders.images(video.flip(0)[:, 0]))


def test_the_encoders_are_frozen_in_their_types_and_always_the_same(folder: Path, tmp_path: Path, capfd: Any) -> None:
    ours = Encoders(folder)
    assert ours.text([""], 4)["text"].dtype == torch.bfloat16
    for model in (ours.vae, ours.text_encoder, ours.text_encoder_2):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    capfd.readouterr()
    again = write_tiny_encoders(tmp_path)
    assert capfd.readouterr().err == ""
    assert fingerprint(again) == fingerprint(folder)
    config = again / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.3611", "0.3612"))
    assert fingerprint(again) != fingerprint(folder)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoders=.*: no vae/ there; a folder in diffusers' layout holds vae/"):
        Encoders(tmp_path)
    for part in NEEDED:
        (tmp_path / part).mkdir()
    ours = Encoders(tmp_path)
    for use in (lambda: ours.images(pan("coffee", 1, 32, 48)), lambda: ours.text([""], 4), lambda: ours.tokenizer):
        with pytest.raises(UserError, match="^[^\n]*cannot be loaded[^\n]*$"):
            use()
