"""How large HCCL's communication buffers are, by group: on Ascend every group that is used holds two of its own."""

from __future__ import annotations

import math

import torch

from ..model import Model
from ..recipe import HcclBuffers, Recipe
from .apply import COMPUTE

MEGABYTE = 2**20


def sizes(recipe: Recipe, model: Model) -> dict[str, int]:
    """Return the size in MB of each group's buffers that the recipe sets; the others keep HCCL's own.

    With ``auto`` the groups tp, cp and pp hold the largest message of a micro-batch of the task's synthetic data: what
    goes from block to block, on one context-parallel rank. An all-reduce (tp without sequence) takes it twice, context
    parallelism exchanges queries, keys and values in one message.
    """
    wanted = recipe.parallel.hccl_buffers
    if wanted is None:
        return {}
    named = {axis: size for axis in HcclBuffers.groups() if (size := getattr(wanted, axis)) is not None}
    return {**(_adaptive(recipe, model) if wanted.auto else {}), **named}


def _adaptive(recipe: Recipe, model: Model) -> dict[str, int]:
    parallel = recipe.parallel
    one = recipe.model_copy(update={"global_batch": recipe.micro_batch})
    config = model.config(recipe)
    task = model.task(one, config)
    with torch.device("meta"):
        net = model.build(config)
    batch = task.encode(next(iter(task.synthetic(0, 1)))[0])
    elements = sum(math.prod(shape) for shape in net.shapes(batch).values()) / parallel.cp
    whole = elements * COMPUTE[recipe.precision].itemsize
    bytes_of = {
        "tp": whole if parallel.sequence else 2 * whole,
        "cp": 3 * whole / parallel.tp,
        "pp": whole / parallel.tp if parallel.sequence else whole,
    }
    return {axis: math.ceil(size / MEGABYTE) for axis, size in bytes_of.items() if getattr(parallel, axis) > 1}
