"""megatron-core behind this project's own words: the only module that imports it.

Topology (``parallel_state``), the autograd collectives of tensor and sequence parallelism, and the 1F1B pipeline
schedule. Checked with megatron-core 0.12 to 0.16. megatron is imported when a function first needs it, after the
facade is in place, so that a single device never pays for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..breakdown import Mark, unmarked
from . import facade

_DESCRIPTIONS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "replicas",
}
"""What megatron-core calls the groups that ``groups`` returns."""


def initialise(tp: int, cp: int, pp: int, device: torch.device, options: Mapping[str, Any] | None = None) -> None:
    """Split the initialised default process group into tensor, context, pipeline and data-parallel groups.

    ``options`` are the backend's options of groups by their axis, as ``groups`` names them.
    """
    facade.install(device)
    # It tells of accelerations that nothing here uses, and how to start its own trainer.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # It calls collectives by names that PyTorch is renaming.
    warnings.filterwarnings(
        "ignore", message=r".*(reduce_scatter|all_gather)\w*. is deprecated", category=FutureWarning
    )
    from megatron.core import parallel_state

    named = options or {}
    with facade.group_options({text: named.get(axis) for text, axis in _DESCRIPTIONS.items()}):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp
        )


def finalise() -> None:
    """Destroy the groups made by ``initialise``."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def groups() -> dict[str, Any]:
    """Return the process groups of this rank by axis: tp, cp, pp, dp, and replicas (cp within dp).

    The first and the last of several pipeline stages have one more: ends, the two of them.
    """
    from megatron.core import parallel_state as state

    staged = state.get_pipeline_model_parallel_world_size() > 1
    ends = {"ends": state.get_embedding_group()} if staged and state.is_rank_in_embedding_group() else {}
    return {
        "tp": state.get_tensor_model_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "dp": state.get_data_parallel_group(),
        "replicas": state.get_data_parallel_group(with_context_parallel=True),
        **ends,
    }


def enter(x: Tensor, sequence: bool) -> Tensor:
    """Leave the input as it is, or with ``sequence`` join its tokens; backward adds up over tensor-parallel ranks."""
    from megatron.core.tensor_parallel import mappings

    if sequence:
        return mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True)
    return mappings.copy_to_tensor_model_parallel_region(x)


def reduce(x: Tensor, sequence: bool) -> Tensor:
    """Add up over tensor-parallel ranks; with ``sequence`` each rank keeps its share of the tokens (dim 0)."""
    from megatron.core.tensor_parallel import mappings

    if sequence:
        return mappings.reduce_scatter_to_sequence_parallel_region(x)
    return mappings.reduce_from_tensor_model_parallel_region(x)


def sum_over_features(x: Tensor) -> Tensor:
    """Add up over tensor-parallel ranks what each goes on to use for its own features: backward adds up too."""
    from megatron.core.tensor_parallel import mappings

    return mappings.copy_to_tensor_model_parallel_region(mappings.reduce_from_tensor_model_parallel_region(x))


def gather_features(x: Tensor) -> Tensor:
    """Join the ranks' slices of the last dim."""
    from megatron.core.tensor_parallel import mappings

    return mappings.gather_from_tensor_model_parallel_region(x)


class _Stage:
    """What the schedule asks of a model chunk."""

    share_embeddings_and_output_weights = False
    vp_stage = None

    def __init__(self, config: Any, model_type: Any) -> None:
        self.config, self.model_type = config, model_type
        self.input: Tensor | None = None

    def set_input_tensor(self, tensor: Any) -> None:
        self.input = tensor[0] if isinstance(tensor, list) else tensor


class _Timer:
    """What the schedule asks of a timer; it has one for forwards, one for backwards, and others around transfers."""

    def __init__(self, name: str, mark: Mark) -> None:
        self.phase, self.mark = {"forward-compute": "forward", "backward-compute": "backward"}.get(name), mark

    def start(self, barrier: bool = False) -> None:
        if self.phase is not None:
            self.mark(self.phase)

    def stop(self, barrier: bool = False) -> None:
        if self.phase is not None:
            self.mark("pipeline")


def one_f_one_b(
    step: Callable[[Any, Tensor | None], Tensor],
    batches: list[Any],
    *,
    last: bool,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    pp: int,
    no_sync: Callable[[], AbstractContextManager[None]],
    mark: Mark = unmarked,
) -> None:
    """Run forward and backward of all micro-batches through the pipeline, one forward one backward.

    ``step(batch, received)`` returns what the stage hands on ``[rows, width]``, or on the last stage the scalar to
    differentiate. ``shapes`` are the (rows, width) at the stage boundary, one a micro-batch; where they differ each
    transfer is preceded by its shape. Gradients are reduced only outside ``no_sync``. ``mark`` is told where a forward,
    a backward, or what lies between them begins: transfers and waiting for other stages.
    """
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
    from megatron.core.transformer import TransformerConfig

    rows, width = shapes[0]
    config = TransformerConfig(
        num_layers=pp,
        hidden_size=width,
        num_attention_heads=1,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=dtype,
        variable_seq_lengths=len(set(shapes)) > 1,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
    )
    config.no_sync_func = no_sync
    if mark is not unmarked:
        config.timers = lambda name, log_level=0: _Timer(name, mark)
    stage = _Stage(config, ModelType.encoder_or_decoder)

    def forward(source: Iterator[Any], model: _Stage) -> tuple[Tensor, Callable[[Tensor], Any]]:
        received = None if model.input is None else model.input.squeeze(1)
        out = step(next(source), received)
        count = torch.ones((), dtype=torch.int, device=out.device)
        return (out if last else out.unsqueeze(1)), lambda loss: (loss, count, {})

    mark("pipeline")
    with facade.active():
        forward_backward_pipelining_without_interleaving(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=stage,
            num_microbatches=len(batches),
            seq_length=rows,
            micro_batch_size=1,
            forward_only=False,
        )
