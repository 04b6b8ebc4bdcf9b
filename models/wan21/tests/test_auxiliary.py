"""The original release's VAE, UMT5 and CLIP become folders that diffusers and transformers load, and go back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mindspeed_model_core import weights
from mindspeed_model_core.cli import app
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing.suite import open_net
from mindspeed_model_core.weights import translation
from mindspeed_model_core.weights.layout import Layout
from mindspeed_model_core.weights.pth import TorchFile
from mindspeed_model_core.weights.source import on_meta, whole
from mindspeed_model_wan21 import MODEL, auxiliary
from mindspeed_model_wan21.auxiliary import (
    IMAGE_HUB,
    IMAGE_ORIGINAL,
    TEXT_HUB,
    TEXT_ORIGINAL,
    VAE_HUB,
    VAE_ORIGINAL,
    ImageConfig,
    TextConfig,
    VaeConfig,
)
from mindspeed_model_wan21.config import Wan21Config
from mindspeed_model_wan21.tiny import write_tiny_encoders
from mindspeed_model_wan21.weights import HUB, complete_hub
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

VAE, TEXT, IMAGE = (layout.name for layout in (VAE_ORIGINAL, TEXT_ORIGINAL, IMAGE_ORIGINAL))
TOKENIZER = "google/umt5-xxl"
PUBLISHED = {
    VAE: VaeConfig(base_dim=96, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temperal_downsample=(False, True, True)),
    TEXT: TextConfig(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        relative_attention_num_buckets=32,
    ),
    IMAGE: ImageConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    ),
}

# ------------------------------------------------------------------------------------------------ originals
# The release's names by substitution, apart from the tables that are tested.

_VAE_NAMES = [
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"mid_block\.resnets\.(\d)\.", lambda m: f"middle.{2 * int(m[1])}."),
    (r"down_blocks", "downsamples"),
    (r"up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}."),
    (r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"upsamples.{4 * int(m[1]) + 3}."),
    (r"(\.\d+)\.norm1\.", r"\1.residual.0."),
    (r"(\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"(\.\d+)\.norm2\.", r"\1.residual.3."),
    (r"(\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"conv_shortcut", "shortcut"),
]
_TEXT_NAMES = [
    (r"^shared", "token_embedding"),
    (r"^encoder\.final_layer_norm", "norm"),
    (r"^encoder\.block\.", "blocks."),
    (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
    (r"layer\.0\.SelfAttention", "attn"),
    (r"layer\.0\.layer_norm", "norm1"),
    (r"layer\.1\.layer_norm", "norm2"),
    (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
    (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"),
    (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2"),
]
_IMAGE_NAMES = [
    (r"^embeddings\.class_embedding", "cls_embedding"),
    (r"^embeddings\.position_embedding\.weight", "pos_embedding"),
    (r"^embeddings\.", ""),
    (r"^pre_layrnorm", "pre_norm"),
    (r"^post_layernorm", "post_norm"),
    (r"^encoder\.layers", "transformer"),
    (r"layer_norm", "norm"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"mlp\.fc1", "mlp.0"),
    (r"mlp\.fc2", "mlp.2"),
    (r"^", "visual."),
]


def renamed(name: str, names: list[tuple[str, Any]]) -> str:
    for pattern, new in names:
        name = re.sub(pattern, new, name)
    return name


def original_image(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in state.items():
        if "q_proj" in name:
            qkv = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            out[renamed(name.replace("self_attn.q_proj", "attn.to_qkv"), _IMAGE_NAMES)] = torch.cat(qkv)
        elif not re.search("[kv]_proj", name):
            lead = 2 if "class_embedding" in name else int("position_embedding" in name)
            out[renamed(name, _IMAGE_NAMES)] = tensor.reshape(*(1,) * lead, *tensor.shape)
    return out


def original(layout: Layout, net: nn.Module) -> dict[str, Tensor]:
    state = {name: parameter.detach() for name, parameter in net.named_parameters()}
    if layout is IMAGE_ORIGINAL:
        return original_image(state)
    names = _VAE_NAMES if layout is VAE_ORIGINAL else _TEXT_NAMES
    return {renamed(name, names): tensor for name, tensor in state.items()}


def random(net: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + 0.05)
    return net.to(dtype).eval()


@pytest.fixture(scope="module")
def nets() -> dict[str, Any]:
    from diffusers import AutoencoderKLWan
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    text = UMT5Config(vocab_size=99, d_model=32, d_kv=4, d_ff=48, num_layers=2, num_heads=6, dropout_rate=0.0)
    image = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    return {
        VAE: random(AutoencoderKLWan(base_dim=8), 1, torch.float32),
        TEXT: random(UMT5EncoderModel(text), 2, torch.bfloat16),
        IMAGE: random(CLIPVisionModel(image), 3, torch.float16),
    }


@pytest.fixture(scope="module")
def release(nets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Wan-AI publishes it, but for the diffusion transformer."""
    folder = tmp_path_factory.mktemp("release")
    for layout in (VAE_ORIGINAL, TEXT_ORIGINAL, IMAGE_ORIGINAL):
        state = original(layout, nets[layout.name])
        if layout is IMAGE_ORIGINAL:
            state |= {
                "visual.head": torch.randn(160, 64).half(),
                "log_scale": torch.tensor(2.6),
                "textual.blocks.0.attn.q.weight": torch.randn(8, 8).half(),
                "textual.token_embedding.weight": torch.randn(9, 8).half(),
            }
        torch.save(state, folder / layout.name)
    tiny = write_tiny_encoders(folder / "tiny", image=False)
    (folder / "google").mkdir()
    (tiny / "tokenizer").rename(folder / TOKENIZER)
    (folder / "xlm-roberta-large").mkdir()
    return folder


