"""Sounds, features and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mindspeed_model_core.data import IGNORE, load_tokenizer
from mindspeed_model_core.data.audio import read_audio
from mindspeed_model_core.errors import UserError
from mindspeed_model_whisper import MODEL
from mindspeed_model_whisper.data import (
    RATE,
    Prompts,
    Speech,
    WhisperData,
    collate,
    log_mel,
    mel_bands,
    read_lines,
    text_step,
)
from mindspeed_model_whisper.task import WhisperRecipe
from mindspeed_model_whisper.tiny import write_tiny_tokenizer

from .speech import tone, write_speech, write_wav

CONFIG = MODEL.presets["mini"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_tokenizer(tmp_path_factory.mktemp("words")), CONFIG.vocab_size)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> Prompts:
    return Prompts(tokenizer, CONFIG)


def speech(folder: Path, prompts: Prompts, rows: list[dict[str, Any]], **fields: Any) -> Speech:
    listed = folder / "list.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Speech(listed, WhisperData(path=str(listed), **fields), prompts)


# ------------------------------------------------------------------------------------------------ features


@pytest.mark.parity
@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("sound", ["noise", "short", "silence", "long"])
def test_features_are_transformers(mels: int, sound: str) -> None:
    from transformers import WhisperFeatureExtractor

    draw = np.random.default_rng(0)
    audio = {
        "noise": draw.normal(0, 0.1, 30 * RATE),
        "short": tone(1.7, pitch=523.0),
        "silence": np.zeros(RATE),
        "long": draw.normal(0, 0.1, 31 * RATE),
    }[sound].astype(np.float32)
    want = WhisperFeatureExtractor(feature_size=mels)(audio, sampling_rate=RATE, return_tensors="pt").input_features[0]
    got = log_mel(torch.from_numpy(audio), mels, 3000)
    assert got.shape == want.shape and (got - want).abs().max() < 1e-5
    assert bool(got.isfinite().all())


@pytest.mark.parity
@pytest.mark.parametrize("mels", [8, 80, 128])
def test_bands_are_transformers(mels: int) -> None:
    from transformers.audio_utils import mel_filter_bank

    want = mel_filter_bank(201, mels, 0.0, 8000.0, RATE, norm="slaney", mel_scale="slaney")
    assert np.abs(mel_bands(mels).numpy() - want).max() < 1e-8


def test_features_of_hours_need_no_spectrum_of_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in parts, and what they are made at once."""
    longest, stft = [], torch.stft
    monkeypatch.setattr(torch, "stft", lambda x, *a, **k: longest.append(len(x)) or stft(x, *a, **k))
    audio = torch.randn(61 * RATE, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 1, 61 * RATE)
    got = log_mel(audio, 8, 6100)
    assert max(longest) <= 30 * RATE + 400
    whole = stft(audio, 400, 160, window=torch.hann_window(400), return_complex=True)[:, :-1].abs() ** 2
    logs = (mel_bands(8).T @ whole).clamp_min(1e-10).log10()
    assert (got - (logs.maximum(logs.max() - 8) + 4) / 4).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------ tokens


def test_prompts_say_language_task_and_times(prompts: Prompts, tokenizer: Any) -> None:
    said = [tokenizer.convert_ids_to_tokens(prompts.before(*given)) for given in (
        ("en", "transcribe", False), ("de", "translate", True),
    )]  # fmt: skip
    assert said == [
        ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"],
        ["<|startoftranscript|>", "<|de|>", "<|translate|>"],
    ]
    assert tokenizer.convert_ids_to_tokens([prompts.time(0), prompts.time(0.5)]) == ["<|0.00|>", "<|0.50|>"]


@pytest.mark.parity
def test_tokens_are_transformers(prompts: Prompts, tokenizer: Any) -> None:
    """Special tokens spelled in a text are text here, and nothing else differs."""
    tokenizer.set_prefix_tokens(language="de", task="transcribe", predict_timestamps=False)
    text = "नमस्ते, hello"
    want = tokenizer(text).input_ids
    assert [*prompts.before("de", "transcribe", False), *prompts.text(text), CONFIG.eos_token_id] == want
    assert CONFIG.eos_token_id not in prompts.text("<|endoftext|>")


def test_a_model_of_english_alone_is_told_no_language(tokenizer: Any) -> None:
    english = Prompts(tokenizer, CONFIG.model_copy(update={"vocab_size": 51864}))
    assert english.before("en", "transcribe", False) == [257, english.first_time - 1]
    with pytest.raises(UserError, match="this model transcribes English alone"):
        english.before("de", "transcribe", False)


