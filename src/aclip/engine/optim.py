"""AdamW with the groups that CLIP training wants."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aclip.config import Optimization
from aclip.engine.shards import StoredTensors
from aclip.errors import CheckpointError

# By name, for parameters with two dimensions that are not matrices of a linear map.
_NEVER_DECAYED = ("positional_embedding", "class_embedding", "logit_scale", "logit_bias")


_BLOCK = re.compile(r"(.*?transformer)\.resblocks\.(\d+)\.")
_AFTER_BLOCKS = ("ln_post", "ln_final", "text_projection", "visual.proj", "logit_scale", "logit_bias")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a weight decay and a factor on the learning rate."""

    title: str
    weight_decay: float
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    lr_factor: float = 1.0

    @property
    def count(self) -> int:
        """Number of scalars, over all ranks."""
        return sum(p.numel() for p in self.parameters)


def parameter_groups(module: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[ParameterGroup]:
    """Split the trainable parameters: matrices decay; vectors, norms, positions and logit_scale do not.

    Args:
        module: a method, or any part of it.
        weight_decay: of the matrices.
        layer_decay: d, on the learning rate: block i of a tower of n blocks learns at d^(n - i) of it, i = 1 .. n, its
            embeddings at d^n (BEiT, arXiv 2106.08254, appendix; what follows the blocks and heads at all of it).
    """
    members: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    heights = _heights(module)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith(_NEVER_DECAYED)
            factor = layer_decay ** _below_top(name, heights) if layer_decay != 1.0 else 1.0
            members.setdefault((decays, factor), []).append((name, parameter))
    titles = {True: ("matrices", weight_decay), False: ("vectors, norms, positions, logit_scale", 0.0)}
    groups = []
    for decays, factor in sorted(members, reverse=True):
        names, parameters = zip(*members[decays, factor], strict=True)
        groups.append(ParameterGroup(*titles[decays], names, parameters, factor))
    return groups


def _heights(module: nn.Module) -> dict[str, int]:
    """Return how many blocks each tower has: of the image tower "visual", of the text tower ""."""
    heights: dict[str, int] = {}
    for name, _ in module.named_parameters():
        block = _BLOCK.match(name)
        if block is not None and name.startswith("model."):
            tower = "visual" if "visual." in name else ""
            heights[tower] = max(heights.get(tower, 0), int(block[2]) + 1)
    return heights


def _below_top(name: str, heights: dict[str, int]) -> int:
    """Return how many blocks of its tower follow a parameter; 0 for heads and what is no tower's."""
    tower = "visual" if "visual." in name else ""
    if not name.startswith("model.") or any(part in name for part in _AFTER_BLOCKS):
        return 0
    block = _BLOCK.match(name)
    return heights.get(tower, 0) - (int(block[2]) + 1 if block is not None else 0)


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
                split.append({"params": members, "weight_decay": g.weight_decay, "lr_factor": g.lr_factor})
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
