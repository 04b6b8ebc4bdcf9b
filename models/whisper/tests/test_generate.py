"""Transcribing: what transformers writes down with the same weights, of short sounds and of long ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import train
from mindspeed_model_core.data import load_tokenizer
from mindspeed_model_core.data.audio import read_audio
from mindspeed_model_core.errors import UserError
from mindspeed_model_whisper import MODEL, generate
from mindspeed_model_whisper.data import RATE, log_mel
from mindspeed_model_whisper.generate import Transcriber, Transcript, open_transcriber, transcribe_command
from mindspeed_model_whisper.task import WhisperRecipe
from mindspeed_model_whisper.weights import generation_settings

from .speech import sweep, tone, write_speech, write_wav

CONFIG = MODEL.presets["mini"]


def theirs(folder: Path) -> Any:
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.mark.parity
@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("beams", [1, 4])
def test_writes_what_transformers_writes(folder: Path, beams: int, timestamps: bool) -> None:
    audio = sweep(0.9)
    transcriber = open_transcriber(folder, None, "cpu", "fp32")
    found = transcriber(audio, language="zh", timestamps=timestamps, beams=beams)
    mel = log_mel(audio, CONFIG.num_mel_bins, CONFIG.frames)[None]
    with torch.no_grad():
        ids = theirs(folder).generate(
            mel, language="zh", task="transcribe", return_timestamps=timestamps, num_beams=beams
        )
    words = [token for token in ids[0].tolist() if token < CONFIG.eos_token_id]
    assert words, "says nothing: there is nothing to compare"
    assert found.text == transcriber.prompts.tokenizer.decode(words).strip()
    assert bool(found.segments) == timestamps


@pytest.mark.parity
@pytest.mark.parametrize("beams", [1, 3])
def test_long_sounds_are_heard_as_transformers_hears_them(folder: Path, beams: int) -> None:
    """Segment by segment, each from where the last one's timestamps end."""
    audio = sweep(3.3)
    network = open_transcriber(folder, None, "cpu", "fp32").network
    mel = log_mel(audio, CONFIG.num_mel_bins, 330)[None]
    told = {
        "attention_mask": torch.ones(1, 330, dtype=torch.long),
        "language": "en",
        "task": "transcribe",
        "return_timestamps": True,
        "num_beams": beams,
    }
    with torch.no_grad():
        ours, others = (net.generate(mel, **told)[0].tolist() for net in (network, theirs(folder)))
    times = [token for token in ours if token > CONFIG.decoder_start_token_id + 9]
    assert ours == others and len(times) >= 8


