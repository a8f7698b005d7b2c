"""What every objective is, and the multi-layer heads that the self-supervised ones own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from aclip.config import Pass, TextPass
from aclip.errors import ConfigError
from aclip.objectives.batch_norm import BatchNorm1d
from aclip.structs import StepContext, TowerShape


class Objective(nn.Module, ABC):
    """One term of the loss: encoded passes -> scalar.

    Attributes:
        takes: the kinds of passes it reads, in order: `Pass` for images, `TextPass` for captions.
        needs_text: whether it needs captions encoded (a recipe without any such objective has no text tower).
        needs_patches: whether it reads the patch tokens of its image passes.
        needs_pixels: whether it reads their pixels.
        needs_masking: whether it has nothing to ask where nothing is masked.
        needs_pooled: whether it reads the pooled token of its image passes, or their features.
        max_logit_scale: to which the model's multiplier is kept after every step, None where it is free.
    """

    takes: ClassVar[tuple[type[Pass | TextPass], ...]] = (Pass,)
    needs_text: ClassVar[bool] = False
    needs_patches: ClassVar[bool] = False
    needs_pixels: ClassVar[bool] = False
    needs_masking: ClassVar[bool] = False
    needs_pooled: bool = True
    max_logit_scale: ClassVar[float | None] = None

    def __init__(self, reads: Sequence[Pass | TextPass], shape: TowerShape) -> None:
        """Take the passes to read, in the order that the class documents, and the sizes for its heads.

        Raises:
            ConfigError: other passes than it reads.
        """
        super().__init__()
        if tuple(map(type, reads)) != self.takes:
            kinds = {Pass: "an image pass", TextPass: "a text pass"}
            wanted = ", then ".join(kinds[kind] for kind in self.takes)
            raise ConfigError(f"objective '{type(self).__name__}' reads {wanted}, not "
                              f"{', '.join(p.name for p in reads) or 'none'}")
        self.reads = tuple(p.name for p in reads)

    @abstractmethod
    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Return the unweighted loss, float32, the mean over this rank's samples."""

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (online head, EMA head) pairs that must be averaged after each step."""
        return []

    def adopt_bias(self, bias: nn.Parameter) -> bool:
        """Take the model's bias, which `StepContext` will hold, in place of one's own; return whether it is read."""
        return False

    def logits(self, pairs: int, images: Sequence[tuple[int, int, int]], text_tokens: int) -> int:
        """Return how many logits over a vocabulary or codewords it makes of its captions or patches.

        Args:
            pairs: whose they are.
            images: as for `decoder_macs`.
            text_tokens: likewise.
        """
        return 0

    def decoder_macs(self, images: Sequence[tuple[int, int, int]], text_tokens: float) -> float:
        """Return multiply-accumulates of a decoder's forward pass per pair; MLP heads are not counted.

        Args:
            images: (views, N patches, K kept) of each image pass that it reads.
            text_tokens: length of the text.
        """
        return 0.0


def check_whole_text(text: Pass | TextPass) -> None:
    """Refuse a text pass that hides tokens, for it has no feature of the caption.

    Raises:
        ConfigError: it hides tokens.
    """
    if text.mask_ratio > 0:
        raise ConfigError(f"text pass '{text.name}' hides {text.mask_ratio:.0%} of the words, so that it has states of "
                          "words and no feature of the caption: contrast with a text pass whose mask_ratio is 0")


def block_macs(tokens: float, width: int, mlp_width: int) -> float:
    """Return multiply-accumulates of one transformer block: L (4 d^2 + 2 d m) + 2 L^2 d."""
    return tokens * (4.0 * width**2 + 2.0 * width * mlp_width) + 2.0 * tokens**2 * width


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
            layers += [BatchNorm1d(widths[i]), nn.ReLU(inplace=True)]
        layers.append(nn.Linear(widths[i], widths[i + 1], bias=bias))
    return nn.Sequential(*layers)
