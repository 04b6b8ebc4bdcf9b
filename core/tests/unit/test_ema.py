"""The moving average is its formula, is saved with the run, and is written out on request."""

from dataclasses import replace

import pytest
import torch
from mindspeed_model_core import checkpoint, train, weights
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing import toy
from mindspeed_model_core.weights.layout import Layout, Row, Table
from mindspeed_model_core.weights.tensorfile import Safetensors
from safetensors.torch import load_file

PLAIN = Layout(
    name="plain",
    build=toy.Toy,
    table=lambda config: Table(*(Row(name, name) for name, _ in toy.Toy(config).named_parameters())),
    detect=lambda folder: (folder / "model.safetensors").is_file(),
    read_config=lambda folder: toy.ToyConfig(),
    write_config=lambda config, folder, dtype: None,
    files=Safetensors(),
)
MODEL = replace(toy.TOY, layouts=(PLAIN,))
OPTIM = {"lr": 1e-2, "schedule": "constant", "ema": 0.8}


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.float32),
                                                  ("bf16-pure", torch.float32), ("fp64", torch.float64)])  # fmt: skip
def test_equals_the_formula(tmp_path, precision, dtype):
    """Against every step's weights, which checkpoints hold, and the first ones."""
    recipe = toy.recipe(precision=precision, optim=OPTIM, steps=4, checkpoint={"every": 1, "keep": 9})
    train.run(recipe, toy.TOY, tmp_path / "run")
    session = train.Session(recipe, toy.TOY, train.Mesh(torch.device("cpu")))
    session.start()
    want = {name: shard.master.detach().to(dtype).clone() for name, shard in session.parallel.shards.items()}
    for folder in checkpoint.steps(tmp_path / "run" / "checkpoints"):
        here, average = checkpoint.open_weights(folder), checkpoint.open_weights(folder, ema=True)
        assert set(average.names()) == set(want)
        for name in want:
            want[name] = 0.8 * want[name] + 0.2 * here.read(name).to(dtype)
            got = average.read(name)
            assert got.dtype == dtype
            assert torch.allclose(got, want[name], rtol=1e-5, atol=1e-6), name


def test_resumes_bit_for_bit_and_exports(tmp_path):
    train.run(toy.recipe(optim=OPTIM), toy.TOY, tmp_path / "whole")
    train.run(toy.recipe(optim=OPTIM, steps=2), toy.TOY, tmp_path / "cut")
    train.run(toy.recipe(optim=OPTIM), toy.TOY, tmp_path / "cut", resume=True)
    one, two = (checkpoint.open_weights(tmp_path / name, ema=True) for name in ("whole", "cut"))
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.names())
    weights.convert(tmp_path / "cut", tmp_path / "out", MODEL, "plain", ema=True)
    weights.convert(tmp_path / "cut", tmp_path / "last", MODEL, "plain")
    written, last = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "last"))
    assert all(torch.equal(written[name], one.read(name)) for name in one.names())
    assert any(not torch.equal(written[name], last[name]) for name in last)


def test_it_changes_nothing_else(tmp_path):
    train.run(toy.recipe(optim=OPTIM), toy.TOY, tmp_path / "with")
    train.run(toy.recipe(optim={**OPTIM, "ema": None}), toy.TOY, tmp_path / "without")
    one, two = (checkpoint.open_weights(tmp_path / name) for name in ("with", "without"))
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.names())


def test_a_run_has_one_from_its_beginning_or_never(tmp_path):
    train.run(toy.recipe(steps=2), toy.TOY, tmp_path / "run")
    with pytest.raises(UserError, match="optim.ema=0.8: .* holds no moving average; resume with optim.ema=null"):
        train.run(toy.recipe(optim=OPTIM), toy.TOY, tmp_path / "run", resume=True)
    train.run(toy.recipe(optim=OPTIM, steps=2), toy.TOY, tmp_path / "with")
    with pytest.raises(UserError, match="optim.ema=null: .* of decay 0.8; resume with optim.ema=0.8"):
        train.run(toy.recipe(), toy.TOY, tmp_path / "with", resume=True)
    with pytest.raises(UserError, match="holds no moving average; the run was trained without optim.ema"):
        weights.convert(tmp_path / "run", tmp_path / "out", MODEL, "plain", ema=True)
    with pytest.raises(UserError, match="is a run of whole weights, not of adapters"):
        weights.convert(tmp_path / "run", tmp_path / "out", MODEL, "plain", merge_lora=tmp_path / "run")
    assert not (tmp_path / "out").exists()
