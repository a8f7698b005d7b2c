"""AdamW with the groups that CLIP training wants."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aclip.config import Optimization
from aclip.engine.shards import StoredTensors
from aclip.errors import CheckpointError

# By name, for parameters with two dimensions that are not matrices of a linear map.
_NEVER_DECAYED = ("positional_embedding", "class_embedding", "logit_scale", "logit_bias")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a weight decay."""

    title: str
    weight_decay: float
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    @property
    def count(self) -> int:
        """Number of scalars."""
        return sum(p.numel() for p in self.parameters)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Split the trainable parameters: matrices decay; vectors, norms, positions and logit_scale do not."""
    matrices: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith(_NEVER_DECAYED)
            (matrices if decays else others).append((name, parameter))
    return [
        ParameterGroup(title, decay, *zip(*members, strict=True))
        for title, decay, members in (
            ("matrices", weight_decay, matrices),
            ("vectors, norms, positions, logit_scale", 0.0, others),
        )
        if members
    ]


def build_optimizer(groups: list[ParameterGroup], settings: Optimization) -> torch.optim.AdamW:
    """Return AdamW over the groups; the learning rate is set before every step by the schedule.

    Fused where torch has it: one pass over parameters, gradients and both moments, where `foreach` makes
    ten.
    """
    split = []  # one call of the fused kernel takes sharded tensors or whole ones
    for g in groups:
        for sharded in (False, True):
            members = [p for p in g.parameters if isinstance(p, DTensor) == sharded]
            if members:
                split.append({"params": members, "weight_decay": g.weight_decay})
    return torch.optim.AdamW(
        split, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, groups: list[ParameterGroup]) -> dict[str, Tensor]:
    """Return the optimizer's state as named tensors: `<parameter>/<key>`."""
    tensors = {}
    for group in groups:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}/{key}"] = value
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, groups: list[ParameterGroup], stored: StoredTensors, prefix: str = "optimizer/"
) -> None:
    """Put back what `optimizer_tensors` returned and a checkpoint holds below `prefix`.

    What is shaped like its parameter lies where that lies, sharded or whole.

    Raises:
        CheckpointError: it is not all there.
    """
    keys: dict[str, list[str]] = {}
    for path in stored:
        name, _, key = path.removeprefix(prefix).rpartition("/")
        if path.startswith(prefix):
            keys.setdefault(name, []).append(key)
    for group in groups:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            if keys and name not in keys:
                raise CheckpointError(f"there is no state of the optimizer for '{name}' in it")
            state = optimizer.state[parameter] = {}
            for key in keys.get(name, ()):
                path = f"{prefix}{name}/{key}"
                if parameter.ndim and stored.shape(path) == tuple(parameter.shape):
                    state[key] = torch.zeros_like(parameter.detach())
                    stored.fill(path, state[key])
                else:
                    state[key] = stored[path].to(parameter.device, copy=True)
