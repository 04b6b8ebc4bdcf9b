"""Whisper's weight tables: the hub's layout (transformers) and OpenAI's release."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from mindspeed_model_core.data.tokenizer import ALL_FILES as TOKENIZER_FILES
from mindspeed_model_core.data.tokenizer import has_tokenizer, load_tokenizer
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.files import read_json, write_json
from mindspeed_model_core.recipe import validate
from mindspeed_model_core.weights.layout import PEFT, Cat, Layout, Op, Reshape, Row, Same, Source, Table
from mindspeed_model_core.weights.pth import TorchFile, read_pth
from mindspeed_model_core.weights.tensorfile import Reader, Safetensors, Spec, Writer
from torch import Tensor

from .config import PRESETS, WhisperConfig
from .data import Prompts
from .model import Whisper, sinusoids

HUB_FEATURES, GENERATION = "preprocessor_config.json", "generation_config.json"

# Our modules with weight and bias, and their names in the hub's layout and in the release; in blocks, after a prefix.
_ENDS = {
    "audio.conv1": ("model.encoder.conv1", "encoder.conv1"),
    "audio.conv2": ("model.encoder.conv2", "encoder.conv2"),
    "norm": ("model.decoder.layer_norm", "decoder.ln"),
}
_BLOCK = {
    "attention_norm": ("self_attn_layer_norm", "attn_ln"),
    "attention.out": ("self_attn.out_proj", "attn.out"),
    "mlp_norm": ("final_layer_norm", "mlp_ln"),
    "mlp.up": ("fc1", "mlp.0"),
    "mlp.down": ("fc2", "mlp.2"),
}
_CROSS = {
    "cross_norm": ("encoder_attn_layer_norm", "cross_attn_ln"),
    "cross_attention.q": ("encoder_attn.q_proj", "cross_attn.query"),
    "cross_attention.out": ("encoder_attn.out_proj", "cross_attn.out"),
}
# Those that stack projections, each named after the stem; keys have no bias.
_STACKS = {"attention.qkv": ("self_attn.", "attn.", "qkv")}
_CROSS_STACKS = {"cross_attention.kv": ("encoder_attn.", "cross_attn.", "kv")}
_LETTERS = ({"q": "q_proj", "k": "k_proj", "v": "v_proj"}, {"q": "query", "k": "key", "v": "value"})
_PLAIN = {
    "embed_tokens.weight": ("model.decoder.embed_tokens.weight", "decoder.token_embedding.weight"),
    "positions.weight": ("model.decoder.embed_positions.weight", "decoder.positional_embedding"),
}
_FINAL = ("model.encoder.layer_norm", "encoder.ln_post")
_PREFIXES = (("model.encoder.layers.", "model.decoder.layers."), ("encoder.blocks.", "decoder.blocks."))
_SINUSOIDS = ("model.encoder.embed_positions.weight", "encoder.positional_embedding")
_HUB, _ORIGINAL = 0, 1


def _rows(config: WhisperConfig, which: int) -> Iterator[Row]:
    yield from _layers(_ENDS, which, config)
    for ours, theirs in _PLAIN.items():
        yield Row(ours, theirs[which])
    count = config.encoder_layers
    yield from _layers({f"blocks.{count - 1}.final_norm": _FINAL}, which, config)
    for number in range(count + config.decoder_layers):
        # Theirs count the decoder's blocks anew.
        decoder = number >= count
        prefix = f"{_PREFIXES[which][decoder]}{number - count * decoder}."
        layers, stacks = ({**_BLOCK, **_CROSS}, {**_STACKS, **_CROSS_STACKS}) if decoder else (_BLOCK, _STACKS)
        named = {f"blocks.{number}.{ours}": (prefix + hub, prefix + release) for ours, (hub, release) in layers.items()}
        yield from _layers(named, which, config)
        for ours, (*stems, kinds) in stacks.items():
            names = [f"{prefix}{stems[which]}{_LETTERS[which][kind]}" for kind in kinds]
            biased = tuple(f"{name}.bias" for name, kind in zip(names, kinds, strict=True) if kind != "k")
            yield Row(f"blocks.{number}.{ours}.weight", tuple(f"{name}.weight" for name in names), Cat())
            yield Row(f"blocks.{number}.{ours}.bias", biased, Cat())


def _layers(named: Mapping[str, tuple[str, str]], which: int, config: WhisperConfig) -> Iterator[Row]:
    for ours, theirs in named.items():
        for leaf in ("weight", "bias"):
            yield Row(f"{ours}.{leaf}", f"{theirs[which]}.{leaf}", _kernel(f"{ours}.{leaf}", config))


def _kernel(ours: str, config: WhisperConfig) -> Op:
    """Return how a convolution's kernel becomes our matrix."""
    wide = {"audio.conv1.weight": config.num_mel_bins, "audio.conv2.weight": config.d_model}.get(ours)
    return Same() if wide is None else Reshape((config.d_model, wide, 3), (config.d_model, 3 * wide))


