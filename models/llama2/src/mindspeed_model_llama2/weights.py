"""Llama-2's weight tables: the hub's layout (transformers) and Meta's original release."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import torch
from mindspeed_model_core.data.tokenizer import ALL_FILES as TOKENIZER_FILES
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.files import read_json, write_json
from mindspeed_model_core.recipe import validate
from mindspeed_model_core.weights.layout import PEFT, Cat, HeadPermute, Layout, Row, Same, Table
from mindspeed_model_core.weights.pth import Consolidated
from mindspeed_model_core.weights.tensorfile import Safetensors
from torch import Tensor

from .config import PRESETS, Llama2Config
from .model import Llama2


def _heads(config: Llama2Config) -> tuple[int, int, int]:
    kv = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, kv, kv


# ------------------------------------------------------------------------------------------------ hub


def hub_table(config: Llama2Config) -> Table:
    """Return the table of transformers' LlamaForCausalLM."""
    block, attention = "model.layers.*.", "model.layers.*.self_attn."
    return Table(
        Row("embed_tokens.weight", "model.embed_tokens.weight"),
        Row("blocks.*.input_norm.weight", block + "input_layernorm.weight"),
        Row(
            "blocks.*.attention.qkv.weight",
            (attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"),
            Cat(sizes=_heads(config)),
        ),
        Row("blocks.*.attention.out.weight", attention + "o_proj.weight"),
        Row("blocks.*.post_attention_norm.weight", block + "post_attention_layernorm.weight"),
        Row("blocks.*.mlp.gate_up.weight", (block + "mlp.gate_proj.weight", block + "mlp.up_proj.weight"), Cat()),
        Row("blocks.*.mlp.down.weight", block + "mlp.down_proj.weight"),
        Row("norm.weight", "model.norm.weight"),
        Row("head.weight", "lm_head.weight"),
        # Folders made by transformers before 4.32 also hold the rotary frequencies, which follow from the config.
        ignore=(attention + "rotary_emb.inv_freq",),
    )


# What transformers assumes where an old config.json is silent; a config.json it writes says all of them.
_HUB_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Settings of LlamaConfig that this network does not have, and the one value of each that it is written for.
_HUB_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "quantization_config": None,
}


def read_hub_config(folder: Path) -> Llama2Config:
    """Read config.json as old or new transformers writes it; UserError names a setting Llama-2 does not have."""
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "llama":
        raise UserError(f"{path}: model_type={raw.get('model_type')!r} is not supported, Llama-2 has 'llama'")
    for key, value in _HUB_FIXED.items():
        if raw.get(key, value) != value:
            raise UserError(f"{path}: {key}={raw[key]!r} is not supported, Llama-2 has {key}={value!r}")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    for key, part in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(part, dict):
            raise UserError(f"{path}: {key}={part!r}: expected an object or null")
        kind = part.get("rope_type", part.get("type", "default"))
        if kind != "default":
            raise UserError(f"{path}: {key}={part!r} is not supported, Llama-2 has no scaled rotary embedding")
    values = {k: raw[k] for k in Llama2Config.model_fields if raw.get(k) is not None}
    values = {**_HUB_DEFAULTS, **values}
    values["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    values.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    if isinstance(raw.get("eos_token_id"), list):
        raise UserError(f"{path}: eos_token_id={raw['eos_token_id']!r}: Llama-2 has one end token")
    if "vocab_size" not in raw:
        raise UserError(f"{path}: vocab_size: this field is required")
    config = validate(Llama2Config, values, str(path))  # type: ignore[type-var]
    if raw.get("head_dim") not in (None, config.head_dim):
        raise UserError(
            f"{path}: head_dim={raw['head_dim']!r} is not supported, "
            f"Llama-2 has hidden_size / num_attention_heads = {config.head_dim}"
        )
    return config


def write_hub_config(config: Llama2Config, folder: Path, dtype: torch.dtype) -> None:
    """Write a config.json that transformers 4 and 5 read alike: each finds the rotary base and dtype under its name."""
    name = str(dtype).removeprefix("torch.")
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **config.model_dump(),
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "tie_word_embeddings": False,
            "use_cache": True,
            "torch_dtype": name,
            "dtype": name,
        },
    )


