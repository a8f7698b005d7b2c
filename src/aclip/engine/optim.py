"""AdamW with the groups that CLIP training wants."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aclip.config import Optimization

# By name, for parameters with two dimensions that are not matrices of a linear map.
_NEVER_DECAYED = (
    "positional_embedding", "class_embedding", "logit_scale", "logit_bias",
    "pos_embed", "cls_token", "reg_token", "attn_pool.latent",  # timm's
)


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
    return torch.optim.AdamW(
        [{"params": list(g.parameters), "weight_decay": g.weight_decay} for g in groups],
        lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True,
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
    optimizer: torch.optim.Optimizer, groups: list[ParameterGroup], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        by_parameter.setdefault(name, {})[key] = value
    for group in groups:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            optimizer.state[parameter] = {
                key: value.to(parameter.device, copy=True) for key, value in by_parameter[name].items()
            }