def _check_sinusoids(tensors: Source, name: str, config: WhisperConfig) -> None:
    """Raise UserError unless a folder's audio positions are the fixed ones, which this network computes."""
    if name not in tensors.names():
        return
    found = tensors.read(name)
    want = sinusoids(config.max_source_positions, config.d_model)
    # Where they were computed, an angle of 1500 may have been rounded another way.
    near = max(2e-3, torch.finfo(found.dtype).eps)
    if found.shape != want.shape or not torch.allclose(found.float(), want, rtol=0, atol=near):
        raise UserError(
            f"{tensors.where(name)}: {name}: not the sinusoids of {config.max_source_positions} positions, "
            f"{config.d_model} wide, which Whisper does not train"
        )


# ------------------------------------------------------------------------------------------------ hub


def hub_table(config: WhisperConfig) -> Table:
    """Return the table of transformers' WhisperForConditionalGeneration."""
    # Some folders repeat the tied head.
    return Table(*_rows(config, _HUB), ignore=("proj_out.weight", _SINUSOIDS[_HUB]))


# Settings of transformers' WhisperConfig that this network does not have, and the one value of each that it has.
_HUB_FIXED: dict[str, Any] = {
    "activation_function": "gelu",
    "scale_embedding": False,
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "apply_spec_augment": False,
    "quantization_config": None,
}


def read_hub_config(folder: Path) -> WhisperConfig:
    """Read config.json; UserError names a setting Whisper does not have here, or positions it does not compute."""
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "whisper":
        raise UserError(f"{path}: model_type={raw.get('model_type')!r} is not supported, Whisper has 'whisper'")
    for key, value in _HUB_FIXED.items():
        if raw.get(key, value) != value:
            raise UserError(f"{path}: {key}={raw[key]!r} is not supported, expected {value!r}")
    values = {key: raw[key] for key in WhisperConfig.model_fields if raw.get(key) is not None}
    for key in ("vocab_size", "num_mel_bins"):
        if key not in values:
            raise UserError(f"{path}: {key}: this field is required")
    config = validate(WhisperConfig, values, str(path))  # type: ignore[type-var]
    _check_sinusoids(Safetensors().open(folder), _SINUSOIDS[_HUB], config)
    return config