HUB = Layout(
    name="hub",
    describe="config.json with model.safetensors",
    build=Llama2,
    table=hub_table,
    detect=lambda folder: (folder / "config.json").is_file(),
    read_config=read_hub_config,
    write_config=write_hub_config,
    files=Safetensors(),
    loose=("max_position_embeddings", "initializer_range"),
    extras=(*TOKENIZER_FILES, "generation_config.json"),
    adapter=PEFT,
)

# ------------------------------------------------------------------------------------------------ original


def original_table(config: Llama2Config) -> Table:
    """Return the table of Meta's release; its rotary embedding turns neighbouring rows of q and k, ours the halves."""
    block, attention = "layers.*.", "layers.*.attention."
    turn = HeadPermute(config.head_dim)
    return Table(
        Row("embed_tokens.weight", "tok_embeddings.weight"),
        Row("blocks.*.input_norm.weight", block + "attention_norm.weight"),
        Row(
            "blocks.*.attention.qkv.weight",
            (attention + "wq.weight", attention + "wk.weight", attention + "wv.weight"),
            Cat(sizes=_heads(config), ops=(turn, turn, Same())),
        ),
        Row("blocks.*.attention.out.weight", attention + "wo.weight"),
        Row("blocks.*.post_attention_norm.weight", block + "ffn_norm.weight"),
        Row("blocks.*.mlp.gate_up.weight", (block + "feed_forward.w1.weight", block + "feed_forward.w3.weight"), Cat()),
        Row("blocks.*.mlp.down.weight", block + "feed_forward.w2.weight"),
        Row("norm.weight", "norm.weight"),
        Row("head.weight", "output.weight"),
        ignore=("rope.freqs",),
    )


_CUTS = {
    "tok_embeddings.weight": 1,
    "output.weight": 0,
    "layers.*.attention.w[qkv].weight": 0,
    "layers.*.attention.wo.weight": 1,
    "layers.*.feed_forward.w[13].weight": 0,
    "layers.*.feed_forward.w2.weight": 1,
}


def original_cut(name: str) -> int | None:
    """Return the dim along which the release's files share a tensor out, None: each holds all of it."""
    return next((dim for pattern, dim in _CUTS.items() if fnmatch.fnmatchcase(name, pattern)), None)


def original_shards(config: Llama2Config, shards: int | None) -> int:
    """Return the number of files: as published for a published size, otherwise 1, unless it is given."""
    published = {"7b": 1, "13b": 2, "70b": 8}
    if shards is None:
        size = (config.hidden_size, config.num_hidden_layers)
        match = (n for p, n in published.items() if (PRESETS[p].hidden_size, PRESETS[p].num_hidden_layers) == size)
        return next(match, 1)
    if shards < 1 or config.num_key_value_heads % shards:
        raise UserError(f"shards={shards}: num_key_value_heads={config.num_key_value_heads} does not divide by it")
    return shards


_FILES = Consolidated(original_cut)


