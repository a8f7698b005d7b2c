"""Distribution as a leaf: every function is the identity on one process."""

import os
from collections.abc import Callable
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


def processes_here() -> int:
    """Return how many processes share this machine's cores and memory: torchrun's; Slurm gives each task its own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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


def sum_with_gradient(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the sum of `x` over all ranks, the same on each of them; gradients flow back to every rank's share.

    The backward pass sums over ranks what each computed for the sum, as `gather` does. Every rank must bring the same
    shape.
    """
    if world_size() == 1:
        return x
    total: Tensor = _Sum.apply(x)
    return total


def collect(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order, on all ranks; for small things that are no tensors.

    The objects are pickled between processes of one run, which trust each other; nothing of it comes from a file.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Return when every rank has come here."""
    collect(None)


class Vote:
    """Tells every rank whether any of them raised its hand, without making the step wait.

    On several ranks the answer is that of the call before: the exchange of this one goes on beside the next step, on
    the CPU, so that neither the device nor the other ranks are waited for. On one process it is immediate. Every rank
    must call it equally often.
    """

    def __init__(self) -> None:
        self._flag = torch.zeros((), dtype=torch.int32)
        self._pending: Any = None

    def cast(self, raised: bool) -> bool:
        """Raise this rank's hand, or not; return whether anyone's was up."""
        if world_size() == 1:
            return raised
        before = self.close()
        self._flag = torch.tensor(int(raised), dtype=torch.int32)
        self._pending = torch_dist.all_reduce(self._flag, torch_dist.ReduceOp.MAX, async_op=True)
        return before

    def close(self) -> bool:
        """Return the answer to the call before, once it is there."""
        if self._pending is None:
            return False
        self._pending.wait()
        self._pending = None
        return bool(self._flag)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch_dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        torch_dist.all_reduce(grad)
        return grad


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = x.new_empty((world_size() * len(x), *x.shape[1:]))
        _named("all_gather_single", "all_gather_into_tensor")(rows, x.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        own = grad.new_empty((len(grad) // world_size(), *grad.shape[1:]))
        _named("reduce_scatter_single", "reduce_scatter_tensor")(own, grad)
        return own


def _named(name: str, before: str) -> Callable[[Tensor, Tensor], Any]:
    """Return a collective by its name from torch 2.14 on, where the one that it had before warns in every process."""
    found: Callable[[Tensor, Tensor], Any] = getattr(torch_dist, name, None) or getattr(torch_dist, before)
    return found