@pytest.fixture(scope="module")
def hub(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    translate(release, folder)
    return folder


def translate(source: Path, folder: Path, **options: Any) -> None:
    planned = auxiliary.translate(source, image=(source / IMAGE).exists())
    assert planned is not None
    planned(folder, **options)


def restore(source: Path, folder: Path) -> None:
    planned = auxiliary.restore(source, image=(source / "image_encoder").exists())
    assert planned is not None
    planned(folder)


def link(release: Path, folder: Path, *without: str) -> Path:
    """A release of its own, whose files can be replaced."""
    folder.mkdir()
    for name in (VAE, TEXT, IMAGE, "google"):
        if name not in without:
            (folder / name).symlink_to(release / name)
    return folder


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def load(kind: Any, folder: Path, **dtype: Any) -> Any:
    net, info = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **dtype)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return net.eval()


# ------------------------------------------------------------------------------------------------ as loaded


def test_diffusers_decodes_and_encodes_the_same(nets: dict[str, Any], hub: Path) -> None:
    from diffusers import AutoencoderKLWan

    net = load(AutoencoderKLWan, hub / "vae")
    video = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    with torch.no_grad():
        want = nets[VAE].encode(video).latent_dist.mode()
        assert torch.equal(net.encode(video).latent_dist.mode(), want)
        assert torch.equal(net.decode(want).sample, nets[VAE].decode(want).sample)
    ours, theirs = dict(net.config), dict(nets[VAE].config)
    assert {k: v for k, v in ours.items() if k[0] != "_"} == {k: v for k, v in theirs.items() if k[0] != "_"}


def test_transformers_embeds_the_same(nets: dict[str, Any], hub: Path) -> None:
    from transformers import UMT5EncoderModel

    net = load(UMT5EncoderModel, hub / "text_encoder")
    assert net.dtype == torch.bfloat16 and net.shared.weight is net.encoder.embed_tokens.weight
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    with torch.no_grad():
        want = nets[TEXT](ids, attention_mask=mask).last_hidden_state
        assert torch.equal(net(ids, attention_mask=mask).last_hidden_state, want)


def test_transformers_sees_the_same(nets: dict[str, Any], hub: Path) -> None:
    from transformers import CLIPVisionModel

    net = load(CLIPVisionModel, hub / "image_encoder")
    assert net.dtype == torch.float16 and net.config.projection_dim == 64
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        want = nets[IMAGE].float()(pixels, output_hidden_states=True).hidden_states
        got = net.float()(pixels, output_hidden_states=True).hidden_states
    nets[IMAGE].half()
    assert len(got) == 4 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    names = load_file(hub / "image_encoder" / "model.safetensors").keys()
    assert all(name.startswith("vision_model.") for name in names), "transformers 4 wants the prefix"