@pytest.mark.parity
@pytest.mark.parametrize("seconds", [0.8, 3.3])
def test_texts_are_those_of_transformers_pipeline(
    folder: Path, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of long sounds too, whose segments it joins; without what is drawn."""
    from transformers import pipeline

    for name, value in {"FALLBACK": (0.0,), "REPEATS": None, "UNLIKELY": None, "NO_SPEECH": None}.items():
        monkeypatch.setattr(generate, name, value)
    audio, told = sweep(seconds), {"language": "de", "task": "transcribe", "num_beams": 1}
    long = {"return_timestamps": True} if seconds > 1 else {}
    recogniser = pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
    want = recogniser(audio.numpy(), generate_kwargs=told, **long)["text"].strip()
    assert want and open_transcriber(folder, None, "cpu", "fp32")(audio, language="de").text == want


def test_a_network_that_trains_is_left_as_it_was(folder: Path) -> None:
    """Asked between steps; and moved after the transcriber was made."""
    net = open_transcriber(folder, None, "cpu", "fp32").net
    net.requires_grad_(True).train()
    net.blocks[0].eval()
    before = [module.training for module in net.modules()]
    modes = []
    net.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    words = load_tokenizer(folder, CONFIG.vocab_size)
    transcriber = Transcriber(net, words, generation_settings(words, CONFIG))
    assert [module.training for module in net.modules()] == before
    text = transcriber(sweep(0.8), language="de").text
    assert [module.training for module in net.modules()] == before and set(modes) == {False}
    net.double()
    assert transcriber(sweep(0.8), language="de").text == text
    mel, tokens = torch.zeros(1, CONFIG.num_mel_bins, CONFIG.frames), torch.zeros(1, 4, dtype=torch.long)
    net({"mel": mel, "tokens": tokens, "labels": tokens}).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_sounds_are_read_one_ahead(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a file that is damaged in its middle is heard, and said to be."""
    paths = [write_wav(tmp_path / f"{n}.wav", sweep(0.3).numpy()) for n in range(5)]
    events: list[str] = []

    def read(path: Path, rate: int, *, damaged: Any) -> torch.Tensor:
        events.append("read")
        if path.name == "1.wav":
            damaged(0.125)
        return read_audio(path, rate)

    def heard(self: Any, audio: torch.Tensor, *, advance: Any, **_: Any) -> Any:
        assert events.count("read") - events.count("heard") <= 3
        events.append("heard")
        advance(len(audio) / RATE)
        return Transcript("text")

    monkeypatch.setattr(generate, "read_audio", read)
    monkeypatch.setattr(Transcriber, "__call__", heard)
    transcribe_command(folder, paths, device="cpu")
    said = capsys.readouterr()
    assert events.count("heard") == 5 and said.out.count("text") == 5
    assert said.err.count("packets cannot be decoded") == 1
    assert "1.wav: 1 packets cannot be decoded, the first at 0.12 s; they are heard as silence" in said.err


def test_long_sounds_tell_how_far_they_are(folder: Path) -> None:
    told: list[float] = []
    open_transcriber(folder, None, "cpu", "fp32")(sweep(3.3), language="en", advance=told.append)
    assert len(told) > 2 and sum(told) == pytest.approx(3.3) and min(told) >= 0


def test_long_sounds_have_times_that_go_on(folder: Path) -> None:
    transcriber = open_transcriber(folder, None, "cpu", "fp32")
    found, again = (transcriber(sweep(2.5), language="en", timestamps=True) for _ in range(2))
    assert found == again
    starts = [start for start, _, _ in found.segments]
    assert starts == sorted(starts) and starts[-1] > 1.0


def test_the_language_is_heard(folder: Path) -> None:
    transcriber = open_transcriber(folder, None, "cpu", "fp32")
    texts = {code: transcriber(sweep(0.8), language=code).text for code in ("en", "zh", "de")}
    assert len(set(texts.values())) > 1 and transcriber(sweep(0.8)).text in texts.values()


@pytest.mark.parity
def test_an_exported_folder_runs_in_transformers_pipeline(folder: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    path = write_wav(tmp_path / "sweep.wav", sweep(0.7).numpy())
    audio = read_audio(path, RATE)
    recogniser = pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
    transcriber = open_transcriber(folder, None, "cpu", "fp32")
    for beams in (1, 5):
        said = recogniser(audio.numpy(), generate_kwargs={"language": "de", "task": "transcribe", "num_beams": beams})
        assert said["text"].strip()
        assert transcriber(audio, language="de", beams=beams).text == said["text"].strip()


@pytest.mark.parametrize(
    "audio", [torch.zeros(8000), torch.zeros(RATE * 3), tone(0.001)], ids=["short", "long", "click"]
)
def test_silence_is_no_mistake(folder: Path, audio: Any) -> None:
    found = open_transcriber(folder, None, "cpu", "fp32")(torch.as_tensor(audio).float(), language="en")
    assert isinstance(found.text, str)


def test_a_language_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="language 'xx': the tokenizer knows no such language"):
        open_transcriber(folder, None, "cpu", "fp32")(sweep(0.5), language="xx")


# ------------------------------------------------------------------------------------------------ settings


def with_settings(folder: Path, place: Path, settings: dict[str, Any]) -> Path:
    shutil.copytree(folder, place)
    (place / "generation_config.json").write_text(json.dumps(settings))
    return place


def test_an_old_file_of_settings_is_completed(folder: Path, tmp_path: Path) -> None:
    """The first released folders' say neither languages nor tasks, and force what is now told."""
    old = {"max_length": 20, "suppress_tokens": [5, 6], "forced_decoder_ids": [[1, 259], [2, 262], [3, 266]]}
    plain, other = (
        open_transcriber(each, None, "cpu", "fp32")
        for each in (folder, with_settings(folder, tmp_path / "old", {**old, "eos_token_id": 256}))
    )
    said = other.network.generation_config
    assert (said.max_length, said.suppress_tokens, said.lang_to_id) == (
        20,
        [5, 6],
        {"<|en|>": 258, "<|zh|>": 259, "<|de|>": 260},
    )
    assert isinstance(other(sweep(0.5)).text, str)
    same = with_settings(folder, tmp_path / "same", {"forced_decoder_ids": [[1, 259]]})
    again = open_transcriber(same, None, "cpu", "fp32")
    assert again(sweep(0.8), language="de") == plain(sweep(0.8), language="de")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token_id": 2, "bos_token_id": 1}, "eos_token_id=2: is 256 by the weights and their tokenizer"),
        ({"no_timestamps_token_id": 50363}, "no_timestamps_token_id=50363: is 266"),
        ({"is_multilingual": False}, "is_multilingual=False: is True"),
        ({"lang_to_id": {"<|fr|>": 50265}}, r"lang_to_id\[<\|fr\|>\]=50265: is None by the tokenizer"),
        ({"lang_to_id": [1]}, r"lang_to_id=\[1\]: must be an object"),
        ({"suppress_tokens": [1, 50358]}, r"suppress_tokens=\[1, 50358\]: must be a list of tokens from 0 to 319"),
        ({"max_length": 448}, "max_length=448: must be from 1 to 32"),
        ({"pad_token_id": 50257}, "pad_token_id=50257: must be from 0 to 319"),
        ({"early_stopping": "maybe"}, r"not settings that transformers takes \("),
    ],
)
def test_settings_of_other_weights_are_refused(
    folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"generation_config\.json: {message}"):
        open_transcriber(with_settings(folder, tmp_path / "other", settings), None, "cpu", "fp32")


def test_a_run_has_the_settings_of_the_weights_it_began_with(folder: Path, tmp_path: Path) -> None:
    began = with_settings(folder, tmp_path / "began", {"suppress_tokens": [7]})
    recipe = WhisperRecipe(
        preset="mini", precision="fp32", steps=1, global_batch=4, init_from=str(began), data=write_speech(tmp_path)
    )
    train.run(recipe, MODEL, tmp_path / "run")
    assert open_transcriber(tmp_path / "run", None, "cpu", "fp32").network.generation_config.suppress_tokens == [7]
