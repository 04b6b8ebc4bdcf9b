"""Llama-2 beside transformers, eager, compiled and with Liger's kernels: ``python peers.py --help``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from mindspeed_model_core.data import IGNORE
from mindspeed_model_core.perf.peers import Comparison, main
from mindspeed_model_core.perf.sides import COMPILE, Peer, restored
from mindspeed_model_core.trunk import Batch
from mindspeed_model_llama2 import MODEL
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

LIGER = "liger"


def build(config: Any, recipe: Any) -> nn.Module:
    """Return transformers' network, its attention by PyTorch's fused one, which is its default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    sizes = config.model_dump(exclude={"rope_theta"})
    net = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope, tie_word_embeddings=False, use_cache=False))
    if recipe.recompute == "all":
        net.gradient_checkpointing_enable()
    return net


@contextmanager
def liger() -> Iterator[None]:
    """Have Liger's kernels in the place of transformers' for the life of a network."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama as modeling

    with restored(modeling, modeling.LlamaForCausalLM):
        apply_liger_kernel_to_llama()
        yield


def rows(batch: Batch) -> Iterator[Batch]:
    """Yield sequences as rows: each is one document, of one length."""
    yield {key: batch[key].view(-1, batch["lengths"][0]) for key in ("tokens", "labels")}


def padded(documents: int) -> Callable[[Batch], Iterator[Batch]]:
    """Return what yields so many documents at a time, padded to the longest of them.

    The padding is on the right, where a causal network needs no mask and so keeps its fastest attention; documents are
    sorted by length, as trainers do to pad less.
    """

    def split(batch: Batch) -> Iterator[Batch]:
        pairs = zip(*(batch[key].split(batch["lengths"]) for key in ("tokens", "labels")), strict=True)
        ordered = sorted(pairs, key=lambda pair: len(pair[0]))
        for first in range(0, len(ordered), documents):
            tokens, labels = zip(*ordered[first : first + documents], strict=True)
            yield {
                "tokens": pad_sequence(tokens, batch_first=True),
                "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
            }

    return split


def loss(net: nn.Module, batch: Batch, count: int) -> Tensor:
    """Return transformers' own loss of rows whose labels are shifted already."""
    labels = batch["labels"]
    return net(batch["tokens"], labels=labels, shift_labels=labels, num_items_in_batch=count).loss


def peer(mode: str, *overrides: str, documents: int | None = None) -> Peer:
    """Return transformers in a mode, on whole sequences or on so many padded documents at a time."""
    return Peer(
        "transformers",
        build,
        loss,
        mode=mode,
        split=rows if documents is None else padded(documents),
        overrides=overrides,
        settings="" if documents is None else f"{documents} padded documents at once",
        needs=("liger-kernel",) if mode == LIGER else (),
        accelerator=mode == LIGER,
        around=liger if mode == LIGER else nullcontext,
    )


MASTERS = ("precision=bf16",)
ONE_GRAPH = "compile=whole"
MIXED = "data.synthetic_document=512"

COMPARISONS = (
    Comparison(
        "7b",
        "7b-one-device",
        ours=((), ("micro_batch=4",), MASTERS),
        peers=(
            peer("eager"),
            peer("eager", "micro_batch=1"),
            peer(COMPILE),
            peer(COMPILE, "micro_batch=1"),
            peer(LIGER),
            peer(LIGER, "micro_batch=1"),
            peer(LIGER, "micro_batch=4"),
        ),
    ),
    Comparison(
        "7b-packed",
        "7b-one-device",
        overrides=(MIXED,),
        peers=(*(peer("eager", documents=n) for n in (4, 8)), *(peer(LIGER, documents=n) for n in (4, 8))),
    ),
    Comparison("tiny", "tiny-text", ours=((), (ONE_GRAPH,)), peers=(peer("eager"), peer(COMPILE)), tiny=True),
    Comparison(
        "tiny-packed",
        "tiny-text",
        overrides=("data.synthetic_document=32",),
        peers=tuple(peer("eager", documents=n) for n in (4, 16)),
        tiny=True,
    ),
)

if __name__ == "__main__":
    main(MODEL, COMPARISONS, __file__)
