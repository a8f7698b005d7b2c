"""What every objective is, and the multi-layer heads that the self-supervised ones own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from aclip.config import Pass
from aclip.errors import ConfigError
from aclip.structs import StepContext, TowerShape


class Objective(nn.Module, ABC):
    """One term of the loss: encoded passes -> scalar.

    Attributes:
        num_reads: how many passes it reads.
        needs_text: whether it reads text features (a recipe without any such objective has no text tower).
    """

    num_reads: ClassVar[int] = 1
    needs_text: ClassVar[bool] = False

    def __init__(self, reads: Sequence[Pass], shape: TowerShape) -> None:
        """Take the passes to read, in the order that the class documents, and the sizes for its heads.

        Raises:
            ConfigError: another number of passes than it reads.
        """
        super().__init__()
        if len(reads) != self.num_reads:
            raise ConfigError(f"objective '{type(self).__name__}' reads {self.num_reads} pass(es), not "
                              f"{len(reads)}: {', '.join(p.name for p in reads) or 'none'}")
        self.reads = tuple(p.name for p in reads)

    @abstractmethod
    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Return the unweighted loss, float32, the mean over this rank's samples."""

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (online head, EMA head) pairs that must be averaged after each step."""
        return []


def hidden_width(shape: TowerShape) -> int:
    """Return the hidden width of self-supervised heads: 4096 as in the paper, less for narrow towers.

    The paper's towers are 768 wide or wider. A head keeps their proportion of 16/3 below that width: at
    4096 it would cost a 192-wide tower several times the tower itself.
    """
    return min(4096, shape.width * 16 // 3)


def mlp(widths: Sequence[int], bias: bool) -> nn.Sequential:
    """Return Linear (BatchNorm ReLU Linear)*: a projection head; no norm or activation after the last.

    Args:
        widths: input width, hidden widths, output width.
        bias: whether the linear layers have biases.
    """
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        if i > 0:
            layers += [nn.BatchNorm1d(widths[i]), nn.ReLU(inplace=True)]
        layers.append(nn.Linear(widths[i], widths[i + 1], bias=bias))
    return nn.Sequential(*layers)