def write_hub_config(config: WhisperConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write a config.json that transformers reads."""
    name = str(dtype).removeprefix("torch.")
    write_json(
        folder / "config.json",
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            **config.model_dump(),
            **{key: value for key, value in _HUB_FIXED.items() if value is not None},
            "num_hidden_layers": config.encoder_layers,
            "use_cache": True,
            "torch_dtype": name,
            "dtype": name,
        },
    )


def complete_hub(config: WhisperConfig, folder: Path) -> None:
    """Write what follows from configuration and tokenizer, where it did not come along: of features and of generation.

    UserError for a generation_config.json that is damaged, or lacks some of it and goes with other weights.
    """
    path = folder / GENERATION
    if has_tokenizer(folder):
        try:
            if not path.exists():
                write_json(path, generation_settings(load_tokenizer(folder), config))
            elif not _is_complete(read_json(path), config):
                write_json(path, read_generation(path, generation_settings(load_tokenizer(folder), config), config))
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}/", "")) from None  # that folder is a draft
    path = folder / HUB_FEATURES
    if path.exists():
        return
    length = config.frames // 100
    write_json(
        path,
        {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": config.num_mel_bins,
            "sampling_rate": 16000,
            "hop_length": 160,
            "n_fft": 400,
            "chunk_length": length,
            "n_samples": 16000 * length,
            "nb_max_frames": config.frames,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": False,
        },
    )


def generation_settings(tokenizer: Any, config: WhisperConfig) -> dict[str, Any]:
    """Return a generation_config.json's values, which follow from tokenizer and sizes; UserError if it is another's."""
    prompts = Prompts(tokenizer, config)
    start, end = config.decoder_start_token_id, config.eos_token_id
    silent = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|nocaptions|>"]
    settings: dict[str, Any] = {
        "decoder_start_token_id": start,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": end,
        "pad_token_id": config.pad_token_id,
        "no_timestamps_token_id": prompts.token("<|notimestamps|>"),
        "max_initial_timestamp_index": 50,
        "max_length": config.max_target_positions,
        "return_timestamps": False,
        "is_multilingual": config.multilingual,
        "suppress_tokens": sorted({start, *(prompts.known[name] for name in silent if name in prompts.known)}),
        "begin_suppress_tokens": [*tokenizer.encode(" ", add_special_tokens=False)[:1], end],
    }
    if "<|startofprev|>" in prompts.known:
        settings["prev_sot_token_id"] = prompts.known["<|startofprev|>"]
    if config.multilingual:
        settings["lang_to_id"] = prompts.languages
        settings["task_to_id"] = {name: prompts.token(f"<|{name}|>") for name in ("transcribe", "translate")}
    return settings


_FOLLOW = ("decoder_start_token_id", "eos_token_id", "no_timestamps_token_id", "prev_sot_token_id", "is_multilingual")
"""What a generation_config.json cannot say otherwise than tokenizer and sizes do."""
_ASKED, _MAPS = ("no_timestamps_token_id", "is_multilingual"), ("lang_to_id", "task_to_id")
"""What transformers calls a file outdated without; the maps where there are several languages."""
_TOLD = ("forced_decoder_ids", "return_timestamps", "cache_implementation")
"""What transcribing is told, or has in one way: these of a file say nothing."""


def read_generation(path: Path, settings: Mapping[str, Any], config: WhisperConfig) -> dict[str, Any]:
    """Return the settings of a folder's generation_config.json over those that follow from the tokenizer.

    An old file may lack any; UserError names the field of one that goes with other weights.
    """
    found = {key: value for key, value in read_json(path).items() if value is not None and key not in _TOLD}

    def refuse(field: str, value: Any, rule: str) -> UserError:
        return UserError(
            f"{path}: {field}={value!r}: {rule}; take the file that goes with these weights, or remove it, what is "
            "needed follows from the tokenizer"
        )

    for field in _FOLLOW:
        if field in found and field in settings and found.pop(field) != settings[field]:
            raise refuse(field, read_json(path)[field], f"is {settings[field]!r} by the weights and their tokenizer")
    for field in _MAPS:
        given, known = found.pop(field, {}), settings.get(field, {})
        if not isinstance(given, dict):
            raise refuse(field, given, "must be an object of tokens")
        for name, token in given.items():
            if known and known.get(name) != token:
                raise refuse(f"{field}[{name}]", token, f"is {known.get(name)} by the tokenizer")
    for field in ("bos_token_id", "pad_token_id"):
        if field in found and not _is_token(found[field], config):
            raise refuse(field, found[field], f"must be from 0 to {config.vocab_size - 1}")
    for field in ("suppress_tokens", "begin_suppress_tokens"):
        given = found.get(field, [])
        if not isinstance(given, list) or not all(_is_token(each, config) for each in given):
            raise refuse(field, given, f"must be a list of tokens from 0 to {config.vocab_size - 1}")
    most = found.get("max_length", 1)
    if not isinstance(most, int) or not 1 <= most <= config.max_target_positions:
        raise refuse("max_length", most, f"must be from 1 to {config.max_target_positions}")
    return {**settings, **found}


def _is_complete(found: Mapping[str, Any], config: WhisperConfig) -> bool:
    """Tell whether a generation_config.json says what transformers asks of it when it is told language and times."""
    names = (*_ASKED, *(_MAPS if config.multilingual else ()))
    return all(found.get(name) is not None for name in names)


def _is_token(value: Any, config: WhisperConfig) -> bool:
    return type(value) is int and 0 <= value < config.vocab_size


_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")

HUB = Layout(
    name="hub",
    describe="config.json with model.safetensors",
    build=Whisper,
    table=hub_table,
    detect=lambda folder: (folder / "config.json").is_file(),
    read_config=read_hub_config,
    write_config=write_hub_config,
    files=Safetensors(),
    loose=("init_std", *_TOKENS),
    extra=lambda config, dtype: _positions(config, dtype, _HUB),
    extras=(*TOKENIZER_FILES, GENERATION, HUB_FEATURES),
    complete=complete_hub,
    adapter=PEFT,
)


def _positions(config: WhisperConfig, dtype: torch.dtype, which: int) -> dict[str, Tensor]:
    return {_SINUSOIDS[which]: sinusoids(config.max_source_positions, config.d_model).to(dtype)}


# ------------------------------------------------------------------------------------------------ original

_DIMS, _STATE = "dims", "model_state_dict"
_NAMES = {
    "n_mels": "num_mel_bins",
    "n_vocab": "vocab_size",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}


def _release(folder: Path) -> Path:
    """Return the folder's one .pt file; UserError if there are several, each of which is a model."""
    found = sorted(folder.glob("*.pt"))
    if len(found) != 1:
        raise UserError(
            f"{folder}: holds {', '.join(p.name for p in found) or 'no .pt file'}; give a folder with one .pt file"
        )
    return found[0]


@dataclass(frozen=True)
class Release:
    """A folder with one ``.pt`` file: sizes under ``dims``, tensors under ``model_state_dict``."""

    dims: Mapping[str, int] | None = None
    patterns: ClassVar[tuple[str, ...]] = ("*.pt",)

    def open(self, folder: Path) -> Reader:
        """Read where the tensors lie."""
        return TorchFile(_release(folder).name, _STATE).open(folder)

    def create(self, folder: Path, specs: Mapping[str, Spec], *, shards: int = 1, shard_bytes: int = 0) -> Writer:
        """Lay out ``model.pt``."""
        assert self.dims is not None, "the release's file says the sizes"
        return TorchFile("model.pt", _STATE, {_DIMS: dict(self.dims)}).create(folder, specs)


def original_table(config: WhisperConfig) -> Table:
    """Return the table of OpenAI's release; UserError where feed-forward layers are not four times as wide."""
    for name in ("encoder_ffn_dim", "decoder_ffn_dim"):
        if getattr(config, name) != 4 * config.d_model:
            raise UserError(
                f"{name}={getattr(config, name)}: the release's layout has 4 x d_model = {4 * config.d_model} and "
                "cannot say another; use layout hub"
            )
    return Table(*_rows(config, _ORIGINAL), ignore=(_SINUSOIDS[_ORIGINAL],))


def read_original_config(folder: Path) -> WhisperConfig:
    """Read the sizes in the .pt file; ids of special tokens follow from the vocabulary's size."""
    path = _release(folder)
    dims = read_pth(path).get(_DIMS)
    if not isinstance(dims, dict) or set(dims) != set(_NAMES):
        raise UserError(f"{path}: {_DIMS}: expected an object with {', '.join(_NAMES)}")
    if dims["n_audio_state"] != dims["n_text_state"]:
        raise UserError(
            f"{path}: n_audio_state={dims['n_audio_state']} differs from n_text_state={dims['n_text_state']}"
        )
    values: dict[str, Any] = {ours: dims[theirs] for theirs, ours in _NAMES.items()}
    width = values["d_model"]
    if not isinstance(width, int):
        raise UserError(f"{path}: n_audio_state={width!r}: expected a positive whole number")
    values |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 4 * width)
    config = validate(WhisperConfig, {**values, **_ids(path, values["vocab_size"])}, str(path))  # type: ignore[type-var]
    _check_sinusoids(Release().open(folder), _SINUSOIDS[_ORIGINAL], config)
    return config


def _ids(path: Path, vocabulary: Any) -> dict[str, int]:
    """Return the special tokens of a published vocabulary, which its size tells."""
    for preset in PRESETS.values():
        if preset.vocab_size == vocabulary:
            return {name: getattr(preset, name) for name in _TOKENS}
    known = sorted({preset.vocab_size for preset in PRESETS.values()})
    raise UserError(
        f"{path}: n_vocab={vocabulary!r}: of this vocabulary's special tokens nothing is known; known sizes: "
        f"{', '.join(map(str, known))}"
    )


ORIGINAL = Layout(
    name="original",
    describe="one .pt file",
    build=Whisper,
    table=original_table,
    detect=lambda folder: any(folder.glob("*.pt")),
    read_config=read_original_config,
    write_config=lambda config, folder, dtype: None,
    files=Release(),
    files_for=lambda config: Release({theirs: getattr(config, ours) for theirs, ours in _NAMES.items()}),
    silent=("init_std", *_TOKENS),
    extra=lambda config, dtype: _positions(config, dtype, _ORIGINAL),
    config_file="*.pt",
)

LAYOUTS = (HUB, ORIGINAL)
