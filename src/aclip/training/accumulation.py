"""Large batches in little memory: gradients through cached representations (GradCache)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from aclip.method import Method
from aclip.structs import Batch, Encoded, EncodedBatch, EncodedText, StepOutput

EncodedPart = TypeVar("EncodedPart", Encoded, EncodedText)

DIFFERENTIABLE = {Encoded: ("features", "cls", "patches"), EncodedText: ("features", "states")}
"""The fields that a gradient can reach."""


def accumulate(
    method: Method,
    batch: Batch,
    micro_batch: int,
    *,
    masked: bool,
    resolution: float,
    autocast: Callable[[], AbstractContextManager[Any]],
    scale: Callable[[Tensor], Tensor],
) -> StepOutput:
    """Compute the gradients of a whole batch while holding the activations of at most `micro_batch` samples.

    GradCache (Gao et al., arXiv 2101.06983), for every objective at once:

        1. encode the batch in parts without gradient:             r = f(x)
        2. compute the loss of the whole batch:                    L(r), dL/dr, and dL/dheads
        3. encode every part again and backpropagate its share of dL/dr

    Loss and gradients are those of one pass over the batch, up to rounding: heads with batch statistics see the whole
    batch, over all ranks, once; masks and passes without gradient are taken over from the first encoding; augmentations
    are functions of the sample. The price is a second forward pass of the online towers. What the objectives read is
    held for the whole batch: little for features, more where a decoder reads patches.

    Args:
        batch: this rank's share of the step.
        micro_batch: samples in a part; the last may be smaller.
        masked, resolution: as for `Method.forward`.
        autocast: makes the context in which the towers compute.
        scale: applied to the loss before it is differentiated (fp16).
    """
    parts = [slice(start, start + micro_batch) for start in range(0, batch.size, micro_batch)]
    with torch.no_grad(), autocast():
        whole = joined([method.encode_batch(batch.rows(part), masked, resolution) for part in parts])
    leaves = detached(whole)
    with autocast():
        output = method.compute_loss(leaves, batch.caption_ids)
    scale(output.loss).backward()
    for part in parts:
        with autocast():
            again = method.encode_batch(batch.rows(part), masked, resolution, earlier=rows_of(whole, part))
        outputs, gradients = gradients_of(again, leaves, part)
        if outputs:  # none where both towers are frozen
            torch.autograd.backward(outputs, gradients)
    return output


def joined(parts: Sequence[EncodedBatch]) -> EncodedBatch:
    """Return the parts of a batch as one."""
    def join(parts: Sequence[EncodedPart], dim: int) -> EncodedPart:
        tensors: dict[str, Any] = {key: torch.cat([getattr(part, key) for part in parts], dim)
                                   for key, value in vars(parts[0]).items() if isinstance(value, Tensor)}
        return replace(parts[0], **tensors)

    return EncodedBatch({name: join([part.texts[name] for part in parts], dim=0) for name in parts[0].texts},
                        {name: join([part.passes[name] for part in parts], dim=1) for name in parts[0].passes})


def rows_of(encoded: EncodedBatch, rows: slice) -> EncodedBatch:
    """Return some samples of an encoded batch."""
    return EncodedBatch({name: text.map(lambda tensor: tensor[rows]) for name, text in encoded.texts.items()},
                        {name: views.map(lambda tensor: tensor[:, rows]) for name, views in encoded.passes.items()})


def detached(encoded: EncodedBatch) -> EncodedBatch:
    """Return the same with leaves of the graph in place of what a gradient can reach."""
    def leaf(part: EncodedPart) -> EncodedPart:
        return replace(part, **{key: value.detach().requires_grad_() for key in DIFFERENTIABLE[type(part)]
                                if (value := getattr(part, key)) is not None})

    return EncodedBatch({name: leaf(text) for name, text in encoded.texts.items()},
                        {name: leaf(views) for name, views in encoded.passes.items()})


def gradients_of(again: EncodedBatch, leaves: EncodedBatch, rows: slice) -> tuple[list[Tensor], list[Tensor]]:
    """Return what came out of the second encoding of `rows`, and the gradient of the loss with respect to it."""
    outputs, gradients = [], []
    pairs: list[tuple[Any, Any, tuple[slice, ...]]] = [
        *((text, leaves.texts[name], (rows,)) for name, text in again.texts.items()),
        *((views, leaves.passes[name], (slice(None), rows)) for name, views in again.passes.items())]
    for part, whole, index in pairs:
        for key in DIFFERENTIABLE[type(part)]:
            value, leaf = getattr(part, key), getattr(whole, key)
            if value is not None and value.requires_grad and leaf.grad is not None:
                outputs.append(value)
                gradients.append(leaf.grad[index])
    return outputs, gradients