def test_another_tokenizer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"<\|startoftranscript\|> is 257, the model's is 258"):
        Prompts(tokenizer, CONFIG.model_copy(update={"decoder_start_token_id": 258}))


# ------------------------------------------------------------------------------------------------ samples


def test_a_batch_predicts_each_next_token(tmp_path: Path, prompts: Prompts) -> None:
    for name in ("a", "b"):
        write_wav(tmp_path / f"{name}.wav", tone(0.3))
    found = speech(tmp_path, prompts, [{"audio": "a.wav", "text": "hi"}, {"audio": "b.wav", "text": "hi there you"}])
    batch = found.collate([found.read(0, 0), found.read(1, 0)])  # type: ignore[list-item]
    assert batch["mel"].shape == (2, 8, 100) and batch["tokens"].shape == batch["labels"].shape == (2, 16)
    tokens, labels = batch["tokens"][0].tolist(), batch["labels"][0].tolist()
    before = prompts.before("en", "transcribe", False)
    assert tokens[:6] == [*before, *prompts.text("hi")] and labels[:6] == [*tokens[1:6], CONFIG.eos_token_id]
    assert set(labels[6:]) == {IGNORE}


def test_timestamps_are_around_segments_or_the_whole(tmp_path: Path, prompts: Prompts) -> None:
    write_wav(tmp_path / "a.wav", tone(0.9))
    segments = [{"start": 0.1, "end": 0.4, "text": "a"}, {"start": 0.4, "end": 0.82, "text": "b"}]
    rows = [{"audio": "a.wav", "segments": segments}, {"audio": "a.wav", "text": "ab"}]
    found = speech(tmp_path, prompts, rows, timestamps=True)
    names = [prompts.tokenizer.convert_ids_to_tokens(found.read(n, 0)["tokens"])[3:-1] for n in range(2)]  # type: ignore[index]
    assert names[0] == ["<|0.10|>", "a", "<|0.40|>", "<|0.40|>", "Ġ", "b", "<|0.82|>"]
    assert names[1] == ["<|0.00|>", "a", "b", "<|0.90|>"]


@pytest.mark.parametrize(("language", "text"), [("en", "one two three"), ("ja", "one two three")])
def test_segments_are_joined_as_they_are_written(tmp_path: Path, language: str, text: str) -> None:
    """With spaces where the language has them: without, words of two segments would be one."""
    parts = ["one", "two", " three"] if language == "en" else ["one ", "two", " three"]
    segments = [{"start": n, "end": n + 1, "text": part} for n, part in enumerate(parts)]
    listed = tmp_path / "list.jsonl"
    listed.write_text(json.dumps({"audio": "a.wav", "segments": segments, "language": language}))
    assert read_lines(listed, "en")[0].text == text


SHARED = {"tp": 3, "sequence": True}


def test_texts_are_padded_until_ranks_can_share_them(tmp_path: Path, prompts: Prompts) -> None:
    def length(samples: int, tokens: int, **fields: Any) -> int:
        recipe = WhisperRecipe(preset="mini", global_batch=samples, micro_batch=samples, **fields)
        sample = {"mel": torch.zeros(1), "tokens": [0] * (tokens + 1)}
        return collate([sample] * samples, CONFIG, text_step(recipe))["tokens"].shape[1]

    assert [length(1, n, parallel=SHARED) for n in (3, 24, 25, 30)] == [24, 24, 30, 30]
    assert length(3, 3, parallel=SHARED) == length(1, 3, parallel={"tp": 3}) == length(1, 3) == 8
    write_wav(tmp_path / "a.wav", tone(0.2))
    listed = tmp_path / "list.jsonl"
    listed.write_text(json.dumps({"audio": "a.wav", "text": "a" * 27}))
    assert len(Speech(listed, WhisperData(), prompts).lines) == 1
    with pytest.raises(UserError, match=r"31 tokens, the network writes 30, and parallel\.sequence=true shares"):
        Speech(listed, WhisperData(), prompts, 3)


