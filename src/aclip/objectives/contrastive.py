"""The image-text contrast of CLIP, averaged over views."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from aclip.config import Pass, TextPass
from aclip.objectives.base import Objective, check_whole_text
from aclip.objectives.functional import clip_loss
from aclip.structs import StepContext, TowerShape


class Contrastive(Objective):
    """Mean over the V views of a pass of the symmetric InfoNCE with the captions.

    A-CLIP, equation 2: 1/2 NCE(v1, t) + 1/2 NCE(v2, t); one view makes it CLIP's loss. Pairs that share a
    caption are not each other's negatives. The multiplier is kept at 100 or less (CLIP, arXiv 2103.00020, section 2.5).
    """

    takes = (Pass, TextPass)
    needs_text = True
    max_logit_scale = 100.0

    def __init__(self, reads: Sequence[Pass | TextPass], shape: TowerShape) -> None:
        super().__init__(reads, shape)
        check_whole_text(reads[1])

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Read the features of image pass `reads[0]` and of text pass `reads[1]`."""
        images, captions = context.passes[self.reads[0]].features, context.texts[self.reads[1]].features
        assert captions is not None
        assert context.logit_scale is not None
        losses = [clip_loss(view, captions, context.logit_scale, context.caption_ids) for view in images]
        return torch.stack(losses).mean()
