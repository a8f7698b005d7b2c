"""Objectives between the views of an image, and their projection heads: NT-Xent (SimCLR) and BYOL."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aclip import dist
from aclip.config import Count, Pass, Positive
from aclip.ema import frozen_copy
from aclip.errors import ConfigError
from aclip.objectives.base import Objective
from aclip.objectives.functional import byol_loss, ntxent_loss
from aclip.structs import StepContext, TowerShape


class NtXent(Objective):
    """NT-Xent (`functional.ntxent_loss`) between the views of a pass, through its own head on the normed CLS token.

    Head: Linear(C, hidden) BN ReLU Linear(hidden, hidden) BN ReLU Linear(hidden, out), with biases, run once on all
    views, so that batch statistics are over V x B rows. With more than two views: the mean over all pairs of views.

    Reads one image pass.

    Args:
        hidden, out: widths of the head; `hidden` None is the paper's, see `hidden_width`.
        temperature: tau.
        views: the two view numbers to compare; None compares every pair. (0, 0), a view with itself, is what the A-CLIP
            release computes by mistake.
    """

    def __init__(self, reads: Mapping[str, Pass], shape: TowerShape, hidden: Count | None = None, out: Count = 256,
                 temperature: Positive = 0.1, views: tuple[int, int] | None = None) -> None:
        super().__init__(reads, shape)
        (name, seen), = reads.items()
        count = len(seen.views)
        self.pairs = [views] if views else list(combinations(range(count), 2))
        if not self.pairs or max(map(max, self.pairs)) >= count:
            raise ConfigError(f"objective 'ntxent' compares two views, but pass '{name}' has {count}: "
                              f"{', '.join(seen.views)}")
        self.temperature = temperature
        hidden = hidden or hidden_width(shape)
        self.head = mlp([shape.width, hidden, hidden, out], bias=True)

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        cls = context.passes[self.reads[0]].cls
        z = self.head(cls.flatten(0, 1)).unflatten(0, cls.shape[:2])
        return torch.stack([ntxent_loss(z[i], z[j], self.temperature) for i, j in self.pairs]).mean()


class Byol(Objective):
    """The mean over views of 2 - 2 cos(predictor(projector(cls)), projector_ema(cls_ema)) (`functional.byol_loss`).

    Projector Linear(C, hidden) BN ReLU Linear(hidden, out), predictor Linear(out, hidden) BN ReLU Linear(hidden, out),
    without biases and without a last BN. The EMA projector normalises with the statistics of the batch. A target pass
    with one view is every online view's target (A-CLIP); with several, each online view regresses on the other views'
    targets (BYOL).

    Reads the online pass, then the target pass.

    Args:
        hidden, out: widths of projector and predictor; `hidden` None is the paper's, see `hidden_width`.
    """

    takes = (Pass, Pass)

    def __init__(self, reads: Mapping[str, Pass], shape: TowerShape, hidden: Count | None = None,
                 out: Count = 256) -> None:
        super().__init__(reads, shape)
        (online_name, online), (target_name, target) = reads.items()
        if target.encoder != "ema":
            raise ConfigError(f"objective 'byol' regresses on an EMA pass, but '{target_name}' is {target.encoder}")
        self.pairs = [(i, j) for i, seen in enumerate(online.views) for j, view in enumerate(target.views)
                      if len(target.views) == 1 or view != seen]
        if len({i for i, _ in self.pairs}) < len(online.views):
            raise ConfigError(f"objective 'byol': a view of pass '{online_name}' has no target: add another view to "
                              f"pass '{target_name}'")
        hidden = hidden or hidden_width(shape)
        self.projector = mlp([shape.width, hidden, out], bias=False)
        self.predictor = mlp([out, hidden, out], bias=False)
        self.ema_projector = frozen_copy(self.projector)

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        online, target = (context.passes[name].cls for name in self.reads)
        predictions = self.predictor(self.projector(online.flatten(0, 1))).unflatten(0, online.shape[:2])
        with torch.no_grad():
            targets = self.ema_projector(target.flatten(0, 1)).unflatten(0, target.shape[:2])
        return torch.stack([byol_loss(predictions[i], targets[j]) for i, j in self.pairs]).mean()

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.projector, self.ema_projector)]


def hidden_width(shape: TowerShape) -> int:
    """Return the hidden width of the heads: 4096 as in the A-CLIP paper, 16/3 of the width for towers below 768."""
    return min(4096, shape.width * 16 // 3)


def mlp(widths: Sequence[int], bias: bool) -> nn.Sequential:
    """Return Linear (BatchNorm ReLU Linear)*: a projection head; no norm or activation after the last."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        if i > 0:
            layers += [BatchNorm1d(widths[i]), nn.ReLU(inplace=True)]
        layers.append(nn.Linear(widths[i], widths[i + 1], bias=bias))
    return nn.Sequential(*layers)


class BatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation over the rows of all ranks, so that N ranks equal one process with the whole batch.

    Ranks exchange moments, on any device; torch's `SyncBatchNorm` does so too, but runs on CUDA alone. Every rank must
    pass equally many rows.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, input: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
        if not self.training or dist.world_size() == 1:
            return super().forward(input)
        rows = input.float()
        mean = _mean_over_ranks(rows)
        centred = rows - mean
        variance = _mean_over_ranks(centred.square())
        count = len(rows) * dist.world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return (centred * (variance + self.eps).rsqrt() * self.weight + self.bias).to(input.dtype)


def _mean_over_ranks(rows: Float[Tensor, "B C"]) -> Float[Tensor, " C"]:
    return dist.gather(rows.mean(dim=0, keepdim=True)).mean(dim=0)
