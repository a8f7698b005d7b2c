"""AdamW or Muon over the parameter groups of CLIP training, their state by name, and norms of sharded gradients."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aclip import dist
from aclip.checkpoint import Checkpoint
from aclip.config import MuonConfig, Optimization
from aclip.ema import local_shard
from aclip.errors import CheckpointError
from aclip.models import INTO_JOINT_SPACE
from aclip.training.muon import Muon

# By name, for parameters with two dimensions that are not matrices of a linear map.
_NEVER_DECAYED = (
    "positional_embedding", "position_embeddings.weight", "class_embedding", "logit_scale", "logit_bias",
    "pos_embed", "cls_token", "reg_token", "attn_pool.latent", "rope.freqs",  # timm's
)
# open_clip's, timm's, and of Hugging Face's text towers (BERT's and RoBERTa's, T5's, NLLB's)
_BLOCK = re.compile(
    r".*?\.(?:resblocks|trunk\.blocks|text\.transformer\.(?:encoder\.layer|block|layers))\.(\d+)\.")
# open_clip's and timm's queries, keys and values, and what is added to them
_PACKED = ("attn.in_proj_weight", "attn.qkv.weight", "attn.low_rank.up", "attn.qkv.low_rank.up")
_AFTER_BLOCKS = (*INTO_JOINT_SPACE, "ln_post", "ln_final", "trunk.norm.", "trunk.fc_norm.", "trunk.attn_pool.",
                 "trunk.head.")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share an optimizer, a weight decay and a factor on the learning rate."""

    title: str
    weight_decay: float
    lr_factor: float
    parameters: Mapping[str, nn.Parameter]
    muon: MuonConfig | None = None


def parameter_groups(
    module: nn.Module, weight_decay: float, layer_decay: float = 1.0, muon: MuonConfig | None = None
) -> list[ParameterGroup]:
    """Split the trainable parameters: matrices decay; vectors, norms, positions and logit_scale do not.

    Args:
        module: a method, or any part of it.
        weight_decay: of the matrices that are AdamW's.
        layer_decay: d, on the learning rate: block i of a tower of n blocks learns at d^(n - i) of it, i = 1 .. n, its
            embeddings at d^n (BEiT, arXiv 2106.08254, appendix); what follows the blocks, and heads, at all of it.
        muon: settings of the matrices inside the blocks of both towers; None: they are AdamW's, too.
    """
    members: dict[tuple[str, float], dict[str, nn.Parameter]] = {}
    depths = _depths(module)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            factor = layer_decay ** _blocks_above(name, depths) if layer_decay != 1.0 else 1.0
            kind = "vectors, norms, positions, logit_scale"
            if parameter.ndim >= 2 and not name.endswith(_NEVER_DECAYED):
                kind = "matrices"
                if muon is not None and parameter.ndim == 2 and _BLOCK.match(name):
                    kind, factor = "hidden matrices, by Muon", factor * muon.lr_ratio
            members.setdefault((kind, factor), {})[name] = parameter
    groups = []
    for (kind, factor), parameters in sorted(members.items(), key=lambda item: item[0]):
        own = muon if "Muon" in kind else None
        decay = own.weight_decay if own else weight_decay if kind == "matrices" else 0.0
        groups.append(ParameterGroup(kind, decay, factor, parameters, own))
    return groups


def build_optimizer(
    groups: Sequence[ParameterGroup], settings: Optimization, dtype: torch.dtype = torch.bfloat16
) -> torch.optim.Optimizer:
    """Return fused AdamW over the groups, or Muon, which orthogonalises in `dtype`.

    The schedule sets the learning rate before every step.
    """
    split: list[dict[str, Any]] = []  # one call of the fused kernel takes sharded tensors or whole ones
    for group in groups:
        for sharded in (False, True):
            members = {name: p for name, p in group.parameters.items() if isinstance(p, DTensor) == sharded}
            if members:
                split.append({"params": list(members.values()), "weight_decay": group.weight_decay,
                              "lr_factor": group.lr_factor})
                if group.muon is not None:
                    packed = {p for name, p in members.items() if name.endswith(_PACKED)}
                    split[-1] |= {"muon": True, "momentum": group.muon.momentum, "packed": packed}
    adamw = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if any(group.muon is not None for group in groups):
        return Muon(split, dtype, **adamw)
    return torch.optim.AdamW(split, fused=True, **adamw)  # type: ignore[arg-type]


def optimizer_state(optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup]) -> dict[str, Tensor]:
    """Return the optimizer's state by name: `PARAMETER/KEY`."""
    return {f"{name}/{key}": value for group in groups for name, parameter in group.parameters.items()
            for key, value in optimizer.state[parameter].items()}


def empty_optimizer_state(
    optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup], stored: Checkpoint, prefix: str
) -> dict[str, Tensor]:
    """Give every parameter the state that a checkpoint holds for it below `prefix`, zeros for now; return it by name.

    What is shaped like its parameter lies where that lies, sharded or whole.

    Raises:
        CheckpointError: it holds state for other parameters.
    """
    keys: dict[str, list[str]] = {}
    for path in stored.shapes:
        if path.startswith(prefix):
            name, _, key = path.removeprefix(prefix).rpartition("/")
            keys.setdefault(name, []).append(key)
    for group in groups:
        for name, parameter in group.parameters.items():
            if keys and name not in keys:
                raise CheckpointError(f"the checkpoint {stored.path} has no optimizer state for '{name}'")
            state = optimizer.state[parameter] = {}
            for key in keys.get(name, ()):
                shape = stored.shapes[f"{prefix}{name}/{key}"]
                if parameter.ndim and shape == parameter.shape:
                    state[key] = torch.zeros_like(parameter.detach())
                else:
                    state[key] = torch.zeros(shape, device=parameter.device)
    return optimizer_state(optimizer, groups)


def total_norm(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Return the Euclidean norm of all tensors together, float32; the same on every rank.

    Sharded tensors are summed over ranks, replicated ones counted once; the device is not waited for.
    """
    whole = [t for t in tensors if not isinstance(t, DTensor)]
    shards = [t.to_local() for t in tensors if isinstance(t, DTensor)]
    square = nn.utils.get_total_norm(whole, foreach=True).float().square()
    if shards:
        own = nn.utils.get_total_norm([t for t in shards if t.numel()], foreach=True).float().square()
        square = square.to(shards[0].device) + dist.sum_over_ranks(own.to(shards[0].device))
    return square.sqrt()


@torch.no_grad()
def clip_gradients(tensors: Sequence[Tensor], norm: Float[Tensor, ""], max_norm: float) -> None:
    """Scale all tensors in place so that their norm, which is `norm`, is at most `max_norm`."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_shard(t) for t in tensors], factor)


def _depths(module: nn.Module) -> dict[str, int]:
    """Return how many blocks each tower has: of the image tower "visual", of the text tower ""."""
    depths: dict[str, int] = {}
    for name, _ in module.named_parameters():
        block = _BLOCK.match(name)
        if block is not None and name.startswith("model."):
            tower = "visual" if "visual." in name else ""
            depths[tower] = max(depths.get(tower, 0), int(block[1]) + 1)
    return depths


def _blocks_above(name: str, depths: Mapping[str, int]) -> int:
    """Return how many blocks of its tower follow a parameter; 0 for heads and for anything outside the towers."""
    if not name.startswith("model.") or any(part in name for part in _AFTER_BLOCKS):
        return 0
    block = _BLOCK.match(name)
    depth = depths.get("visual" if "visual." in name else "", 0)
    return depth - (int(block[1]) + 1 if block is not None else 0)