def test_sounds_that_ranks_cannot_share_are_refused(tmp_path: Path) -> None:
    def task(batch: int, tp: int, config: Any) -> Any:
        parallel = {"tp": tp, "sequence": True}
        return MODEL.task(
            WhisperRecipe(preset="mini", global_batch=batch, micro_batch=batch, parallel=parallel), config
        )

    with pytest.raises(UserError, match=r"micro_batch=4: with parallel\.sequence=true, parallel\.tp=3 must divide"):
        task(4, 3, CONFIG)
    with pytest.raises(UserError, match=r"50 positions; nearest: 3 or 6, or parallel\.sequence=false"):
        task(4, 3, CONFIG)
    for batch, tp, preset in ((6, 3, "mini"), (1, 5, "large-v2"), (1, 6, "tiny.en"), (2, 8, "base.en")):
        assert task(batch, tp, MODEL.preset(preset))
    with pytest.raises(UserError, match="1500 positions; nearest: 2, or"):
        task(1, 8, MODEL.preset("base.en"))


def test_common_voice_is_read_as_it_comes(tmp_path: Path) -> None:
    write_wav(tmp_path / "clips" / "one.wav", tone(0.2))
    rows = ["client_id\tpath\tsentence\tlocale", 'x\tone.wav\tsay "a\thi', "y\tone.wav\tb\tzh-CN"]
    (tmp_path / "train.tsv").write_text("\n".join(rows) + "\n")
    first, second = read_lines(tmp_path / "train.tsv", "en")
    assert (first.path, first.text, first.language) == (tmp_path / "clips" / "one.wav", 'say "a', "hi")
    assert second.language == "zh"


