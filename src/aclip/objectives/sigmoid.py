"""The pairwise image-text contrast of SigLIP, averaged over views."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aclip.config import Pass, TextPass
from aclip.objectives.base import Objective, check_whole_text
from aclip.objectives.functional import sigmoid_loss
from aclip.structs import StepContext, TowerShape


class Sigmoid(Objective):
    """Mean over the V views of a pass of the sigmoid loss with the captions (Zhai et al., arXiv 2303.15343).

    Every image-caption pair is a yes-or-no question of its own, see `functional.sigmoid_loss`. Two different pairs that
    share a caption are left out. The multiplier is the model's `logit_scale`, which starts where the model has it (at
    1/0.07 in a fresh one; the paper starts at 10) and has no upper limit: a pretrained SigLIP has one of about 117. The
    bias is the model's `logit_bias` where it has one (a pretrained SigLIP about -13), and is then saved with it. Of
    other models it belongs to this objective and is not saved: it moves all similarities alike and changes no ranking.

    Reads the image pass, then the text pass.

    Args:
        init_bias: first value of the bias. None is the model's own where it has one, and else the paper's -10, which
            says that nearly all pairs are negative.
    """

    takes = (Pass, TextPass)
    needs_text = True

    def __init__(self, reads: Sequence[Pass | TextPass], shape: TowerShape, init_bias: float | None = None) -> None:
        super().__init__(reads, shape)
        check_whole_text(reads[1])
        self.init_bias = init_bias
        first = torch.tensor(-10.0 if init_bias is None else float(init_bias))
        self.logit_bias: nn.Parameter | None = nn.Parameter(first)

    def adopt_bias(self, bias: nn.Parameter) -> bool:
        """See `Objective.adopt_bias`."""
        if self.init_bias is not None:
            nn.init.constant_(bias, self.init_bias)
        self.logit_bias = None
        return True

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Read the features of image pass `reads[0]` and of text pass `reads[1]`."""
        images, captions = context.passes[self.reads[0]].features, context.texts[self.reads[1]].features
        assert captions is not None
        bias = context.logit_bias if self.logit_bias is None else self.logit_bias
        assert context.logit_scale is not None
        assert bias is not None
        losses = [sigmoid_loss(view, captions, context.logit_scale, bias, context.caption_ids) for view in images]
        return torch.stack(losses).mean()
