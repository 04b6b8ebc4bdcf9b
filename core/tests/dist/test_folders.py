"""Ranks save and start as one, or not at all."""

import torch.distributed as dist
from mindspeed_model_core import train
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing import toy
from mindspeed_model_core.testing.dist import run_dist


def _said(folder, own=True, **changes):
    """Train with a folder for each rank, as hosts without a shared file system have; return what the rank is told."""
    train._PATIENCE = 0.3
    try:
        train.run(toy.recipe(**changes), toy.TOY, folder / str(dist.get_rank()) if own else folder)
    except UserError as error:
        return str(error)
    return None


def test_folders_that_are_not_shared_are_refused_before_the_first_step(tmp_path):
    first, second = run_dist(_said, 2, tmp_path)
    assert first == second and "\n" not in first
    assert "rank 1 (host " in first and f"folder {tmp_path / '1'}) does not see the run folder of rank 0" in first
    assert list(tmp_path.iterdir()) == []
    assert run_dist(_said, 2, tmp_path / "one", own=False, steps=1) == [None, None]
    assert not list((tmp_path / "one").glob(".*"))


def _resumed(folder):
    real = train.starting_point
    train.starting_point = lambda *args: real(*args) if dist.get_rank() == 0 else folder / "checkpoints/step-00000002"
    try:
        train.run(toy.recipe(), toy.TOY, folder, resume=True)
    except UserError as error:
        return str(error)
    return None


def test_ranks_that_see_other_checkpoints_are_refused(tmp_path):
    train.run(toy.recipe(steps=4, checkpoint={"every": 2}), toy.TOY, tmp_path / "run")
    first, second = run_dist(_resumed, 2, tmp_path / "run")
    assert first == second and "would start from step-00000002, rank 0 from step-00000004" in first
