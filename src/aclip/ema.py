"""The exponential moving average (EMA) of modules: it scores patches and gives BYOL's targets."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aclip import dist


def frozen_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module` whose parameters require no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


class Ema:
    """Averages pairs of modules in place: theta_ema <- m theta_ema + (1 - m) theta.

    Parameters and floating-point buffers are averaged, in one `foreach` call without host synchronisation; integer
    buffers (batch counters) are copied. Across ranks, each rank averages its own shard of tensors sharded by FSDP, so
    create this after sharding.

    Args:
        pairs: (online module, its `frozen_copy`), any number of them.
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
        """Update the averages with momentum m; call once after each optimizer step.

        `skipped`, on the device, is 1 if the step was skipped, which leaves the averages as they are; else 0, or None.
        """
        averages, online = list(map(local_shard, self._average)), list(map(local_shard, self._online))
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
        """Return |ema - online| / |online| over all averaged tensors: () float32, the same on every rank.

        Across ranks it is a collective: every rank must call it.
        """
        sharded, whole = torch.zeros(2, 2)
        for online, average in zip(self._online, self._average, strict=True):
            ours, theirs = local_shard(online).float(), local_shard(average).float()
            squares = torch.stack([(theirs - ours).square().sum(), ours.square().sum()])
            if isinstance(online, DTensor):
                sharded = sharded.to(squares.device) + squares
            else:
                whole = whole.to(squares.device) + squares
        difference, length = dist.sum_over_ranks(sharded) + whole.to(sharded.device)
        distance: Tensor = (difference / length).sqrt()
        return distance


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
