"""Llama-2's two layouts against transformers and against Meta's own arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import weights
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.parallel.placement import placements
from mindspeed_model_core.weights.layout import HeadPermute
from mindspeed_model_core.weights.source import whole
from mindspeed_model_llama2 import MODEL, Llama2
from mindspeed_model_llama2.config import PRESETS, Llama2Config
from mindspeed_model_llama2.weights import LAYOUTS, ffn_args, ffn_size, original_cut, original_shards
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

MHA, GQA = 4, 2
LAYERS, WIDTH, FFN, HEADS, VOCAB = 2, 64, 176, 4, 96


def hub_model(kv: int) -> LlamaForCausalLM:
    """transformers' network with every parameter random, in bf16."""
    torch.manual_seed(kv)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
    )
    net = LlamaForCausalLM(config)
    for p in net.parameters():
        torch.nn.init.normal_(p)
    return net.bfloat16()


def our_config(kv: int) -> Llama2Config:
    return Llama2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv,
        max_position_embeddings=128,
    )


@pytest.fixture(params=[MHA, GQA], ids=["mha", "gqa"])
def kv(request: Any) -> int:
    return request.param


@pytest.fixture
def hub(kv: int, tmp_path: Path) -> Path:
    folder = tmp_path / "hub"
    hub_model(kv).save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").is_file()
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def loaded(source: Path, kv: int) -> dict[str, Tensor]:
    net = Llama2(our_config(kv)).bfloat16()
    weights.load(net, source, MODEL)
    return {name: p.detach() for name, p in net.named_parameters()}


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Row r of a head in Meta's order, by index: even rows are the first half of transformers' head, odd the second."""
    rows = []
    for start in range(0, len(weight), head_dim):
        for r in range(head_dim):
            rows.append(weight[start + r // 2 + (head_dim // 2 if r % 2 else 0)])
    return torch.stack(rows)


def test_our_names_hold_transformers_tensors(hub: Path, kv: int) -> None:
    ours, theirs = loaded(hub, kv), tensors(hub)
    layer = "model.layers.1."
    want = torch.cat([theirs[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(ours["blocks.1.attention.qkv.weight"], want)
    want = torch.cat([theirs[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")])
    assert torch.equal(ours["blocks.1.mlp.gate_up.weight"], want)
    assert torch.equal(ours["blocks.1.input_norm.weight"], theirs[f"{layer}input_layernorm.weight"])
    assert torch.equal(ours["blocks.1.post_attention_norm.weight"], theirs[f"{layer}post_attention_layernorm.weight"])


@pytest.mark.parametrize("shards", [1, 2])
def test_round_trip_is_exact(hub: Path, kv: int, tmp_path: Path, shards: int) -> None:
    weights.convert(hub, tmp_path / "original", MODEL, "original", shards=shards)
    assert len(list((tmp_path / "original").glob("*.pth"))) == shards
    weights.convert(tmp_path / "original", tmp_path / "back", MODEL, "hub")
    assert equal(tensors(hub), tensors(tmp_path / "back"))
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"pieces"
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    one, two = loaded(hub, kv), loaded(tmp_path / "original", kv)
    assert equal(one, two)
    weights.convert(tmp_path / "back", tmp_path / "again", MODEL, "original", shards=shards)
    for file in (tmp_path / "original").glob("*.pth"):
        assert equal(torch.load(file), torch.load(tmp_path / "again" / file.name))


def test_original_files_are_metas(hub: Path, kv: int, tmp_path: Path) -> None:
    weights.convert(hub, tmp_path / "original", MODEL, "original", shards=2)
    theirs, shards = tensors(hub), [torch.load(tmp_path / f"original/consolidated.0{i}.pth") for i in (0, 1)]
    whole = {}
    for name in shards[0]:
        dim = original_cut(name)
        whole[name] = shards[0][name] if dim is None else torch.cat([s[name] for s in shards], dim)
        assert dim is not None or torch.equal(shards[0][name], shards[1][name])
    # fairscale's layers: column parallel ones share out rows, row parallel ones and the embedding columns.
    cuts = {"tok_embeddings": 1, "norm": None, "output": 0, "attention_norm": None, "ffn_norm": None}
    cuts |= {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "freqs": None}
    assert {name: original_cut(name) for name in shards[0]} == {
        name: cuts[name.removesuffix(".weight").rpartition(".")[2]] for name in shards[0]
    }
    want = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    for i in range(LAYERS):
        parts = {"attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj"}
        parts |= {f"feed_forward.w{n}": f"mlp.{x}_proj" for n, x in ((1, "gate"), (2, "down"), (3, "up"))}
        parts |= {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        want |= {f"layers.{i}.{a}": f"model.layers.{i}.{b}" for a, b in parts.items()}
    for ours, name in want.items():
        assert torch.equal(whole.pop(f"{ours}.weight"), theirs[f"{name}.weight"])
    for i in range(LAYERS):
        for a, b in (("wq", "q_proj"), ("wk", "k_proj")):
            rows = interleaved(theirs[f"model.layers.{i}.self_attn.{b}.weight"], WIDTH // HEADS)
            assert torch.equal(whole.pop(f"layers.{i}.attention.{a}.weight"), rows)
    freqs = whole.pop("rope.freqs")
    assert not whole
    head = WIDTH // HEADS
    exact = torch.tensor([1e4 ** (-2 * i / head) for i in range(head // 2)])
    assert torch.allclose(freqs.float(), exact, 4e-3)
    params = json.loads((tmp_path / "original/params.json").read_text())
    assert ffn_size(WIDTH, params["multiple_of"], params.get("ffn_dim_multiplier")) == FFN
    assert params.get("n_kv_heads") == (None if kv == HEADS else kv)
    assert sum(f.numel() for f in shards[0].values()) < sum(t.numel() for t in theirs.values()) * 0.52


def test_metas_rotation_of_its_rows_is_ours_of_ours() -> None:
    """Scores q.k after Meta's complex rotation equal those after transformers' rotate_half, rows permuted."""
    head, length = 8, 5
    torch.manual_seed(0)
    x, q, k = torch.randn(length, 16).double(), torch.randn(head, 16).double(), torch.randn(head, 16).double()
    angle = torch.outer(torch.arange(length), 1e4 ** (-torch.arange(0, head, 2).double() / head))

    def metas(weight: Tensor) -> Tensor:
        pairs = torch.view_as_complex((x @ weight.T).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    def ours(weight: Tensor) -> Tensor:
        a, b = (x @ HeadPermute(head).join(weight).T).chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    assert torch.allclose(metas(q) @ metas(k).T, ours(q) @ ours(k).T)


@pytest.mark.parametrize("layout", ["hub", "original"])
@pytest.mark.parametrize("tp", [2, 4])
def test_slices_are_slices_of_the_whole(hub: Path, kv: int, tmp_path: Path, layout: str, tp: int) -> None:
    if kv % tp:
        kv_error = "tp=4 does not divide 2"
        with pytest.raises(ValueError, match=kv_error):
            weights.load(Llama2(our_config(kv)), hub, MODEL, tp=tp, write=lambda *_: None)
        return
    source = hub
    if layout == "original":
        source = tmp_path / "original"
        weights.convert(hub, source, MODEL, "original", shards=2)
    whole, net = loaded(hub, kv), Llama2(our_config(kv)).bfloat16()
    for rank in range(tp):
        got: dict[str, Tensor] = {}
        weights.load(net, source, MODEL, tp_rank=rank, tp=tp, write=got.__setitem__)
        for name, place in placements(net):
            assert torch.equal(got[name], place.narrow(whole[name], rank, tp)), name
            assert place.dim is None or got[name].numel() * tp == whole[name].numel()


def test_export_loads_in_transformers(hub: Path, kv: int, tmp_path: Path) -> None:
    net = Llama2(our_config(kv)).bfloat16()
    weights.load(net, hub, MODEL)
    weights.save(net.named_parameters(), net.config, LAYOUTS[0], tmp_path / "out", shard_bytes=100_000, extras_from=hub)
    theirs, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    reference = hub_model(kv)
    assert equal(dict(theirs.state_dict()), dict(reference.state_dict()))
    assert theirs.dtype == torch.bfloat16
    mine, its = theirs.config.to_dict(), LlamaConfig.from_pretrained(hub).to_dict()
    skip = ("transformers_version", "_name_or_path", "torch_dtype")
    assert {k: v for k, v in mine.items() if k not in skip} == {k: v for k, v in its.items() if k not in skip}
    assert (tmp_path / "out" / "tokenizer.model").is_file() and (tmp_path / "out" / "generation_config.json").is_file()
    assert weights.read_config(tmp_path / "out", MODEL) == our_config(kv)


def test_old_folders_are_read(hub: Path, kv: int) -> None:
    """config.json of transformers 4: rope_theta beside rope_scaling; rotary frequencies stored in each layer."""
    config = json.loads((hub / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"], config["dtype"]
    config |= {"rope_theta": 5000.0, "rope_scaling": None, "torch_dtype": "float16"}
    (hub / "config.json").write_text(json.dumps(config))
    assert weights.read_config(hub, MODEL) == our_config(kv).model_copy(update={"rope_theta": 5000.0})
    index = json.loads((hub / "model.safetensors.index.json").read_text())
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({key: torch.zeros(8)}, hub / "old.safetensors")
    index["weight_map"][key] = "old.safetensors"
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    net = Llama2(our_config(kv).model_copy(update={"rope_theta": 5000.0}))
    weights.load(net, hub, MODEL)
    with pytest.raises(UserError, match=r"rope_theta=5000\.0 here, but this network has rope_theta=10000\.0"):
        weights.load(Llama2(our_config(kv)), hub, MODEL)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("tie_word_embeddings", True),
        ("hidden_act", "gelu"),
        ("model_type", "mistral"),
        ("head_dim", 32),
        ("eos_token_id", [1, 2]),
        ("hidden_size", None),
        ("vocab_size", None),
        ("num_attention_heads", 7),
    ],
)
def test_settings_llama2_does_not_have_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    LAYOUTS[0].write_config(PRESETS["tiny"], tmp_path, torch.bfloat16)
    assert LAYOUTS[0].read_config(tmp_path) == PRESETS["tiny"]
    config = json.loads((tmp_path / "config.json").read_text())
    config[key] = value
    if value is None:
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json: .*{key}") as error:
        LAYOUTS[0].read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_params_json(hub: Path, kv: int, tmp_path: Path) -> None:
    out = tmp_path / "original"
    weights.convert(hub, out, MODEL, "original")
    params = json.loads((out / "params.json").read_text())

    def read(**change: Any) -> Any:
        fields = {k: v for k, v in {**params, **change}.items() if v is not None}
        (out / "params.json").write_text(json.dumps(fields))
        return weights.read_config(out, MODEL)

    # Meta publishes vocab_size -1; max_position_embeddings is not in the release.
    assert read(vocab_size=-1) == our_config(kv).model_copy(update={"max_position_embeddings": 4096})
    for change, message in (
        ({"vocab_size": 97}, "vocab_size=97, but tok_embeddings.weight has 96 rows"),
        ({"dim": 128}, "hold 64 of params.json's dim=128; 2 files make it whole"),
        ({"n_layers": 0}, "n_layers=0: expected a positive whole number"),
        ({"use_scaled_rope": True}, "use_scaled_rope=True is not supported"),
        ({"n_heads": 3}, "params.json: hidden_size=64 does not divide by num_attention_heads=3"),
    ):
        with pytest.raises(UserError, match=message):
            read(**change)
    read()
    with pytest.raises(UserError, match="missing key 'layers.2"):
        read(n_layers=3)
        weights.load(Llama2(our_config(kv).model_copy(update={"num_hidden_layers": 3})), out, MODEL)
    with pytest.raises(UserError, match=f"shards=3: num_key_value_heads={kv} does not divide"):
        weights.convert(hub, tmp_path / "x", MODEL, "original", shards=3)


def test_what_a_release_cannot_say_comes_from_its_preset(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Llama2(PRESETS["tiny"])
    weights.save(net.named_parameters(), net.config, LAYOUTS[1], tmp_path / "tiny")
    assert weights.read_config(tmp_path / "tiny", MODEL) == PRESETS["tiny"]
    weights.load(Llama2(PRESETS["tiny"]), tmp_path / "tiny", MODEL)
    with pytest.raises(UserError, match="but preset '7b' has vocab_size=32000; the folder holds preset 'tiny'"):
        weights.convert(tmp_path / "tiny", tmp_path / "x", MODEL, "hub", preset="7b")


def test_published_sizes() -> None:
    """Each preset binds to all tensors of the release, in the published number of files and feed-forward terms."""
    counts: dict[str, Any] = {"7b": (1, 291, {"multiple_of": 256}), "13b": (2, 363, {"multiple_of": 256})}
    counts["70b"] = (8, 723, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3})
    for name, (files, total, ffn) in counts.items():
        config = PRESETS[name]
        assert original_shards(config, None) == files
        assert ffn_args(config.hidden_size, config.intermediate_size) == ffn
        shapes, _ = whole(Llama2, config)
        for layout in LAYOUTS:
            bounds = layout.table(config).bind(shapes)
            assert sum(len(b.parts) for b in bounds.values()) == total
    for dim, size in ((64, 96), (64, 177), (100, 999), (2048, 5632)):
        assert ffn_size(dim, **ffn_args(dim, size)) == size


@pytest.mark.parametrize("config", [{}, {"model_type": "mistral", "hidden_size": 64}])
def test_a_folder_that_is_not_llamas_is_never_overwritten(tmp_path: Path, config: dict[str, Any]) -> None:
    source, thesis = tmp_path / "source", tmp_path / "work" / "thesis" / "main.tex"
    hub_model(GQA).save_pretrained(source)
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    (tmp_path / "work" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="work: holds no weights in layout hub .*model_type"):
        weights.convert(source, tmp_path / "work", MODEL, "original", overwrite=True)
    (tmp_path / "work" / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(UserError, match=r"work: holds no weights in layout hub .*model\.safetensors"):
        weights.convert(source, tmp_path / "work", MODEL, "original", overwrite=True)
    (tmp_path / "work" / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="work: also holds thesis, which is no part of layout hub"):
        weights.convert(source, tmp_path / "work", MODEL, "original", overwrite=True)
    assert thesis.read_text() == "years of work"