def test_with_a_transformer_the_folder_is_a_pipeline(release: Path, tmp_path: Path) -> None:
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

    translate(release, tmp_path)
    config = Wan21Config(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=16,
        in_channels=36,
        text_dim=32,
        image_dim=160,
        freq_dim=16,
    )
    WanTransformer3DModel(**config.model_dump(), added_kv_proj_dim=24).save_pretrained(tmp_path / "transformer")
    complete_hub(config, tmp_path)
    pipeline = WanImageToVideoPipeline.from_pretrained(tmp_path, local_files_only=True)
    ids = pipeline.tokenizer(["a cat"]).input_ids[0]
    assert len(ids) == 7 and pipeline.tokenizer.decode(ids, skip_special_tokens=True) == "a cat"
    assert pipeline.image_processor.crop_size["height"] == 28 and pipeline.image_encoder.config.image_size == 28


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("layout", "theirs", "ours"),
    [
        (VAE_ORIGINAL, "conv1.weight", "quant_conv.weight"),
        (VAE_ORIGINAL, "conv2.bias", "post_quant_conv.bias"),
        (VAE_ORIGINAL, "encoder.conv1.weight", "encoder.conv_in.weight"),
        (VAE_ORIGINAL, "encoder.downsamples.2.resample.1.weight", "encoder.down_blocks.2.resample.1.weight"),
        (VAE_ORIGINAL, "encoder.downsamples.3.shortcut.weight", "encoder.down_blocks.3.conv_shortcut.weight"),
        (VAE_ORIGINAL, "encoder.downsamples.8.time_conv.bias", "encoder.down_blocks.8.time_conv.bias"),
        (VAE_ORIGINAL, "encoder.downsamples.10.residual.6.bias", "encoder.down_blocks.10.conv2.bias"),
        (VAE_ORIGINAL, "encoder.middle.2.residual.3.gamma", "encoder.mid_block.resnets.1.norm2.gamma"),
        (VAE_ORIGINAL, "decoder.middle.1.to_qkv.weight", "decoder.mid_block.attentions.0.to_qkv.weight"),
        (VAE_ORIGINAL, "decoder.head.0.gamma", "decoder.norm_out.gamma"),
        (VAE_ORIGINAL, "decoder.head.2.weight", "decoder.conv_out.weight"),
        (VAE_ORIGINAL, "decoder.upsamples.2.residual.0.gamma", "decoder.up_blocks.0.resnets.2.norm1.gamma"),
        (VAE_ORIGINAL, "decoder.upsamples.3.time_conv.weight", "decoder.up_blocks.0.upsamplers.0.time_conv.weight"),
        (VAE_ORIGINAL, "decoder.upsamples.4.shortcut.weight", "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"),
        (VAE_ORIGINAL, "decoder.upsamples.7.resample.1.bias", "decoder.up_blocks.1.upsamplers.0.resample.1.bias"),
        (VAE_ORIGINAL, "decoder.upsamples.11.resample.1.weight", "decoder.up_blocks.2.upsamplers.0.resample.1.weight"),
        (VAE_ORIGINAL, "decoder.upsamples.14.residual.2.weight", "decoder.up_blocks.3.resnets.2.conv1.weight"),
        (TEXT_ORIGINAL, "token_embedding.weight", "shared.weight"),
        (TEXT_ORIGINAL, "norm.weight", "encoder.final_layer_norm.weight"),
        (TEXT_ORIGINAL, "blocks.23.norm1.weight", "encoder.block.23.layer.0.layer_norm.weight"),
        (
            TEXT_ORIGINAL,
            "blocks.7.pos_embedding.embedding.weight",
            "encoder.block.7.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        (TEXT_ORIGINAL, "blocks.0.ffn.gate.0.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        (TEXT_ORIGINAL, "blocks.0.ffn.fc1.weight", "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"),
        (TEXT_ORIGINAL, "blocks.0.ffn.fc2.weight", "encoder.block.0.layer.1.DenseReluDense.wo.weight"),
        (IMAGE_ORIGINAL, "visual.cls_embedding", "vision_model.embeddings.class_embedding"),
        (IMAGE_ORIGINAL, "visual.pre_norm.weight", "vision_model.pre_layrnorm.weight"),
        (IMAGE_ORIGINAL, "visual.post_norm.bias", "vision_model.post_layernorm.bias"),
        (
            IMAGE_ORIGINAL,
            "visual.transformer.31.attn.to_qkv.bias",
            "vision_model.encoder.layers.31.self_attn.q_proj.bias",
        ),
        (
            IMAGE_ORIGINAL,
            "visual.transformer.0.attn.proj.weight",
            "vision_model.encoder.layers.0.self_attn.out_proj.weight",
        ),
        (IMAGE_ORIGINAL, "visual.transformer.0.mlp.2.weight", "vision_model.encoder.layers.0.mlp.fc2.weight"),
    ],
)
def test_a_name_of_the_release_goes_where_the_pipeline_looks(layout: Layout, theirs: str, ours: str) -> None:
    assert published(layout)[theirs][0] == ours


