"""Low-rank adaptation (LoRA, arXiv 2106.09685): the matrices of the blocks stay as they are and learn small updates.

An update is a module `low_rank` beside the weight that it changes, so that state dicts hold both apart:

    attn.in_proj_weight   attn.low_rank.up, attn.low_rank.down    packed queries, keys and values, read in `blocks`
    mlp.c_fc.weight       mlp.c_fc.low_rank.up, ...               a linear map, by a hook on it
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aclip.config import Tower
from aclip.errors import ConfigError
from aclip.models.blocks import blocks_of
from aclip.models.text import can_cut, text_tower_of
from aclip.models.vision import visual_of, vit_of

_PART = ".low_rank."


class LowRank(nn.Module):
    """The update of a matrix W of (R, C): W + up down, of rank r; zero at first.

    Args:
        rows, columns: R and C. rank: r.
    """

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, columns), a=math.sqrt(5)))  # as peft
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B R"]:
        """Return what the update adds to x W^T."""
        return F.linear(F.linear(x, self.down), self.up)


def adapt(model: nn.Module, rank: int, towers: Sequence[Tower]) -> None:
    """Freeze a model and give every matrix of the blocks of its towers an update of this rank, which alone is trained.

    Raises:
        ConfigError: a rank that saves nothing, or a text tower that open_clip runs itself (not causal, as SigLIP's).
    """
    model.requires_grad_(False)
    stacks = [vit_of(visual_of(model)).stack] if "image" in towers else []
    if "text" in towers and hasattr(model, "logit_scale"):  # else it is an image tower alone
        if not can_cut(model):
            raise ConfigError("this text tower is not causal and EOT-pooled, and cannot learn low-rank updates: add "
                              "--lora-towers image")
        stacks.append(text_tower_of(model).transformer)
    for block in (block for stack in stacks for block in blocks_of(stack)):
        attn: Any = block.attn
        if hasattr(attn, "in_proj_weight"):
            _attach(attn, attn.in_proj_weight, rank)
        for linear in [part for part in block.modules() if isinstance(part, nn.Linear)]:
            _attach(linear, linear.weight, rank)
            linear.register_forward_hook(_add)


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which every matrix has taken in its update; one without updates as it is."""
    whole = {name: tensor for name, tensor in state.items() if _PART not in name}
    for name in state:
        if name.endswith(f"{_PART}up"):
            owner = name.removesuffix(f"{_PART}up")
            weight = next(one for one in (f"{owner}.weight", f"{owner}.in_proj_weight") if one in whole)
            whole[weight] = whole[weight] + state[name] @ state[f"{owner}{_PART}down"]
    return whole


def _attach(module: nn.Module, weight: Tensor, rank: int) -> None:
    rows, columns = weight.shape
    if rank >= min(rows, columns):
        raise ConfigError(f"--lora {rank} is no low rank for matrices of {rows} x {columns}: take less, such as 8")
    module.low_rank = LowRank(rows, columns, rank)


def _add(linear: Any, given: tuple[Tensor], output: Tensor) -> Tensor:
    return output + cast(Tensor, linear.low_rank(given[0]))
