"""The norm of a gradient that may be sharded over ranks, and what is done with it, without waiting for the device."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from aclip import dist


def total_norm(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return the Euclidean norm of all tensors together, float32; the same on every rank.

    What is sharded over ranks is summed over them, what is whole on every rank is counted once.
    """
    whole = [t for t in tensors if not isinstance(t, DTensor)]
    own = [t.to_local() for t in tensors if isinstance(t, DTensor)]
    square = _square_sum(whole)
    if own:
        square = square + dist.sum_over_ranks(_square_sum(own))
    return square.sqrt()


@torch.no_grad()
def clip_to(tensors: Sequence[Tensor], norm: Float[Tensor, ""], longest: float) -> None:
    """Scale all tensors so that their norm, which is `norm`, is at most `longest`."""
    factor = (longest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([t.to_local() if isinstance(t, DTensor) else t for t in tensors], factor)


def _square_sum(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    filled = [t for t in tensors if t.numel()]  # a rank may hold none of a small tensor
    if not filled:
        return torch.zeros((), device=tensors[0].device if tensors else None)
    return torch.stack([*torch._foreach_norm(filled)]).float().square().sum()
