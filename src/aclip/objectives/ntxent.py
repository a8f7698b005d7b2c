"""SimCLR between the views of one pass."""

from collections.abc import Mapping
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from aclip.config import Count, Pass, Positive
from aclip.errors import ConfigError
from aclip.objectives.base import Objective
from aclip.objectives.functional import ntxent_loss
from aclip.objectives.heads import hidden_width, mlp
from aclip.structs import StepContext, TowerShape


class NtXent(Objective):
    """NT-Xent (`functional.ntxent_loss`) between the views of a pass, through its own head on the normed CLS token.

    Head: Linear(C, hidden) BN ReLU Linear(hidden, hidden) BN ReLU Linear(hidden, out), with biases, run once on all
    views, so that batch statistics are over V x B rows. With more than two views: the mean over all pairs of views.

    Reads one image pass.

    Args:
        reads, shape: see `Objective`.
        hidden, out: widths of the head; `hidden` None is the paper's, see `heads.hidden_width`.
        temperature: tau.
        views: the two view numbers to compare; None compares every pair. (0, 0), a view with itself, is what the A-CLIP
            release computes by mistake.

    Raises:
        ConfigError: a pass without two views, or without the named ones.
    """

    def __init__(
        self,
        reads: Mapping[str, Pass],
        shape: TowerShape,
        hidden: Count | None = None,
        out: Count = 256,
        temperature: Positive = 0.1,
        views: tuple[int, int] | None = None,
    ) -> None:
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
        """Read the CLS tokens."""
        cls = context.passes[self.reads[0]].cls
        z = self.head(cls.flatten(0, 1)).unflatten(0, cls.shape[:2])
        return torch.stack([ntxent_loss(z[i], z[j], self.temperature) for i, j in self.pairs]).mean()
