"""Tensor files, weight tables and streaming conversion, on a toy model with two layouts."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import shutil
import struct
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import weights
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.files import read_json, write_json
from mindspeed_model_core.model import Model
from mindspeed_model_core.parallel.placement import Placement
from mindspeed_model_core.recipe import Recipe, Section, validate
from mindspeed_model_core.weights import export, pth, source, tensorfile
from mindspeed_model_core.weights.layout import Cat, HeadPermute, Layout, Op, Row, Same, SwapHalves, Table
from mindspeed_model_core.weights.pth import Consolidated
from mindspeed_model_core.weights.tensorfile import Safetensors, Spec
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HEAD = 4


class ToyConfig(Section):
    width: int = 8
    heads: int = 4
    layers: int = 2
    note: int = 0

    @property
    def rows(self) -> tuple[int, int]:
        return self.heads * HEAD, self.heads * HEAD // 2


class Mix(nn.Module):
    """One fused projection and its way back."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        q, k = config.rows
        self.qk = nn.Parameter(torch.randn(q + k, config.width))
        self.out = nn.Parameter(torch.randn(config.width, q))
        self.parts = config.rows

    def placements(self) -> dict[str, Placement]:
        return {"qk": Placement(0, self.parts), "out": Placement(1)}


class Toy(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Mix(config) for _ in range(config.layers))
        self.scale = nn.Parameter(torch.randn(config.width))

    @property
    def mixes(self) -> list[Mix]:
        return [block for block in self.blocks if isinstance(block, Mix)]


def table(config: ToyConfig, ops: tuple[Op, ...] = ()) -> Table:
    return Table(
        Row("blocks.*.qk", ("layer.*.q", "layer.*.k"), Cat(sizes=config.rows, ops=ops)),
        Row("blocks.*.out", "layer.*.o"),
        Row("scale", "scale"),
        ignore=("layer.*.old", "extra"),
    )


def config_at(name: str) -> Any:
    return lambda folder: validate(ToyConfig, read_json(folder / name), str(folder / name))  # type: ignore[type-var]


def write_at(name: str) -> Any:
    return lambda config, folder, dtype: write_json(folder / name, config.model_dump())


PLAIN = Layout(
    name="plain",
    build=Toy,
    table=table,
    detect=lambda folder: (folder / "plain.json").is_file(),
    read_config=config_at("plain.json"),
    write_config=write_at("plain.json"),
    files=Safetensors(),
    loose=("note",),
    extras=("words.txt", "vae/*.json"),
    config_file="plain.json",
)
TURNED = Layout(
    name="turned",
    build=Toy,
    table=lambda config: table(config, (HeadPermute(HEAD), Same())),
    detect=lambda folder: (folder / "turned.json").is_file(),
    read_config=config_at("turned.json"),
    write_config=write_at("turned.json"),
    files=Consolidated(lambda name: {"q": 0, "k": 0, "o": 1}.get(name.rpartition(".")[2])),
    extra=lambda config, dtype: {"extra": torch.arange(3, dtype=dtype)},
    shards=lambda config, shards: shards or 1,
    config_file="turned.json",
)
MODEL = Model(
    name="toy",
    package="toy",
    presets={"small": ToyConfig(), "wide": ToyConfig(width=16)},
    build=Toy,  # type: ignore[arg-type]
    task=None,  # type: ignore[arg-type]
    recipe=Recipe,
    layouts=(PLAIN, TURNED),
)


@pytest.fixture
def net() -> Toy:
    torch.manual_seed(0)
    return Toy(ToyConfig())