def read_original_config(folder: Path) -> Llama2Config:
    """Read params.json; the vocabulary and feed-forward sizes, which it does not state, come from the tensors."""
    path = folder / "params.json"
    raw = read_json(path)
    known = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
    for key in sorted(raw.keys() - known - {"rope_theta", "max_batch_size", "max_seq_len"}):
        raise UserError(f"{path}: {key}={raw[key]!r} is not supported (known: {', '.join(sorted(known))}, rope_theta)")
    for key in ("dim", "n_layers", "n_heads"):
        if not isinstance(raw.get(key), int) or raw[key] < 1:
            raise UserError(f"{path}: {key}={raw.get(key)!r}: expected a positive whole number")
    tensors = _FILES.open(folder)
    shapes = {}
    for key in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if key not in tensors.slots:
            raise UserError(f"{folder / 'consolidated.00.pth'}: missing key {key!r}")
        shapes[key] = tensors.shape(key)
    vocab, dim = shapes["tok_embeddings.weight"]
    files = len(tensors.slots["tok_embeddings.weight"][0])
    if dim != raw["dim"]:
        whole = f"{raw['dim'] // dim * files} files make it whole"
        hint = whole if raw["dim"] % dim == 0 else "they do not go together"
        raise UserError(f"{folder}: {files} consolidated file(s) hold {dim} of {path.name}'s dim={raw['dim']}; {hint}")
    if raw.get("vocab_size", -1) not in (-1, vocab):
        raise UserError(f"{path}: vocab_size={raw['vocab_size']!r}, but tok_embeddings.weight has {vocab} rows")
    values = {
        "vocab_size": vocab,
        "hidden_size": raw["dim"],
        "intermediate_size": shapes["layers.0.feed_forward.w1.weight"][0],
        "num_hidden_layers": raw["n_layers"],
        "num_attention_heads": raw["n_heads"],
        "num_key_value_heads": raw["n_heads"] if raw.get("n_kv_heads") is None else raw["n_kv_heads"],
        "rms_norm_eps": raw.get("norm_eps", 1e-5),
        "rope_theta": raw.get("rope_theta", 10000.0),
    }
    return validate(Llama2Config, values, str(path))  # type: ignore[type-var]


def write_original_config(config: Llama2Config, folder: Path, dtype: torch.dtype) -> None:
    """Write params.json with the fields Meta's ModelArgs takes, in Meta's way of giving the feed-forward size."""
    raw: dict[str, Any] = {"dim": config.hidden_size, **ffn_args(config.hidden_size, config.intermediate_size)}
    raw["n_heads"] = config.num_attention_heads
    if config.num_key_value_heads != config.num_attention_heads:
        raw["n_kv_heads"] = config.num_key_value_heads
    raw |= {"n_layers": config.num_hidden_layers, "norm_eps": config.rms_norm_eps, "vocab_size": config.vocab_size}
    if config.rope_theta != 10000.0:
        raw["rope_theta"] = config.rope_theta
    write_json(folder / "params.json", raw)


def ffn_size(dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None) -> int:
    """Return the feed-forward size Meta's reference derives (llama/model.py, FeedForward)."""
    size = int(2 * 4 * dim / 3)
    if ffn_dim_multiplier is not None:
        size = int(ffn_dim_multiplier * size)
    return multiple_of * -(-size // multiple_of)


def ffn_args(dim: int, size: int) -> dict[str, Any]:
    """Return the ``multiple_of`` and ``ffn_dim_multiplier`` from which ``ffn_size`` gives ``size``."""
    steps = (256, 4096, 2048, 1024, 512, 128, 64, 32, 16, 8, 4, 2, 1)
    for times in (None, 1.3):
        # 70B was published with the largest step that fits, the smaller sizes with 256.
        for step in steps if times is None else sorted(steps, reverse=True):
            if ffn_size(dim, step, times) == size:
                return {"multiple_of": step} | ({"ffn_dim_multiplier": times} if times else {})
    return {"multiple_of": 1, "ffn_dim_multiplier": (size + 0.5) / int(2 * 4 * dim / 3)}


def original_extra(config: Llama2Config, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return ``rope.freqs``, which the release's files hold: theta^(-2i / head_dim), computed in fp32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return {"rope.freqs": (1.0 / config.rope_theta**exponent).to(dtype)}


ORIGINAL = Layout(
    name="original",
    describe="params.json with consolidated.00.pth",
    build=Llama2,
    table=original_table,
    detect=lambda folder: (folder / "params.json").is_file() or (folder / "consolidated.00.pth").is_file(),
    read_config=read_original_config,
    write_config=write_original_config,
    files=_FILES,
    silent=("max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id"),
    extra=original_extra,
    extras=TOKENIZER_FILES,
    config_file="params.json",
    shards=original_shards,
)

LAYOUTS = (HUB, ORIGINAL)
