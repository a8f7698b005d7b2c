"""The exponential moving average of modules: what scores patches and what BYOL regresses on."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aclip import dist


def frozen_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module` whose parameters take no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


class Ema:
    """Averages pairs of modules in place: theta_ema <- m theta_ema + (1 - m) theta.

    Parameters and floating-point buffers are averaged, integer buffers (batch counters) copied. One
    `foreach` call for all of them, without host synchronisation. Over ranks, tensors sharded by FSDP are averaged where
    they lie; build it after sharding.

    Args:
        pairs: (online module, its `frozen_copy`), in any number.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        self._online: list[Tensor] = []
        self._average: list[Tensor] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        for online, average in pairs:
            for source, target in zip(_tensors(online), _tensors(average), strict=True):
                if target.is_floating_point():
                    self._online.append(source)
                    self._average.append(target)
                else:
                    self._copied.append((source, target))

    @torch.no_grad()
    def update(self, momentum: float, skipped: Float[Tensor, ""] | None = None) -> None:
        """Move the averages; call once per optimizer step, after it.

        Args:
            momentum: m.
            skipped: on the device, 1 where the step was not taken, so that the averages stay as they are; else 0.
        """
        averages, online = [*map(_own_part, self._average)], [*map(_own_part, self._online)]
        if skipped is None:
            weights: Any = 1.0 - momentum
        else:
            weight = (1.0 - momentum) * (1.0 - skipped)
            weights = [weight.to(average.dtype) for average in averages]
        if averages:
            torch._foreach_lerp_(averages, online, weights)
        for source, target in self._copied:
            target.copy_(source)

    @torch.no_grad()
    def distance(self) -> Float[Tensor, ""]:
        """Return how far the averages are from what they average: |ema - online| / |online|, over all of them.

        The same on every rank; all must call it where tensors are sharded.
        """
        sharded, whole = torch.zeros(2, 2)
        for online, average in zip(self._online, self._average, strict=True):
            ours, theirs = _own_part(online).float(), _own_part(average).float()
            squares = torch.stack([(theirs - ours).square().sum(), ours.square().sum()])
            if isinstance(online, DTensor):
                sharded = sharded.to(squares.device) + squares
            else:
                whole = whole.to(squares.device) + squares
        difference, length = dist.sum_over_ranks(sharded) + whole.to(sharded.device)
        distance: Tensor = (difference / length).sqrt()
        return distance


def _own_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds: averaged tensors are sharded like what they average."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