@pytest.fixture
def plain(net: Toy, tmp_path: Path) -> Path:
    """A folder as someone else's program writes it."""
    folder = tmp_path / "plain"
    folder.mkdir()
    tensors = {"scale": net.scale.detach(), "layer.0.old": torch.zeros(2)}
    for i, block in enumerate(net.mixes):
        q, k = block.qk.detach().split(block.parts)
        tensors |= {f"layer.{i}.q": q.clone(), f"layer.{i}.k": k.clone(), f"layer.{i}.o": block.out.detach()}
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "plain.json", net.config.model_dump())
    (folder / "words.txt").write_text("a b c")
    return folder


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def sound(path: Path) -> None:
    """Check every checksum of a zip file, in its index and behind each entry (which Python's zipfile does not read)."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        data, entries = path.read_bytes(), archive.infolist()
    for entry in entries:
        names, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
        after = entry.header_offset + 30 + names + extra + entry.file_size
        if entry.flag_bits & 8:  # all but empty ones have their checksum repeated
            assert data[after : after + 8] == b"PK\x07\x08" + struct.pack("<I", entry.CRC), entry.filename


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ------------------------------------------------------------------------------------------------ tensor files


def assorted() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randn(7),
        "c": torch.arange(24).view(2, 3, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
    }


def test_safetensors_are_read_and_written_as_the_library_does(tmp_path: Path) -> None:
    want = assorted()
    save_file(want, tmp_path / "theirs.safetensors")
    slots = tensorfile.open_safetensors(tmp_path / "theirs.safetensors")
    assert slots.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(slots[name].read(), tensor) and slots[name].read().dtype == tensor.dtype
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in want.items()}
    writer = Safetensors("ours").create(tmp_path, specs, shard_bytes=10**9)
    for name in reversed(want):
        writer.write(name, want[name])
    writer.finish()
    got = load_file(tmp_path / "ours.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in want.items())


def test_safetensors_shards_keep_to_the_size(tmp_path: Path) -> None:
    want = assorted()
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in want.items()}
    writer = Safetensors().create(tmp_path, specs, shard_bytes=60)
    for name, tensor in want.items():
        writer.write(name, tensor)
    writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(s.nbytes for s in specs.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], want[name])
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) == 3
    assert torch.equal(Safetensors().open(tmp_path).read("c"), want["c"])


def test_pth_is_a_file_torch_and_unzip_accept(tmp_path: Path) -> None:
    want = assorted()
    path = tmp_path / "x.pth"
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in want.items()}
    file, slots = pth.create_pth(path, specs)
    writer = tensorfile.Writer([file], {n: ([s], 0) for n, s in slots.items()}, pth._seal_pth)
    for name, tensor in want.items():
        writer.write(name, tensor)
    writer.finish()
    got = torch.load(path, weights_only=True)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in want.items())
    sound(path)
    torch.save({**want, "view": torch.arange(10.0)[4:7]}, path)
    back = pth.open_pth(path)
    assert all(torch.equal(back[n].read(), t) for n, t in want.items())
    assert torch.equal(back["view"].read(), torch.arange(4.0, 7.0))


def test_pth_may_hold_its_tensors_below_a_key(tmp_path: Path) -> None:
    want, sizes = assorted(), {"rows": 3, "name": "x"}
    files = pth.TorchFile("x.pt", "state", {"sizes": sizes})
    writer = files.create(tmp_path, {n: Spec(t.dtype, tuple(t.shape)) for n, t in want.items()})
    for name, tensor in want.items():
        writer.write(name, tensor)
    writer.finish()
    got = torch.load(tmp_path / "x.pt", weights_only=True)
    assert got["sizes"] == sizes == pth.read_pth(tmp_path / "x.pt")["sizes"]
    back = files.open(tmp_path)
    assert all(torch.equal(got["state"][n], t) and torch.equal(back.read(n), t) for n, t in want.items())
    sound(tmp_path / "x.pt")
    torch.save({"state": 3}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: holds no mapping 'state' of names to tensors"):
        files.open(tmp_path)


@pytest.mark.parametrize("shape", [(40, 9), (9, 4, 5)])
def test_slices_equal_the_whole_narrowed(tmp_path: Path, shape: tuple[int, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr(tensorfile, "_BLOCK", 100)
    whole = torch.randn(shape)
    save_file({"x": whole}, tmp_path / "a.safetensors")
    slot = tensorfile.open_safetensors(tmp_path / "a.safetensors")["x"]
    for dim, size in enumerate(shape):
        for start, length in ((0, size), (1, size - 1), (2, 1)):
            assert torch.equal(slot.read(dim, start, length), whole.narrow(dim, start, length))


class Danger:
    """Unpickling this touches a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("touched",)


