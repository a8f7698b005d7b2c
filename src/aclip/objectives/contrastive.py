"""The image-text contrast of CLIP, averaged over views."""

import torch
from jaxtyping import Float
from torch import Tensor

from aclip.objectives.base import Objective
from aclip.objectives.functional import clip_loss
from aclip.structs import StepContext


class Contrastive(Objective):
    """Mean over the V views of a pass of the symmetric InfoNCE with the captions.

    A-CLIP, equation 2: 1/2 NCE(v1, t) + 1/2 NCE(v2, t); one view makes it CLIP's loss. Pairs that share a
    caption are not each other's negatives.
    """

    needs_text = True

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Read pass `reads[0]` and the text features."""
        assert context.text_features is not None
        assert context.logit_scale is not None
        losses = [
            clip_loss(view, context.text_features, context.logit_scale, context.caption_ids)
            for view in context.passes[self.reads[0]].features
        ]
        return torch.stack(losses).mean()
