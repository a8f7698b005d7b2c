"""Scores as they are kept for later epochs: a byte a patch."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def to_bytes(scores: Float[Tensor, "B N"]) -> UInt8[Tensor, "B N"]:
    """Return round(255 sqrt(s / max s)), the largest score of each row being 255.

    The root tells small scores apart, which decide what is kept: attention that gathers on a few patches leaves the
    others a hundredth of it. Of scores that `from_bytes` returned, these are the bytes that they came from.

    Args:
        scores: (B, N) not negative.
    """
    largest = scores.amax(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    return (scores / largest).sqrt().mul(255.0).round().to(torch.uint8)


def from_bytes(maps: UInt8[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Return the scores, relative to the largest of each row: (b / 255)^2, float32."""
    return (maps.float() / 255.0).square()
