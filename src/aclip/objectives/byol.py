"""BYOL from the online encoder's views to the EMA encoder's."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aclip.config import Count, Pass
from aclip.ema import frozen_copy
from aclip.errors import ConfigError
from aclip.objectives.base import Objective
from aclip.objectives.functional import byol_loss
from aclip.objectives.heads import hidden_width, mlp
from aclip.structs import StepContext, TowerShape


class Byol(Objective):
    """The mean over views of 2 - 2 cos(predictor(projector(cls)), projector_ema(cls_ema)) (`functional.byol_loss`).

    Projector Linear(C, hidden) BN ReLU Linear(hidden, out), predictor Linear(out, hidden) BN ReLU Linear(hidden, out),
    without biases and without a last BN. The EMA projector normalises with the statistics of the batch. A target pass
    with one view is every online view's target (A-CLIP); with several, each online view regresses on the other views'
    targets (BYOL).

    Reads the online pass, then the target pass.

    Args:
        reads, shape: see `Objective`.
        hidden, out: widths of projector and predictor; `hidden` None is the paper's, see `heads.hidden_width`.

    Raises:
        ConfigError: a target pass of the online encoder, or an online view without a target.
    """

    takes = (Pass, Pass)

    def __init__(
        self, reads: Mapping[str, Pass], shape: TowerShape, hidden: Count | None = None, out: Count = 256
    ) -> None:
        super().__init__(reads, shape)
        (online_name, online), (target_name, target) = reads.items()
        if target.encoder != "ema":
            raise ConfigError(f"objective 'byol' regresses on an EMA pass, but '{target_name}' is online")
        self.pairs = [
            (i, j)
            for i, _ in enumerate(online.views)
            for j, view in enumerate(target.views)
            if len(target.views) == 1 or view != online.views[i]
        ]
        if len({i for i, _ in self.pairs}) < len(online.views):
            raise ConfigError(f"objective 'byol': a view of pass '{online_name}' has no target: add another view to "
                              f"pass '{target_name}'")
        hidden = hidden or hidden_width(shape)
        self.projector = mlp([shape.width, hidden, out], bias=False)
        self.predictor = mlp([out, hidden, out], bias=False)
        self.ema_projector = frozen_copy(self.projector)

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Read the CLS tokens of both passes."""
        online, target = (context.passes[name].cls for name in self.reads)
        predictions = self.predictor(self.projector(online.flatten(0, 1))).unflatten(0, online.shape[:2])
        with torch.no_grad():
            targets = self.ema_projector(target.flatten(0, 1)).unflatten(0, target.shape[:2])
        return torch.stack([byol_loss(predictions[i], targets[j]) for i, j in self.pairs]).mean()

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the projector and its average; the predictor has none."""
        return [(self.projector, self.ema_projector)]