def test_pth_refuses_what_is_not_a_mapping_of_tensors(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    torch.save({"w": Danger()}, path)
    with pytest.raises(UserError, match=r"x\.pth: not a plain file of tensors"):
        pth.open_pth(path)
    assert not Path("touched").exists()
    torch.save({"w": 3}, path)
    with pytest.raises(UserError, match=r"x\.pth: w: holds a int"):
        pth.open_pth(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(UserError, match="holds a list"):
        pth.open_pth(path)
    torch.save({"w": torch.randn(3, 4).T}, path)
    with pytest.raises(UserError, match="w: stored as a strided view"):
        pth.open_pth(path)
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(UserError, match="truncated, or not a zip file"):
        pth.open_pth(path)
    torch.save({"w": torch.zeros(1000)}, path)
    os.truncate(path, path.stat().st_size - 500)
    with pytest.raises(UserError, match=r"x\.pth: truncated"):
        pth.open_pth(path)


def test_broken_safetensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def message() -> str:
        with pytest.raises(UserError) as error:
            Safetensors().open(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "holds neither model.safetensors nor" in message()
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is not supported" in message()
    save_file({"w": torch.zeros(100)}, path)
    data = path.read_bytes()
    for cut in (len(data) - 1, 20, 4, 0):
        path.write_bytes(data[:cut])
        assert str(path) in message() and "truncated" in message()
    path.write_bytes(b"<html>" + data)
    assert "not a safetensors file" in message()
    path.write_bytes(data.replace(b"F32", b"F99"))
    assert "w: type F99" in message()
    path.write_bytes(data.replace(b"[100]", b"[101]"))
    assert "w: F32[101] does not fill" in message()
    path.unlink()
    index = tmp_path / "model.safetensors.index.json"
    save_file({"w": torch.zeros(4)}, tmp_path / "a.safetensors")
    write_json(index, {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}})
    assert "b.safetensors: missing, though" in message()
    write_json(index, {"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}})
    assert "a.safetensors: v: missing, though" in message()
    write_json(index, {"weight_map": {"w": "../a.safetensors"}})
    assert "not a file name in the same folder" in message()
    index.write_text("{")
    assert "not valid JSON" in message()


# ------------------------------------------------------------------------------------------------ ops and table


@pytest.mark.parametrize("op", [Same(), HeadPermute(4), HeadPermute(6)])
def test_op_inverts_and_commutes_with_slices_on_its_grain(op: Op) -> None:
    x = torch.randn(24, 8)
    assert torch.equal(op.split(op.join(x)), x) and torch.equal(op.join(op.split(x)), x)
    for dim in (0, 1):
        grain = op.grain(dim)
        assert grain
        for start in range(0, x.shape[dim] - grain + 1, grain):
            cut = op.join(x.narrow(dim, start, grain))
            assert torch.equal(cut, op.join(x).narrow(dim, start, grain))


def test_head_permute_gathers_even_rows_then_odd_rows() -> None:
    x = torch.arange(8.0)[:, None]
    assert HeadPermute(4).join(x).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_halves_are_swapped_whole_and_columns_stay() -> None:
    x = torch.arange(12.0).view(4, 3)
    assert SwapHalves().join(x)[:, 0].tolist() == [6, 9, 0, 3]
    assert torch.equal(SwapHalves().split(SwapHalves().join(x)), x)
    assert SwapHalves().grain(0) is None and SwapHalves().grain(1) == 1
    assert torch.equal(SwapHalves().join(x[:, 1:2]), SwapHalves().join(x)[:, 1:2])


def test_table_is_total() -> None:
    with pytest.raises(ValueError, match="0 rows match the parameter 'b'"):
        Table(Row("a", "x")).bind({"a": (1,), "b": (1,)})
    with pytest.raises(ValueError, match="2 rows match the parameter 'a.1'"):
        Table(Row("a.*", "x.*"), Row("a.1", "y")).bind({"a.1": (1,)})
    with pytest.raises(ValueError, match="no parameter matches the row 'c'"):
        Table(Row("a", "x"), Row("c", "y")).bind({"a": (1,)})
    with pytest.raises(ValueError, match="'x' makes both 'a' and 'b'"):
        Table(Row("a", "x"), Row("b", "x")).bind({"a": (1,), "b": (1,)})
    with pytest.raises(ValueError, match="do not make a"):
        Table(Row("a", ("x", "y"), Cat(sizes=(2, 2)))).bind({"a": (5,)})


class Memory:
    """Tensors in memory as a Source."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        whole = self.tensors[name]
        return whole if length is None else whole.narrow(dim, start, length)


@pytest.mark.parametrize("catdim", [0, 1])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_pieces_equal_the_whole_cut(catdim: int, tp: int) -> None:
    """Cuts along and across the stacked dim, on and off whole heads (tp=8 cuts heads of 4 rows)."""
    theirs = {"x": torch.randn(16, 16), "y": torch.randn(16, 16)}
    row = Row("a", ("x", "y"), Cat(catdim, ops=(HeadPermute(4), Same())))
    bound = row.bind("a", (), (32, 16) if catdim == 0 else (16, 32))
    memory: Any = Memory(theirs)
    whole = source.read(memory, bound)
    assert torch.equal(whole, torch.cat([HeadPermute(4).join(theirs["x"]), theirs["y"]], catdim))
    for dim in (0, 1):
        place = Placement(dim, (16, 16) if dim == catdim else ())
        for rank in range(tp):
            pieces = place.pieces(whole.shape[dim], rank, tp)
            assert torch.equal(source.read(memory, bound, dim, pieces), place.narrow(whole, rank, tp))


# ------------------------------------------------------------------------------------------------ load, save, convert


def test_load_whole_cut_and_staged(net: Toy, plain: Path, tmp_path: Path) -> None:
    other = Toy(ToyConfig())
    weights.load(other, plain, MODEL)
    assert same(net, other)
    half = Toy(ToyConfig()).bfloat16()
    weights.load(half, plain, MODEL)
    assert same(copy.deepcopy(net).bfloat16(), half)
    weights.convert(plain, tmp_path / "turned", MODEL, "turned", shards=2)
    whole, places = dict(net.named_parameters()), source.whole(Toy, net.config)[1]
    for folder in (plain, tmp_path / "turned"):
        for rank in (0, 1):
            got: dict[str, Tensor] = {}
            stage = Toy(ToyConfig()).bfloat16()  # what write is given keeps the folder's precision
            del stage.scale
            weights.load(stage, folder, MODEL, tp_rank=rank, tp=2, write=got.__setitem__)
            assert got.keys() == whole.keys() - {"scale"}
            for name, tensor in got.items():
                assert torch.equal(tensor, places[name].narrow(whole[name], rank, 2))


def test_load_refuses_another_size(plain: Path) -> None:
    with pytest.raises(UserError, match="width=8 here, but this network has width=16; the folder holds preset 'small'"):
        weights.load(Toy(ToyConfig(width=16)), plain, MODEL)
    with pytest.raises(UserError, match="width=8 here, but preset 'wide' has width=16"):
        weights.convert(plain, plain.parent / "x", MODEL, "plain", preset="wide")
    weights.load(Toy(ToyConfig(note=1)), plain, MODEL)  # a loose field may differ


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layer.1.k"), r"plain: missing key 'layer\.1\.k'"),
        (lambda t: t.update({"layer.1.kk": t.pop("layer.1.k")}), r"missing key 'layer\.1\.k'; did you mean 'layer"),
        (lambda t: t.update(more=torch.zeros(1)), r"model\.safetensors: unknown key 'more'"),
        (lambda t: t.update({"layer.2.q": torch.zeros(1)}), r"unknown key 'layer\.2\.q'"),
        (lambda t: t.update(scale=torch.zeros(9)), r"safetensors: scale: has shape \[9\], .* asks for \[8\]"),
    ],
)
def test_folder_that_does_not_fit_is_refused_before_writing(plain: Path, change: Any, message: str) -> None:
    rewrite(plain, change)
    for call in (
        lambda: weights.load(Toy(ToyConfig()), plain, MODEL),
        lambda: weights.convert(plain, plain.parent / "out", MODEL, "turned"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert left(plain.parent) == ["plain"]


def test_convert_there_and_back_keeps_every_bit(net: Toy, plain: Path, tmp_path: Path) -> None:
    rewrite(plain, lambda t: t.update(scale=torch.tensor([float("nan"), -0.0] + [1e-45] * 6)))
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    weights.convert(plain, tmp_path / "t2", MODEL, "turned", shards=2, progress=progress)
    weights.convert(tmp_path / "t2", tmp_path / "t1", MODEL, "turned")
    weights.convert(tmp_path / "t1", tmp_path / "back", MODEL, "plain", shard_bytes=200, extras_from=plain)
    want, got = Safetensors().open(plain), Safetensors().open(tmp_path / "back")
    assert set(got.names()) == set(want.names()) - {"layer.0.old"}
    for name in got.names():
        assert torch.equal(got.read(name).view(torch.uint8), want.read(name).view(torch.uint8))
    assert (tmp_path / "back" / "words.txt").read_text() == "a b c"
    for file in (*(tmp_path / "t1").glob("*.pth"), *(tmp_path / "t2").glob("*.pth")):
        sound(file)
    turned = torch.load(tmp_path / "t1" / "consolidated.00.pth")
    assert torch.equal(turned["extra"], torch.arange(3.0))
    assert torch.equal(turned["layer.0.q"], HeadPermute(HEAD).split(want.read("layer.0.q")))
    assert seen[-1][0] == seen[-1][1] and [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_convert_moves_bytes_where_it_can(plain: Path, tmp_path: Path, monkeypatch: Any) -> None:
    made: list[str] = []
    take = tensorfile.Reader.read

    def note(reader: tensorfile.Reader, name: str, *cut: Any) -> Tensor:
        made.append(name)
        return take(reader, name, *cut)

    monkeypatch.setattr(tensorfile.Reader, "read", note)
    monkeypatch.setattr(export, "read", None)  # the fused form must not be made
    weights.convert(plain, tmp_path / "out", MODEL, "turned")
    assert sorted(made) == ["layer.0.q", "layer.1.q"]
    made.clear()
    weights.convert(tmp_path / "out", tmp_path / "copy", MODEL, "turned")
    assert made == []


def test_convert_to_another_dtype(plain: Path, tmp_path: Path) -> None:
    weights.convert(plain, tmp_path / "half", MODEL, "plain", dtype=torch.bfloat16)
    want = Safetensors().open(plain)
    for name, tensor in load_file(tmp_path / "half" / "model.safetensors").items():
        assert torch.equal(tensor, want.read(name).bfloat16())


def test_save_takes_tensors_one_at_a_time_in_any_order(net: Toy, tmp_path: Path) -> None:
    pairs = [(name, p.detach()) for name, p in net.named_parameters()]
    weights.save(reversed(pairs), net.config, TURNED, tmp_path / "out", shards=2)
    other = Toy(ToyConfig())
    weights.load(other, tmp_path / "out", MODEL)
    assert same(net, other)
    for broken, message in (
        (pairs[1:], "1 parameters were not given"),
        ([*pairs, pairs[0]], "given twice"),
        ([(pairs[0][0], torch.zeros(1))], "has shape"),
        ([pairs[0], (pairs[1][0], pairs[1][1].double())], "float64"),
        ([], "4|5 parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.save(broken, net.config, PLAIN, tmp_path / "bad")
    assert left(tmp_path) == ["out"]


class FakeRun:
    """What ``checkpoint.open_weights`` gives."""

    def __init__(self, net: Toy) -> None:
        self.config = net.config.model_dump()
        self.info: dict[str, Any] = {}
        self.tensors = dict(net.named_parameters())

    def names(self) -> list[str]:
        return list(self.tensors)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name].detach()


def test_a_runs_checkpoint_is_a_source(net: Toy, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "step").mkdir()
    run = FakeRun(net)
    monkeypatch.setattr(source, "is_checkpoint", lambda path: path.name == "step")
    monkeypatch.setattr(source, "open_weights", lambda path, ema=False: run)
    for layout in ("plain", "turned"):
        weights.convert(tmp_path / "step", tmp_path / layout, MODEL, layout)
        other = Toy(ToyConfig())
        weights.load(other, tmp_path / layout, MODEL)
        assert same(net, other)
    run.info = {"model": "game"}
    with pytest.raises(UserError, match="step: is a checkpoint of game, not of toy"):
        weights.convert(tmp_path / "step", tmp_path / "no", MODEL, "plain")
    run.info = {}
    direct = Toy(ToyConfig())
    weights.load(direct, tmp_path / "step", MODEL)
    assert same(net, direct)
    run.tensors["scale"] = run.tensors.pop("blocks.0.out")
    with pytest.raises(UserError, match=r"step: missing key 'blocks\.0\.out'"):
        weights.convert(tmp_path / "step", tmp_path / "no", MODEL, "plain")


# ------------------------------------------------------------------------------------------------ destinations


def test_destination_is_never_overwritten_unasked(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "precious").mkdir(parents=True)
    with pytest.raises(UserError, match="out: exists; choose another"):
        weights.convert(plain, out, MODEL, "plain")
    with pytest.raises(UserError, match="out: holds no weights in layout plain or turned"):
        weights.convert(plain, out, MODEL, "plain", overwrite=True)
    (out / "precious").rmdir()
    weights.convert(plain, out, MODEL, "plain")  # an empty folder is no output
    weights.convert(plain, out, MODEL, "turned", overwrite=True)
    assert left(out) == ["consolidated.00.pth", "turned.json"] and left(tmp_path) == ["out", "plain"]
    for target in (plain, plain.parent):
        with pytest.raises(UserError, match="is the source"):
            weights.convert(plain, target, MODEL, "plain", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is a file"):
        weights.convert(plain, tmp_path / "file", MODEL, "plain")
    with pytest.raises(UserError, match="cannot be written"):
        weights.convert(plain, tmp_path / "file" / "below", MODEL, "plain")


@pytest.mark.parametrize("layout", ["plain", "turned"])
def test_a_cast_never_makes_a_value_infinite(net: Toy, tmp_path: Path, layout: str) -> None:
    with torch.no_grad():
        net.mixes[1].qk[0, 0] = 70_000.0
        net.scale[0] = torch.inf  # is, and stays
    weights.save(net.named_parameters(), net.config, PLAIN, tmp_path / "source")
    with pytest.raises(UserError, match=r"layer\.1\.q: holds 7e\+04, and the largest float16 is 6\.55e\+04"):
        weights.convert(tmp_path / "source", tmp_path / "half", MODEL, layout, dtype=torch.float16)
    with pytest.raises(UserError, match=r"blocks\.1\.qk: holds 7e\+04"):
        weights.save(net.named_parameters(), net.config, PLAIN, tmp_path / "half", dtype=torch.float16)
    other = Toy(ToyConfig()).half()
    with pytest.raises(UserError, match=r"layer\.1\.q: holds 7e\+04"):
        weights.load(other, tmp_path / "source", MODEL)
    assert left(tmp_path) == ["source"]
    weights.convert(tmp_path / "source", tmp_path / "brain", MODEL, layout, dtype=torch.bfloat16)


def test_weights_that_are_no_floats_are_refused(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors["layer.0.q"] = tensors["layer.0.q"].to(torch.int8)
    save_file(tensors, plain / "model.safetensors")
    for attempt in (
        lambda: weights.load(Toy(ToyConfig()), plain, MODEL),
        lambda: weights.convert(plain, tmp_path / "out", MODEL, "turned"),
    ):
        with pytest.raises(UserError, match=r"model\.safetensors: layer\.0\.q: holds int8, not floating-point"):
            attempt()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "model.safetensors").unlink(), r"no weights in layout plain \(.*out.*model.safetensors"),
        (lambda out: (out / "plain.json").write_text('{"wide": 1}'), r"no weights in layout plain \(.*unknown key"),
        (lambda out: (out / "notes.txt").touch(), r"also holds notes\.txt, which is no part of layout plain"),
        (lambda out: (out / "model-final.safetensors").touch(), r"also holds model-final\.safetensors"),
        (lambda out: (out / "thesis").mkdir(), "also holds thesis, "),
        (lambda out: (out / "vae" / "main.tex").touch(), r"also holds vae/main\.tex"),
        (lambda out: (out / "vae" / "deep").mkdir(), "also holds vae/deep"),
        (lambda out: (out / "link").symlink_to(out.parent), "also holds link"),
    ],
)
def test_only_a_folder_of_ours_is_overwritten(plain: Path, tmp_path: Path, damage: Any, message: str) -> None:
    out = tmp_path / "out"
    weights.convert(plain, out, MODEL, "plain")
    (out / "vae").mkdir()
    (out / "vae" / "config.json").touch()
    weights.convert(plain, out, MODEL, "turned", overwrite=True)
    weights.convert(plain, out, MODEL, "plain", shard_bytes=1000, overwrite=True)
    weights.convert(plain, out, MODEL, "plain", overwrite=True)
    (out / "vae").mkdir()
    damage(out)
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match=f"^[^\n]*out: .*{message}[^\n]*remove it first$"):
        weights.convert(plain, out, MODEL, "plain", overwrite=True)
    assert sorted(out.rglob("*")) == before and left(tmp_path) == ["out", "plain"]


@pytest.mark.parametrize("layout", ["plain", "turned"])
def test_full_disk_leaves_nothing_behind(plain: Path, tmp_path: Path, layout: str, monkeypatch: Any) -> None:
    weights.convert(plain, tmp_path / "old", MODEL, layout)
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="old: no space left on the device; nothing was kept"):
            weights.convert(plain, tmp_path / "old", MODEL, layout, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
        with pytest.raises(UserError, match=r"no space left on the device \(0\.0 MB needed, 0\.0 MB free\)"):
            weights.convert(plain, tmp_path / "new", MODEL, layout)
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before
    assert left(tmp_path) == ["old", "plain"]


def test_source_is_detected_or_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        weights.open_source(tmp_path / "none", MODEL)
    with pytest.raises(UserError, match="not a folder"):
        weights.open_source(plain / "words.txt", MODEL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme").touch()
    with pytest.raises(UserError, match="no weights of toy here; known: plain, turned, .*; found: readme"):
        weights.open_source(tmp_path / "other", MODEL)
    with pytest.raises(UserError, match="layout='plane': .*did you mean 'plain'"):
        weights.convert(plain, tmp_path / "x", MODEL, "plane")
    with pytest.raises(UserError, match="shards=2: this layout cuts its files by size"):
        weights.convert(plain, tmp_path / "x", MODEL, "plain", shards=2)
    assert weights.read_config(plain, MODEL) == ToyConfig()


def test_shards_that_do_not_go_together_are_named(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "turned"
    weights.convert(plain, out, MODEL, "turned", shards=4)

    def message() -> str:
        with pytest.raises(UserError) as error:
            weights.load(Toy(ToyConfig()), out, MODEL)
        return str(error.value)

    second = torch.load(out / "consolidated.01.pth")
    torch.save({k: v for k, v in second.items() if k != "layer.0.k"}, out / "consolidated.01.pth")
    assert "consolidated.01.pth: layer.0.k: missing" in message()
    torch.save({**second, "scale": torch.zeros(3)}, out / "consolidated.01.pth")
    assert "consolidated.01.pth: scale: torch.float32[3] does not go with" in message()
    os.truncate(out / "consolidated.01.pth", 900)
    assert "consolidated.01.pth: truncated" in message()
    (out / "consolidated.01.pth").unlink()
    assert "consolidated.01.pth: missing" in message()
    with pytest.raises(UserError, match=r"shards=3: layer\.0\.q has 16 along dim 0"):
        weights.convert(plain, tmp_path / "three", MODEL, "turned", shards=3)