_HUBS = {VAE: VAE_HUB, TEXT: TEXT_HUB, IMAGE: IMAGE_HUB}
_tables: dict[str, dict[str, tuple[str, ...]]] = {}


def published(layout: Layout) -> dict[str, tuple[str, ...]]:
    """The release's names and the hub's that they become, at the published size."""
    if layout.name not in _tables:
        config = PUBLISHED[layout.name]
        shapes, _ = whole(layout.build, config)
        here, there = (x.table(config).bind(shapes) for x in (layout, _HUBS[layout.name]))
        _tables[layout.name] = {here[n].parts[0].name: tuple(p.name for p in there[n].parts) for n in shapes}
    return _tables[layout.name]


def full_size(name: str) -> nn.Module:
    """The class that loads a part, with the published sizes given by hand, without memory."""
    from diffusers import AutoencoderKLWan
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    text = dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    image = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14)
    builds: dict[str, Callable[[], nn.Module]] = {
        VAE: AutoencoderKLWan,
        TEXT: lambda: UMT5EncoderModel(UMT5Config(**text)),
        IMAGE: lambda: CLIPVisionModel(CLIPVisionConfig(**image)),
    }
    return on_meta(lambda build: build(), builds[name])


@pytest.mark.parametrize(
    ("layout", "tensors", "parameters"),
    [(VAE_ORIGINAL, 194, 126_892_531), (TEXT_ORIGINAL, 242, 5_680_910_336), (IMAGE_ORIGINAL, 391, 630_766_080)],
    ids=["vae", "text", "image"],
)
def test_the_published_sizes_are_covered_one_to_one(
    layout: Layout, tensors: int, parameters: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    net = full_size(layout.name)
    state = original(layout, net)
    assert sum(p.numel() for p in net.parameters()) == parameters
    prefix = "vision_model." if layout is IMAGE_ORIGINAL else ""
    into = [name for names in published(layout).values() for name in names]
    assert sorted(into) == sorted(prefix + name for name, _ in net.named_parameters())
    assert published(layout).keys() == state.keys() and len(state) == tensors
    # What only the tensors tell is the published configuration.
    files = SimpleNamespace(names=lambda: list(state), shape=lambda name: tuple(state[name].shape))
    monkeypatch.setattr(TorchFile, "open", lambda self, folder: files)
    assert layout.read_config(tmp_path) == PUBLISHED[layout.name]


@pytest.mark.parametrize("layout", [VAE_HUB, TEXT_HUB, IMAGE_HUB], ids=["vae", "text", "image"])
def test_the_published_config_is_the_class_s_own(layout: Layout, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan
    from transformers import CLIPVisionConfig, UMT5Config

    config = next(PUBLISHED[name] for name, hub in _HUBS.items() if hub is layout)
    (tmp_path / layout.name).mkdir()
    layout.write_config(config, tmp_path, torch.bfloat16)
    raw = json.loads((tmp_path / layout.config_file).read_text())
    if layout is VAE_HUB:
        assert {k: v for k, v in raw.items() if k[0] != "_"} == {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in on_meta(AutoencoderKLWan, 96).config.items()
            if k[0] != "_"
        }
        return
    kind = UMT5Config if layout is TEXT_HUB else CLIPVisionConfig
    loaded = kind.from_pretrained(tmp_path / layout.name)
    held = loaded.to_dict() | {"dtype": str(loaded.dtype).removeprefix("torch.")}
    # transformers ties UMT5's embeddings whatever the published file says.
    skipped = {"torch_dtype", "architectures", "tie_word_embeddings"}
    assert {k: held.get(k) for k in raw.keys() - skipped} == {k: v for k, v in raw.items() if k not in skipped}
    assert layout.read_config(tmp_path) == config


# ------------------------------------------------------------------------------------------------ both ways


def test_the_way_back_is_exact(release: Path, hub: Path, tmp_path: Path) -> None:
    restore(hub, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([VAE, TEXT, IMAGE, "google"])
    for name in (VAE, TEXT, IMAGE):
        want, got = (torch.load(folder / name, weights_only=True) for folder in (release, tmp_path))
        if name == IMAGE:
            want = {k: v for k, v in want.items() if k.startswith("visual.") and k != "visual.head"}
        assert equal(got, want)
    for file in (release / TOKENIZER).iterdir():
        assert (tmp_path / TOKENIZER / file.name).read_bytes() == file.read_bytes()
    again = tmp_path / "hub"
    again.mkdir()
    translate(tmp_path, again)
    for file in sorted(hub.rglob("*")):
        if file.is_file() and file.parent.name != "image_encoder":
            assert (again / file.relative_to(hub)).read_bytes() == file.read_bytes(), file.name
    a, b = (load_file(folder / "image_encoder" / "model.safetensors") for folder in (again, hub))
    assert equal(a, b)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_folders_that_transformers_saved_are_read(
    prefix: str, release: Path, nets: dict[str, Any], hub: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "saved", tmp_path / "out"
    out.mkdir()
    nets[VAE].save_pretrained(folder / "vae")
    nets[TEXT].save_pretrained(folder / "text_encoder", max_shard_size="5KB")
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
    nets[IMAGE].save_pretrained(folder / "image_encoder")
    path = folder / "image_encoder" / "model.safetensors"
    state = {prefix + name.removeprefix("vision_model."): t for name, t in load_file(path).items()}
    save_file(state | {f"{prefix}embeddings.position_ids": torch.arange(5)[None]}, path, {"format": "pt"})
    (folder / "tokenizer").symlink_to(hub / "tokenizer")
    restore(folder, out)
    for name in (VAE, TEXT, IMAGE):
        want = torch.load(release / name, weights_only=True)
        got = torch.load(out / name, weights_only=True)
        assert got.keys() <= want.keys() and equal(got, {k: want[k] for k in got})


def test_a_release_without_clip(release: Path, tmp_path: Path) -> None:
    source, out = link(release, tmp_path / "t2v", IMAGE), tmp_path / "hub"
    out.mkdir()
    translate(source, out)
    assert sorted(p.name for p in out.iterdir()) == ["text_encoder", "tokenizer", "vae"]
    with pytest.raises(UserError, match=f"{IMAGE}: missing; the parts beside a network come along whole or not at all"):
        auxiliary.translate(source, image=True)
    assert auxiliary.translate(out, image=True) is None and auxiliary.restore(source, image=True) is None


def test_progress_counts_every_byte(release: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    translate(release, tmp_path, progress=lambda done, total: steps.append((done, total)))
    total = sum(t.nbytes for file in tmp_path.rglob("*.safetensors") for t in load_file(file).values())
    assert steps[-1] == (total, total) and {t for _, t in steps} == {total}
    assert len({done for done, _ in steps}) == len(steps) > 194 and steps == sorted(steps)


def test_a_large_encoder_is_cut_into_files(
    nets: dict[str, Any], release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import UMT5EncoderModel

    monkeypatch.setattr(translation, "SHARD_BYTES", 10_000)
    translate(release, tmp_path)
    folder = tmp_path / "text_encoder"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    net = load(UMT5EncoderModel, folder)
    assert equal(dict(net.named_parameters()), dict(nets[TEXT].named_parameters()))


def test_types_may_differ_within_a_file(release: Path, tmp_path: Path) -> None:
    source, out = link(release, tmp_path / "mixed", TEXT), tmp_path / "hub"
    out.mkdir()
    state = torch.load(release / TEXT, weights_only=True)
    state["norm.weight"] = state["norm.weight"].float()
    torch.save(state, source / TEXT)
    translate(source, out)
    got = load_file(out / "text_encoder" / "model.safetensors")
    assert {n for n, t in got.items() if t.dtype == torch.float32} == {"encoder.final_layer_norm.weight"}
    assert json.loads((out / "text_encoder" / "config.json").read_text())["dtype"] == "bfloat16"


# ------------------------------------------------------------------------------------------------ mistakes


def without(name: str, key: str) -> Callable[[Path, Path], None]:
    def change(release: Path, folder: Path) -> None:
        state = torch.load(release / name, weights_only=True)
        del state[key]
        torch.save(state, folder / name)

    return change


def with_extra(name: str, key: str) -> Callable[[Path, Path], None]:
    def change(release: Path, folder: Path) -> None:
        torch.save({**torch.load(release / name, weights_only=True), key: torch.zeros(2)}, folder / name)

    return change


def truncated(name: str) -> Callable[[Path, Path], None]:
    def change(release: Path, folder: Path) -> None:
        data = (release / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (VAE, lambda release, folder: None, r"Wan2\.1_VAE\.pth: missing; the parts"),
        (TEXT, lambda release, folder: None, r"models_t5_umt5-xxl-enc-bf16\.pth: missing; the parts"),
        ("google", lambda release, folder: None, r"google/umt5-xxl: missing; the parts"),
        (VAE, truncated(VAE), r"Wan2\.1_VAE\.pth: truncated"),
        (TEXT, truncated(TEXT), r"models_t5_umt5-xxl-enc-bf16\.pth: truncated"),
        (IMAGE, truncated(IMAGE), r"models_clip_[-a-z0-9]*\.pth: truncated"),
        (VAE, without(VAE, "encoder.conv1.weight"), r"VAE\.pth: missing key 'encoder.conv1.weight'$"),
        (VAE, without(VAE, "decoder.upsamples.9.residual.2.bias"), r"VAE\.pth: missing key 'decoder.upsamples.9.resid"),
        (TEXT, without(TEXT, "blocks.1.attn.k.weight"), r"bf16\.pth: missing key 'blocks.1.attn.k.weight'$"),
        (IMAGE, without(IMAGE, "visual.transformer.1.attn.to_qkv.bias"), r"missing key 'visual.transformer.1.attn.to_"),
        (VAE, with_extra(VAE, "decoder.head.3.weight"), r"VAE\.pth: unknown key 'decoder.head.3.weight'"),
        (IMAGE, with_extra(IMAGE, "visual.head.weight"), r"huge-14\.pth: unknown key 'visual.head.weight'"),
    ],
)
def test_a_broken_release_is_named_before_anything_is_written(
    name: str, change: Callable[[Path, Path], None], message: str, release: Path, tmp_path: Path
) -> None:
    source, out = link(release, tmp_path / "broken", name), tmp_path / "hub"
    out.mkdir()
    change(release, source)
    with pytest.raises(UserError, match=message) as caught:
        translate(source, out)
    assert "\n" not in str(caught.value) and str(source) in str(caught.value)
    assert not list(out.iterdir())


def test_nothing_is_overwritten(release: Path, hub: Path, tmp_path: Path) -> None:
    (tmp_path / "image_encoder").mkdir()
    with pytest.raises(UserError, match="image_encoder: exists; choose another destination"):
        translate(release, tmp_path)
    (tmp_path / TEXT).write_bytes(b"mine")
    with pytest.raises(UserError, match=r"bf16\.pth: exists"):
        restore(hub, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["image_encoder", TEXT])
    assert (tmp_path / TEXT).read_bytes() == b"mine"


def test_another_clip_is_refused(release: Path, tmp_path: Path) -> None:
    """How wide a head is, no tensor tells: all releases have 80."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    source = link(release, tmp_path / "wide", IMAGE)
    sizes = dict(hidden_size=24, intermediate_size=8, num_hidden_layers=1, image_size=14, patch_size=7)
    net = random(CLIPVisionModel(CLIPVisionConfig(**sizes, num_attention_heads=4)), 0, torch.float32)
    torch.save(original(IMAGE_ORIGINAL, net), source / IMAGE)
    with pytest.raises(UserError, match="width of 24 does not divide into heads of 80"):
        auxiliary.translate(source, image=True)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vae", "latents_mean", [0.0] * 16),
        ("text_encoder", "feed_forward_proj", "relu"),
        ("image_encoder", "hidden_act", "quick_gelu"),
    ],
)
def test_what_the_release_cannot_say_is_refused(part: str, key: str, value: Any, hub: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "other", tmp_path / "out"
    out.mkdir()
    source.mkdir()
    for folder in hub.iterdir():
        (source / folder.name).mkdir()
        for file in folder.iterdir():
            (source / folder.name / file.name).symlink_to(file)
    config = source / part / "config.json"
    raw = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps(raw | {key: value}))
    with pytest.raises(UserError, match=f"{part}/config.json: {key}=.* is not supported, Wan2.1 has {key}="):
        restore(source, out)
    assert not list(out.iterdir())


# ------------------------------------------------------------------------------------------------ with a network


def with_network(hub: Path, folder: Path, preset: str, **changes: Any) -> Path:
    """A folder in diffusers' layout with a network, and the parts of ``hub``."""
    net = open_net(MODEL, MODEL.presets[preset].model_copy(update=changes))
    weights.save(net.named_parameters(), net.config, HUB, folder, extras_from=hub)
    return folder


@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
def test_image_to_video_without_clip_is_refused(kind: str, hub: Path, tmp_path: Path) -> None:
    """Before anything is written; the network alone goes if that is what was asked for."""
    changes = {"pos_embed_seq_len": 10} if kind == "flf2v" else {}
    weights.convert(with_network(hub, tmp_path / "hub", "tiny-i2v", **changes), tmp_path / "release", MODEL, "original")
    (tmp_path / "release" / IMAGE).unlink()
    begun: list[int] = []
    with pytest.raises(UserError, match=f"release/{IMAGE}: missing; .*--extras-from") as caught:
        weights.convert(
            tmp_path / "release", tmp_path / "back", MODEL, "hub", progress=lambda done, total: begun.append(done)
        )
    assert "\n" not in str(caught.value) and not begun and not list(tmp_path.glob("*back*"))
    (tmp_path / "none").mkdir()
    weights.convert(tmp_path / "release", tmp_path / "back", MODEL, "hub", extras_from=tmp_path / "none")
    assert [p.name for p in (tmp_path / "back").iterdir()] == ["transformer"]
    weights.convert(tmp_path / "release", tmp_path / "whole", MODEL, "hub", extras_from=hub)
    assert (tmp_path / "whole" / "model_index.json").is_file()


def test_text_to_video_takes_no_clip_along(release: Path, hub: Path, tmp_path: Path) -> None:
    folder = with_network(hub, tmp_path / "hub", "tiny-t2v")
    weights.convert(folder, tmp_path / "release", MODEL, "original")
    assert (tmp_path / "release" / VAE).is_file() and not (tmp_path / "release" / IMAGE).exists()
    weights.convert(tmp_path / "release", tmp_path / "back", MODEL, "hub")
    assert (tmp_path / "back" / "vae").is_dir() and not (tmp_path / "back" / "image_encoder").exists()


def test_a_vae_with_statistics_of_its_own_stays_behind_only_when_asked(hub: Path, tmp_path: Path) -> None:
    """The release has them in its code: with its VAE's file alone, colours would be wrong and nothing would say so."""
    folder = with_network(hub, tmp_path / "hub", "tiny-t2v")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latents_std": [1.0] * 16}))
    words = ["convert", str(folder), str(tmp_path / "release"), "--layout", "original"]
    done = CliRunner().invoke(app(MODEL), words)
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and "latents_std=[1.0, 1.0" in said and "--extras-from" in said
    assert not list(tmp_path.glob("*release*"))
    (tmp_path / "none").mkdir()
    done = CliRunner().invoke(app(MODEL), [*words, "--extras-from", str(tmp_path / "none")])
    assert done.exit_code == 0, done.output
    held = sorted(p.name for p in (tmp_path / "release").iterdir())
    assert held == ["config.json", "diffusion_pytorch_model.safetensors"]
    done = CliRunner().invoke(app(MODEL), [*words[:2], str(tmp_path / "other"), *words[3:], "--extras-from", "nowhere"])
    assert done.exit_code == 2 and "--extras-from=nowhere: no such folder" in " ".join(done.output.split())
