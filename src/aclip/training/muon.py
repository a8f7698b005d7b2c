"""Muon: orthogonalised momentum for the hidden matrices, AdamW for everything else."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from aclip.ema import local_shard

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x^3, x^5; K. Jordan, kellerjordan.github.io/posts/muon
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are replaced by the nearest semi-orthogonal ones (Jordan et al., 2024), and fused AdamW.

        M <- momentum M + G;    W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) NewtonSchulz(G + momentum M)

    as in `torch.optim.Muon`, which lacks sharded parameters, packed projections and `found_inf`. Matrices of one shape
    are orthogonalised together; a packed projection of queries, keys and values is three matrices.

    Args:
        groups: of parameters. Those with `muon=True` hold matrices and have `momentum` and `weight_decay`; a parameter
            in their `packed` is three matrices, one below the other. The others are AdamW's.
        dtype: of the Newton-Schulz iteration.
        adamw: arguments of `torch.optim.AdamW`.
    """

    _step_supports_amp_scaling = True  # `found_inf` is obeyed here, without a synchronisation

    def __init__(self, groups: Sequence[dict[str, Any]], dtype: torch.dtype = torch.bfloat16, **adamw: Any) -> None:
        super().__init__(groups, {"muon": False, "lr": adamw["lr"]})
        self._dtype = dtype
        others = [group for group in self.param_groups if not group["muon"]]
        self._adamw = torch.optim.AdamW(others, fused=True, **adamw) if others else None
        if self._adamw is not None:
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters; with `found_inf` set to 1, leave everything as it is."""
        skip = getattr(self, "found_inf", None)
        if self._adamw is not None:
            self._adamw.found_inf = skip  # type: ignore[attr-defined]
            self._adamw.step()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"] and parameters:
                self._update(parameters, group, torch.zeros(()) if skip is None else skip)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any], skip: Tensor) -> None:
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        skip = skip.to(parameters[0].device).view(())
        gradients = [torch.where(skip > 0, 0.0, local_shard(p.grad)) for p in parameters if p.grad is not None]
        own = [local_shard(buffer) for buffer in buffers]
        torch._foreach_mul_(own, torch.lerp(torch.full_like(skip, group["momentum"]), torch.ones_like(skip), skip))
        torch._foreach_add_(own, gradients)
        ahead = torch._foreach_add(gradients, own, alpha=group["momentum"])

        whole = [_whole(update, p) for update, p in zip(ahead, parameters, strict=True)]
        parts = [part for update, p in zip(whole, parameters, strict=True)
                 for part in (update.chunk(3) if p in group["packed"] else (update,))]
        found = iter(_orthogonalized(parts, self._dtype))
        updates = [_shard_like(p, torch.cat([next(found) for _ in range(3)]) if p in group["packed"] else next(found))
                   for p in parameters]
        weights = [local_shard(p) for p in parameters]
        taken = group["lr"] * (1.0 - skip)
        torch._foreach_mul_(weights, 1.0 - taken * group["weight_decay"])
        torch._foreach_mul_(updates, -taken)
        torch._foreach_add_(weights, updates)


def newton_schulz(
    matrices: Float[Tensor, "M R C"], dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "M R C"]:
    """Return matrices with the singular vectors of the given ones and singular values near 1 (between 0.7 and 1.2).

    Args:
        matrices: none has more rows than columns.
        dtype: of the iteration and of the result.
    """
    a, b, c = _NEWTON_SCHULZ
    x: Tensor = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _orthogonalized(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return `sqrt(max(1, rows / columns)) newton_schulz(matrix)` of each, in fp32; those of one shape at once."""
    members: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        members.setdefault((min(rows, columns), max(rows, columns)), []).append(index)
    found: dict[int, Tensor] = {}
    for (fewer, _), indices in members.items():
        wide = [matrices[i] if matrices[i].shape[0] == fewer else matrices[i].mT for i in indices]
        for index, result in zip(indices, newton_schulz(torch.stack(wide), dtype).float(), strict=True):
            rows, columns = matrices[index].shape
            found[index] = result if rows <= columns else result.mT * (rows / columns) ** 0.5
    return [found[index] for index in range(len(matrices))]


def _whole(own: Tensor, like: Tensor) -> Tensor:
    """Return the whole of a tensor of which this rank holds what it holds of `like`."""
    if not isinstance(like, DTensor):
        return own
    shard = DTensor.from_local(own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return shard.full_tensor()


def _shard_like(like: Tensor, whole: Tensor) -> Tensor:
    """Return this rank's part of a tensor that every rank has whole."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
