"""Both layouts: what is read of them, what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import weights
from mindspeed_model_core.cli import app
from mindspeed_model_core.data import load_tokenizer
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.files import save_tensors
from mindspeed_model_core.testing.suite import open_net, randomise
from mindspeed_model_core.testing.tolerance import FP64, assert_close
from mindspeed_model_whisper import MODEL
from mindspeed_model_whisper.data import Prompts
from mindspeed_model_whisper.model import sinusoids
from mindspeed_model_whisper.tiny import write_tiny_tokenizer
from typer.testing import CliRunner

from .test_suite import TestSuite as Suite

CONFIG = MODEL.presets["mini"]
HUB, ORIGINAL = MODEL.layouts


def save(folder: Path, layout: Any = HUB, config: Any = CONFIG, **options: Any) -> Path:
    net = open_net(MODEL, config)
    randomise(net, seed=4)
    weights.save(net.named_parameters(), config, layout, folder, **options)
    return folder


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parity
def test_gradients_equal_transformers_in_double_precision(tmp_path: Path) -> None:
    """Beside the suite's 1e-5 in fp32, in which the cross-attention's gradients are most of all rounding."""
    suite = Suite()
    theirs = suite.reference(CONFIG)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "weights")  # type: ignore[operator]
    net, batch = open_net(MODEL, CONFIG, tmp_path / "weights").double(), suite.batch(CONFIG, 1)
    batch["mel"], theirs = batch["mel"].double(), theirs.double()
    net(batch).backward()  # type: ignore[union-attr]
    suite.reference_run(theirs, batch)[1].backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path / "gradients")  # type: ignore[operator]
    want = open_net(MODEL, CONFIG).double()
    weights.load(want, tmp_path / "gradients", MODEL)
    got = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert_close(got, {name: p.detach() for name, p in want.named_parameters()}, FP64)


def test_the_release_is_one_file_of_sizes_and_tensors(tmp_path: Path) -> None:
    held = torch.load(save(tmp_path / "original", ORIGINAL) / "model.pt", weights_only=True)
    assert held["dims"] == {
        "n_mels": 8,
        "n_vocab": 320,
        "n_audio_ctx": 50,
        "n_audio_state": 32,
        "n_audio_head": 4,
        "n_audio_layer": 2,
        "n_text_ctx": 32,
        "n_text_state": 32,
        "n_text_head": 4,
        "n_text_layer": 2,
    }
    state = held["model_state_dict"]
    assert torch.equal(state["encoder.positional_embedding"], sinusoids(50, 32))
    assert state["decoder.blocks.1.cross_attn.key.weight"].shape == (32, 32)
    assert "decoder.blocks.1.cross_attn.key.bias" not in state
    assert state["encoder.conv1.weight"].shape == (32, 8, 3)


def test_half_precision_of_the_release_keeps_its_bits(tmp_path: Path) -> None:
    """Published files are in fp16, their positions too."""
    save(tmp_path / "a", ORIGINAL, dtype=torch.float16)
    weights.convert(tmp_path / "a", tmp_path / "b", MODEL, "hub", preset="mini")
    weights.convert(tmp_path / "b", tmp_path / "c", MODEL, "original")
    one, two = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("a", "c"))
    assert one["dims"] == two["dims"] and list(one["model_state_dict"]) == list(two["model_state_dict"])
    assert all(torch.equal(a, two["model_state_dict"][name]) for name, a in one["model_state_dict"].items())


def test_a_repeated_head_is_taken_for_what_it_is(tmp_path: Path) -> None:
    """Some folders hold the tied head again."""
    from safetensors.torch import load_file

    folder = save(tmp_path / "hub")
    held = load_file(folder / "model.safetensors")
    save_tensors(
        folder / "model.safetensors",
        {**held, "proj_out.weight": held["model.decoder.embed_tokens.weight"].clone()},
        {"format": "pt"},
    )
    assert open_net(MODEL, CONFIG, folder) is not None


@pytest.mark.parametrize("layout", MODEL.layouts, ids=lambda layout: layout.name)
def test_other_positions_are_refused(tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspeed_model_whisper import weights as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "sinusoids", lambda length, width: torch.zeros(length, width))
        save(tmp_path / "folder", layout)
    with pytest.raises(UserError, match="not the sinusoids of 50 positions, 32 wide"):
        weights.read_config(tmp_path / "folder", MODEL)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "wav2vec2"}, "model_type='wav2vec2' is not supported, Whisper has 'whisper'"),
        ({"dropout": 0.1}, r"dropout=0\.1 is not supported, expected 0\.0"),
        ({"activation_function": "relu"}, "activation_function='relu' is not supported"),
        ({"d_model": 30}, "d_model=30 does not divide by encoder_attention_heads=4"),
    ],
)
def test_settings_of_another_network_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    change(save(tmp_path / "hub"), **values)
    with pytest.raises(UserError, match=message):
        weights.read_config(tmp_path / "hub", MODEL)


def test_what_the_release_cannot_say_is_refused(tmp_path: Path) -> None:
    wide = CONFIG.model_copy(update={"encoder_ffn_dim": 80})
    with pytest.raises(UserError, match="encoder_ffn_dim=80: the release's layout has 4 x d_model = 128"):
        save(tmp_path / "original", ORIGINAL, wide)


def test_special_tokens_follow_from_the_vocabulary(tmp_path: Path) -> None:
    """The release does not say them; another size than the published ones is refused."""
    wide = CONFIG.model_copy(update={"num_mel_bins": 12})
    assert weights.read_config(save(tmp_path / "known", ORIGINAL, wide), MODEL) == wide
    other = CONFIG.model_copy(update={"vocab_size": 300})
    with pytest.raises(UserError, match="n_vocab=300: of this vocabulary's special tokens nothing is known"):
        weights.read_config(save(tmp_path / "unknown", ORIGINAL, other), MODEL)


def test_a_folder_of_several_releases_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "original", ORIGINAL)
    (folder / "other.pt").write_bytes((folder / "model.pt").read_bytes())
    with pytest.raises(UserError, match=r"holds model\.pt, other\.pt; give a folder with one \.pt file"):
        weights.read_config(folder, MODEL)


@pytest.mark.parametrize("held", [{"weight": torch.zeros(2)}, {"dims": {"n_mels": 80}, "model_state_dict": {}}])
def test_another_file_is_refused(tmp_path: Path, held: dict[str, Any]) -> None:
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: dims: expected an object with n_mels"):
        weights.read_config(tmp_path, MODEL)


def test_what_generation_and_features_need_is_written(tmp_path: Path) -> None:
    """As transformers wants it, from configuration and tokenizer; what came along stays."""
    words = write_tiny_tokenizer(tmp_path / "words")
    folder = save(tmp_path / "hub", extras_from=words)
    said = json.loads((folder / "generation_config.json").read_text())
    assert list(said["lang_to_id"].items()) == [("<|en|>", 258), ("<|zh|>", 259), ("<|de|>", 260)]
    assert said["task_to_id"] == {"transcribe": 262, "translate": 261} and said["no_timestamps_token_id"] == 266
    features = json.loads((folder / "preprocessor_config.json").read_text())
    assert (features["feature_size"], features["chunk_length"], features["nb_max_frames"]) == (8, 1, 100)
    (folder / "generation_config.json").write_text(json.dumps({**said, "num_beams": 7}))  # in one line, not as ours
    weights.convert(folder, tmp_path / "again", MODEL, "hub")
    same = [(each / "generation_config.json").read_bytes() for each in (folder, tmp_path / "again")]
    assert same[0] == same[1]


@pytest.mark.parity
@pytest.mark.parametrize(
    "told", [{"language": "de"}, {"task": "translate"}, {"language": "zh", "return_timestamps": True}]
)
def test_an_old_file_of_settings_is_completed_for_transformers(tmp_path: Path, told: dict[str, Any]) -> None:
    from transformers import WhisperForConditionalGeneration

    folder = save(tmp_path / "hub", extras_from=write_tiny_tokenizer(tmp_path / "words"))
    full = json.loads((folder / "generation_config.json").read_text())
    old = {"eos_token_id": 256, "max_length": 20, "forced_decoder_ids": [[1, 259], [2, 262]], "num_beams": 2}
    (folder / "generation_config.json").write_text(json.dumps(old))
    weights.convert(folder, tmp_path / "new", MODEL, "hub")
    net = WhisperForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert net.generate(torch.zeros(1, 8, 100), **told).shape[0] == 1
    said = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert said == {**full, "max_length": 20, "num_beams": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"eos_token_id": 2}', "eos_token_id=2: is 256 by the weights and their tokenizer"), ("{", "not valid JSON")],
)
def test_settings_that_cannot_be_completed_are_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = save(tmp_path / "hub", extras_from=write_tiny_tokenizer(tmp_path / "words"))
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=rf"^generation_config\.json: {message}"):
        weights.convert(folder, tmp_path / "new", MODEL, "hub")
    assert not (tmp_path / "new").exists()


def test_convert_says_how_a_release_gets_a_tokenizer(tmp_path: Path) -> None:
    """With it come the settings that follow from it, which copying its files would not write."""
    save(tmp_path / "release", ORIGINAL)
    command = ["convert", str(tmp_path / "release"), str(tmp_path / "hub"), "--layout", "hub"]
    done = CliRunner().invoke(app(MODEL), command)
    assert done.exit_code == 0 and not (tmp_path / "hub" / "generation_config.json").exists()
    assert "the same command with --extras-from DIR --overwrite adds the one in DIR" in done.output
    words = write_tiny_tokenizer(tmp_path / "words")
    done = CliRunner().invoke(app(MODEL), [*command, "--extras-from", str(words), "--overwrite"])
    assert done.exit_code == 0 and "--extras-from" not in done.output
    assert (tmp_path / "hub" / "generation_config.json").exists()


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    from mindspeed_model_core.data.tokenizer import train_tokenizer

    train_tokenizer(["one two three"], 270, tmp_path / "words")
    with pytest.raises(UserError, match=r"has no token <\|startoftranscript\|>; give Whisper's tokenizer"):
        save(tmp_path / "hub", extras_from=tmp_path / "words")
    assert not (tmp_path / "hub").exists()


def write_early_tokenizer(folder: Path) -> Path:
    """Write a tokenizer as the first of the released folders have it: without tokenizer.json, without times."""
    write_tiny_tokenizer(folder)
    file = folder / "tokenizer.json"
    held = json.loads(file.read_text())
    file.unlink()
    names = {each["content"]: each["id"] for each in held["added_tokens"]}
    start, words = CONFIG.eos_token_id, held["model"]["vocab"]
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    for name, value in {
        "vocab.json": {word: number for word, number in words.items() if number <= start},
        "added_tokens.json": {name: number for name, number in names.items() if number > start},
        "special_tokens_map.json": {**ends, "additional_special_tokens": list(names)},
        "normalizer.json": {"colour": "color"},
        "tokenizer_config.json": {"tokenizer_class": "WhisperTokenizer", **ends},
    }.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def test_tokenizers_of_early_folders_are_read(tmp_path: Path) -> None:
    """They have vocab.json and merges.txt; all of it travels with weights."""
    early, now = write_early_tokenizer(tmp_path / "early"), write_tiny_tokenizer(tmp_path / "now")
    folder = save(tmp_path / "hub", extras_from=early)
    assert {path.name for path in early.iterdir()} <= {path.name for path in folder.iterdir()}
    one, two = (load_tokenizer(each, CONFIG.vocab_size) for each in (folder, now))
    text = "नमस्ते, hello"
    assert Prompts(one, CONFIG).before("de", "transcribe", False) == Prompts(two, CONFIG).before(
        "de", "transcribe", False
    )
    assert Prompts(one, CONFIG).text(text) == Prompts(two, CONFIG).text(text)
    assert one.english_spelling_normalizer == {"colour": "color"}
    said = [
        json.loads((each / "generation_config.json").read_text())
        for each in (folder, save(tmp_path / "b", extras_from=now))
    ]
    assert said[0] == said[1]
