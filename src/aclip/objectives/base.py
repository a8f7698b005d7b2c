"""What every objective is, and the cost of a transformer block."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from aclip.config import Pass, TextPass
from aclip.errors import ConfigError
from aclip.structs import StepContext, TowerShape


class Objective(nn.Module, ABC):
    """One term of the loss: encoded passes -> scalar.

    Args:
        reads: name -> pass to read, in the order of `takes`.
        shape: of the model, for the sizes of heads.

    Attributes:
        reads: the names of the passes.
        takes: the kinds of passes it reads, in order: `Pass` for images, `TextPass` for captions.
        may_take: those that may follow.
        needs_text: whether captions must be encoded (a recipe without such an objective has no text tower).
        needs_patches: whether it reads the patch tokens of its image passes.
        needs_pixels: whether it reads their pixels.
        needs_masking: whether its loss is 0 where nothing is masked.
        needs_pooled: whether it reads the pooled token of its image passes, or their features.
        max_logit_scale: the model's logit multiplier is clamped to this after every step; None: it is not.
        first_logit_scale: from which a fresh model's starts; None is open_clip's 1 / 0.07.

    Raises:
        ConfigError: passes that it does not read, or that do not fit each other or its options.
    """

    takes: ClassVar[tuple[type[Pass | TextPass], ...]] = (Pass,)
    may_take: ClassVar[tuple[type[Pass | TextPass], ...]] = ()
    needs_text: ClassVar[bool] = False
    needs_patches: ClassVar[bool] = False
    needs_pixels: ClassVar[bool] = False
    needs_masking: ClassVar[bool] = False
    needs_pooled: bool = True
    max_logit_scale: float | None = None
    first_logit_scale: ClassVar[float | None] = None

    def __init__(self, reads: Mapping[str, Pass | TextPass], shape: TowerShape) -> None:
        super().__init__()
        if tuple(map(type, reads.values())) != (self.takes + self.may_take)[:max(len(reads), len(self.takes))]:
            kinds = {Pass: "an image pass", TextPass: "a text pass"}
            expected = ", then ".join(kinds[kind] for kind in self.takes)
            raise ConfigError(f"objective {type(self).__name__} reads {expected}, not {', '.join(reads) or 'none'}: "
                              "correct its reads")
        self.reads = tuple(reads)

    @abstractmethod
    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Return the unweighted loss, float32, the mean over this rank's samples."""

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (online head, EMA head) pairs to average after each step."""
        return []

    def adopt_bias(self, bias: nn.Parameter) -> bool:
        """Use the model's own logit bias (`StepContext.logit_bias`); return whether this objective reads it."""
        return False

    def decoder_macs(self, images: Sequence[tuple[int, int, int]], text_tokens: float) -> float:
        """Return multiply-accumulates of a decoder's forward pass per pair; heads are not counted.

        Args:
            images: (views, N patches, K kept) of each image pass that it reads.
            text_tokens: length of the text.
        """
        return 0.0


def block_macs(tokens: float, width: int, mlp_width: int) -> float:
    """Return multiply-accumulates of one transformer block: L (4 d^2 + 2 d m) + 2 L^2 d."""
    return tokens * (4.0 * width**2 + 2.0 * width * mlp_width) + 2.0 * tokens**2 * width