@pytest.mark.parametrize(
    ("name", "codec", "rate"), [("a.flac", "flac", 44100), ("a.mp3", "libmp3lame", 44100), ("a.ogg", "libopus", 48000)]
)
def test_other_formats_rates_and_channels_are_heard_alike(tmp_path: Path, name: str, codec: str, rate: int) -> None:
    import av

    wave = tone(0.5, rate).astype(np.float32)
    with av.open(str(tmp_path / name), "w") as container:
        if codec not in av.codecs_available:
            pytest.skip(f"this FFmpeg does not write {codec}")
        stream = container.add_stream(codec, rate=rate, layout="stereo")
        both = (np.repeat(wave[:, None], 2, 1).reshape(1, -1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(both, format="s16", layout="stereo")
        frame.sample_rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    got, want = read_audio(tmp_path / name, RATE), torch.from_numpy(tone(0.5)).float()
    assert abs(len(got) - len(want)) < 0.06 * RATE
    # Codecs delay and lose a little; loudness and pitch stay.
    assert abs(int(torch.fft.rfft(got[2400:5600]).abs().argmax()) / 0.2 - 440) < 6
    assert got[2400:5600].square().mean().sqrt() == pytest.approx(float(want.square().mean().sqrt()), rel=0.1)


def test_channels_are_averaged_and_rates_resampled(tmp_path: Path) -> None:
    two = np.stack((tone(0.5, 8000), np.zeros(4000)), 1)
    got = read_audio(write_wav(tmp_path / "two.wav", two, 8000), RATE)
    want = torch.from_numpy(tone(0.5)).float() / 2
    assert len(got) == len(want) and (got - want)[200:-200].abs().max() < 2e-3


BAD = {
    "empty file": ("empty.wav", "holds no sample of sound; it is empty or truncated, leave it out"),
    "no samples": ("none.wav", "holds no sample of sound; it is empty or truncated, leave it out"),
    "no sound": ("text.wav", "not readable sound"),
    "missing": ("missing.wav", "no such file"),
    "too long": ("long.wav", "is 1.20 s long, the network hears 1; cut it into parts"),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_sounds_are_named_or_left_out(
    tmp_path: Path, prompts: Prompts, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, message = BAD[case]
    (tmp_path / "empty.wav").touch()
    write_wav(tmp_path / "none.wav", np.zeros(0))
    (tmp_path / "text.wav").write_text("this is no sound at all" * 9)
    write_wav(tmp_path / "long.wav", tone(1.2))
    write_wav(tmp_path / "good.wav", tone(0.2))
    rows = [{"audio": "good.wav", "text": "a"}, {"audio": name, "text": "b"}]
    with pytest.raises(UserError, match=message) as error:
        speech(tmp_path, prompts, rows)
    assert f"list.jsonl:2: {tmp_path / name}" in str(error.value) and "data.on_bad=skip" in str(error.value)
    assert len(speech(tmp_path, prompts, rows, on_bad="skip").lines) == 1
    assert name in capsys.readouterr().err
    with pytest.raises(UserError, match="none of its 1 sounds can be used"):
        speech(tmp_path, prompts, rows[1:], on_bad="skip")


def test_a_sound_longer_than_its_header_says_is_no_sample(
    tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut to what the network hears it would have the text of all."""
    write_wav(tmp_path / "a.wav", tone(1.5))
    write_wav(tmp_path / "b.wav", tone(0.5))
    rows = [{"audio": name, "text": "a"} for name in ("a.wav", "b.wav")]
    monkeypatch.setattr("mindspeed_model_whisper.data.seconds", lambda path: 0.5)
    with pytest.raises(UserError, match=r"list\.jsonl:1: .*a\.wav: is longer than its header says, and than the 1 s"):
        speech(tmp_path, prompts, rows).read(0, 0)
    assert speech(tmp_path, prompts, rows, on_bad="skip").read(0, 0) is None
    assert speech(tmp_path, prompts, rows).read(1, 0) is not None


def test_silence_is_a_sample(tmp_path: Path, prompts: Prompts) -> None:
    write_wav(tmp_path / "a.wav", np.zeros(800))
    sample = speech(tmp_path, prompts, [{"audio": "a.wav", "text": ""}]).read(0, 0)
    assert sample is not None and bool(sample["mel"].isfinite().all())
    assert sample["tokens"] == [*prompts.before("en", "transcribe", False), CONFIG.eos_token_id]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"audio": "a.wav"}, "no key text or sentence or transcription"),
        ({"text": "a"}, "no key audio or path or file"),
        ({"audio": "a.wav", "text": "a" * 40}, "its text has 44 tokens, the network writes 32"),
        ({"audio": "a.wav", "text": "a", "language": "xx"}, "language 'xx': the tokenizer knows no such language"),
        ({"audio": "a.wav", "segments": [{"start": 1}]}, "'segments' must be objects with start, end and text"),
        (
            {"audio": "a.wav", "segments": [{"start": 0.0, "end": float("nan"), "text": "a"}]},
            "'segments' have a start or end that is no number of seconds",
        ),
        (
            {"audio": "a.wav", "segments": [{"start": 0.5, "end": 0.1, "text": "a"}]},
            "'segments' must follow one another in time",
        ),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, prompts: Prompts, row: dict[str, Any], message: str) -> None:
    write_wav(tmp_path / "a.wav", tone(0.2))
    with pytest.raises(UserError, match=message) as error:
        speech(tmp_path, prompts, [row])
    assert "list.jsonl:1: " in str(error.value)


def test_times_beyond_the_sound_are_refused(tmp_path: Path, prompts: Prompts) -> None:
    write_wav(tmp_path / "a.wav", tone(0.2))
    row = {"audio": "a.wav", "segments": [{"start": 0.0, "end": 2.0, "text": "a"}]}
    with pytest.raises(UserError, match="time 2: is outside the 1 seconds of a sound"):
        speech(tmp_path, prompts, [row], timestamps=True)


def test_what_a_recipe_lacks_is_named(tmp_path: Path) -> None:
    def opened(**data: Any) -> None:
        recipe = WhisperRecipe(preset="mini", global_batch=4, data=data)
        MODEL.task(recipe, CONFIG).data(0, 1)

    with pytest.raises(UserError, match=r"data\.path: this field is required"):
        opened()
    with pytest.raises(UserError, match=r"data\.tokenizer: this field is required without init_from"):
        opened(path=write_speech(tmp_path)["path"])


def test_an_epoch_reads_every_sound_once(tmp_path: Path) -> None:
    recipe = WhisperRecipe(preset="mini", global_batch=4, micro_batch=2, data=write_speech(tmp_path))
    loader = iter(MODEL.task(recipe, CONFIG).data(0, 1))
    batches = [batch for _ in range(2) for batch in next(loader)]
    assert len({row.numpy().tobytes() for batch in batches for row in batch["mel"]}) == 8


@pytest.mark.parametrize(("notimes", "fits"), [(50364, True), (50363, False)])
def test_the_tokenizer_of_another_release_is_refused(notimes: int, fits: bool) -> None:
    """One that is a language short has the same start and end, and every task beside its place."""
    known = {"<|startoftranscript|>": 50258, "<|endoftext|>": 50257, "<|notimestamps|>": notimes}
    tokenizer = SimpleNamespace(get_vocab=lambda: known, name_or_path="theirs")
    config = MODEL.preset("large-v3")
    if fits:
        assert Prompts(tokenizer, config).first_time == 50365
    else:
        with pytest.raises(UserError, match="times would end at 51865, the model's at 51866: it is another release's"):
            Prompts(tokenizer, config)
