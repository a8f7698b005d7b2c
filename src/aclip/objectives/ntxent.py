"""SimCLR between the views of one pass."""

from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from aclip.config import Pass
from aclip.errors import ConfigError
from aclip.objectives.base import Objective, hidden_width, mlp
from aclip.objectives.functional import ntxent_loss
from aclip.structs import StepContext, TowerShape


class NtXent(Objective):
    """NT-Xent between the views of a pass, through a head of its own on the normed CLS token.

    Head: Linear(C, hidden) BN ReLU Linear(hidden, hidden) BN ReLU Linear(hidden, out), with biases, run
    once on all views, so that batch statistics are over V x B rows. With more than two views: the mean
    over all pairs of views.

    Args:
        hidden, out: widths of the head; `hidden` None is the paper's, see `hidden_width`.
        temperature: tau.
        views: the two view numbers to compare; None compares every pair. (0, 0) is what the A-CLIP
            release computes by mistake: a view with itself.
    """

    def __init__(
        self,
        reads: Sequence[Pass],
        shape: TowerShape,
        hidden: int | None = None,
        out: int = 256,
        temperature: float = 0.1,
        views: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(reads, shape)
        count = len(reads[0].views)
        self.pairs = [views] if views else list(combinations(range(count), 2))
        if not self.pairs or max(map(max, self.pairs)) >= count:
            raise ConfigError(f"objective 'ntxent' compares two views, but pass '{reads[0].name}' has "
                              f"{count}: {', '.join(reads[0].views)}")
        self.temperature = temperature
        hidden = hidden or hidden_width(shape)
        self.head = mlp([shape.width, hidden, hidden, out], bias=True)

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Read the CLS tokens of pass `reads[0]`."""
        cls = context.passes[self.reads[0]].cls
        z = self.head(cls.flatten(0, 1)).unflatten(0, cls.shape[:2])
        return torch.stack([ntxent_loss(z[i], z[j], self.temperature) for i, j in self.pairs]).mean()
