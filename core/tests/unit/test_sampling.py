"""What goes with weights is found beside them or where a run had it, and options are checked before work begins."""

import json
from pathlib import Path

import pytest
import torch
from mindspeed_model_core import checkpoint
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.sampling import (
    Denoiser,
    check_options,
    find_encoders,
    find_scheduler,
    load_network,
    open_devices,
    pick_dtype,
    places,
)
from mindspeed_model_core.testing import toy
from mindspeed_model_core.train import run

NEEDED = ("vae", "words", "tokenizer")


def test_encoders_and_scheduler_are_beside_the_weights(tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    with pytest.raises(UserError, match="no vae/, words/ and tokenizer/ there; name their folder with --encoders"):
        find_encoders(folder, None, NEEDED)
    assert find_scheduler(folder) is None
    for name in (*NEEDED, "scheduler"):
        with pytest.raises(
            UserError, match=f"--encoders={tmp_path}: no {name}/ there; .* vae/, words/, tokenizer/, sched"
        ):
            find_encoders(folder, tmp_path, (*NEEDED, "scheduler"))
        (tmp_path / name).mkdir()
    assert find_encoders(folder / "any", tmp_path, NEEDED) == tmp_path
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"shift": 2}))
    assert find_encoders(folder, None, NEEDED) == find_encoders(tmp_path, None, NEEDED) == tmp_path
    assert find_scheduler(folder) == (path, {"shift": 2})


def test_a_run_has_them_where_its_recipe_says(tmp_path, monkeypatch):
    run(toy.recipe(), toy.TOY, tmp_path / "run")
    info = checkpoint.read_info(checkpoint.locate(tmp_path / "run"))
    info["recipe"] |= {"init_from": "base", "data": {"encoders": str(tmp_path / "enc")}}
    monkeypatch.setattr(checkpoint, "read_info", lambda path: info)
    assert [str(place) for place in places(tmp_path / "run")] == [str(tmp_path / "enc"), "base"]


def test_a_run_s_network_is_ready_to_sample(tmp_path):
    run(toy.recipe(), toy.TOY, tmp_path / "run")
    net = load_network(tmp_path / "run", toy.TOY, Mesh(torch.device("cpu")), torch.bfloat16)
    whole = checkpoint.open_weights(checkpoint.locate(tmp_path / "run"))
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, whole.read(name).bfloat16())
    with pytest.raises(UserError, match="holds no moving average; the run was trained without optim.ema"):
        load_network(tmp_path / "run", toy.TOY, Mesh(torch.device("cpu")), torch.float32, ema=True)
    seen = Denoiser(net, channels=3)
    assert (seen.dtype, seen.device.type, seen.config.channels) == (torch.bfloat16, "cpu", 3)
    with seen.cache_context("cond"):
        pass


def test_a_run_s_moving_average_is_sampled_from(tmp_path):
    run(toy.recipe(optim={"lr": 1e-2, "ema": 0.5}), toy.TOY, tmp_path / "run")
    plain, mean = (
        load_network(tmp_path / "run", toy.TOY, Mesh(torch.device("cpu")), torch.float32, ema=ema)
        for ema in (False, True)
    )
    held = checkpoint.open_weights(checkpoint.locate(tmp_path / "run"), ema=True)
    for (name, got), other in zip(mean.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(got, held.read(name)) and not torch.equal(got, other), name


def test_options_are_checked(tmp_path):
    (tmp_path / "a.png").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for options, said in (
        ((tmp_path / "a.gif", (".png", ".jpg"), False, None), "written as .png or .jpg"),
        ((tmp_path / "a.png", (".png",), False, None), "exists; choose another name"),
        ((tmp_path / "b.png", (".png",), False, "fp8"), "--dtype=fp8: must be bf16 or fp32"),
        ((tmp_path / "folder.png", (".png",), True, None), "--out=.*folder.png: is a folder; name a file"),
        ((tmp_path / "a.png" / "x.png", (".png",), False, None), "--out=.*x.png: .*/a.png is not a folder"),
        ((tmp_path / "gone" / "x.png", (".png",), True, None), "--out=.*x.png: .*/gone is not a folder"),
        ((tmp_path / f"{'x' * 300}.png", (".png",), False, None), "--out=.*x.png: cannot be written: File name too"),
        ((Path("/proc/x.png"), (".png",), False, None), "--out=/proc/x.png: cannot be written: "),
    ):
        with pytest.raises(UserError, match=said):
            check_options(*options)
    check_options(tmp_path / "a.png", (".png",), True, "bf16")
    check_options(tmp_path / "new" / "folder" / "a.png", (".png",), False, None)
    assert sorted(tmp_path.rglob("*")) == before
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert [pick_dtype(*case) for case in ((None, cpu), (None, other), ("fp32", other), ("bf16", cpu))] == [
        torch.float32,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    ]
    with open_devices(1, 1) as mesh:
        assert mesh.world == 1
