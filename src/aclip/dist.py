"""Distribution as a leaf: every function is the identity on one process."""

from typing import Any

import torch
import torch.distributed as torch_dist
from jaxtyping import Shaped
from torch import Tensor


def world_size() -> int:
    """Return the number of processes."""
    return torch_dist.get_world_size() if torch_dist.is_available() and torch_dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, 0-based."""
    return torch_dist.get_rank() if torch_dist.is_available() and torch_dist.is_initialized() else 0


def gather(x: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "WB *rest"]:
    """Concatenate `x` of all ranks in rank order; gradients flow back to every rank's own rows.

    The backward pass sums over ranks what each computed for these rows, so that with gradients averaged
    over ranks the result is that of one process with the whole batch. Integers (caption ids) pass through
    without a gradient. Every rank must bring the same number of rows.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


def sum_over_ranks(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the sum of `x` over all ranks, the same on each of them, without a gradient.

    For statistics of the whole batch, such as counts and means. Every rank must bring the same shape.
    """
    total = x.detach()
    if world_size() > 1:
        total = total.clone()
        torch_dist.all_reduce(total)
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(world_size())]
        torch_dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        torch_dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]
