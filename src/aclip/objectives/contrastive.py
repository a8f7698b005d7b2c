"""The image-text contrast of CLIP and SigLIP, averaged over views."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from aclip.config import Pass, TextPass
from aclip.errors import ConfigError
from aclip.objectives.base import Objective
from aclip.objectives.functional import clip_loss, sigmoid_loss
from aclip.structs import StepContext, TowerShape

Cosine = Annotated[float, Field(ge=-1.0, le=1.0)]


class Contrastive(Objective):
    """The mean over the V views of a pass of the symmetric InfoNCE with the captions (`functional.clip_loss`).

    A-CLIP, equation 2: 1/2 NCE(v1, t) + 1/2 NCE(v2, t); with one view it is CLIP's loss. Pairs that share a caption are
    not each other's negatives. The logit multiplier is clamped to 100 (CLIP, arXiv 2103.00020, section 2.5).

    Reads the image pass, then the text pass; with `false_negatives` a frozen text pass as well.

    Args:
        false_negatives: pairs are not each other's negatives either if the frozen features of their captions have this
            cosine or more (after GIST, arXiv 2402.16829).
    """

    takes = (Pass, TextPass)
    may_take = (TextPass,)
    needs_text = True
    max_logit_scale: float | None = 100.0

    def __init__(self, reads: Mapping[str, Pass | TextPass], shape: TowerShape,
                 false_negatives: Cosine | None = None) -> None:
        super().__init__(reads, shape)
        self.false_negatives = false_negatives
        _, (name, text), *guide = reads.items()
        if text.mask_ratio > 0:
            raise ConfigError(f"text pass '{name}' hides {text.mask_ratio:.0%} of the tokens and has no feature of the "
                              "caption: contrast with a text pass whose mask_ratio is 0")
        if bool(guide) != (false_negatives is not None) or any(one.encoder != "frozen" for _, one in guide):
            raise ConfigError(f"objective {type(self).__name__} finds false negatives by a frozen text pass: give it "
                              "both the option false_negatives and, as third of its reads, a text pass whose encoder "
                              "is frozen, or neither")

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        image_pass, text_pass = self.reads[:2]
        captions = context.texts[text_pass].features
        assert captions is not None
        return torch.stack([self.contrast(view, captions, context)
                            for view in context.passes[image_pass].features]).mean()

    def contrast(self, image: Float[Tensor, "B D"], text: Float[Tensor, "B D"], context: StepContext) -> Tensor:
        """Return the loss of one view."""
        assert context.logit_scale is not None
        return clip_loss(image, text, context.logit_scale, context.caption_ids, **self.guided(context))

    def guided(self, context: StepContext) -> dict[str, Any]:
        """Return the arguments of the loss that say which captions the frozen encoder finds nearly the same."""
        if self.false_negatives is None:
            return {}
        return {"guide": context.texts[self.reads[2]].features, "false_negatives": self.false_negatives}


class Sigmoid(Contrastive):
    """The mean over the V views of a pass of SigLIP's sigmoid loss with the captions (`functional.sigmoid_loss`).

    The multiplier is the model's `logit_scale`, without an upper limit: in a fresh model it starts at 10, as in the
    paper (section 3.2), in a pretrained one where it is, which is about 117 in a SigLIP. The bias is the model's
    `logit_bias` if it has one (about -13 in a pretrained SigLIP), saved with it. In other models it is a parameter of
    this objective and is not exported: it shifts all similarities alike and changes no ranking.

    Args:
        init_bias: first value of the bias. None is the model's own if it has one, else the paper's -10, which says that
            nearly all pairs are negative.
        false_negatives: as of `Contrastive`.
    """

    max_logit_scale = None
    first_logit_scale = 10.0

    def __init__(self, reads: Mapping[str, Pass | TextPass], shape: TowerShape,
                 init_bias: float | None = None, false_negatives: Cosine | None = None) -> None:
        super().__init__(reads, shape, false_negatives)
        self.init_bias = init_bias
        first = torch.tensor(-10.0 if init_bias is None else float(init_bias))
        self.logit_bias: nn.Parameter | None = nn.Parameter(first)

    def adopt_bias(self, bias: nn.Parameter) -> bool:
        if self.init_bias is not None:
            nn.init.constant_(bias, self.init_bias)
        self.logit_bias = None
        return True

    def contrast(self, image: Float[Tensor, "B D"], text: Float[Tensor, "B D"], context: StepContext) -> Tensor:
        bias = context.logit_bias if self.logit_bias is None else self.logit_bias
        assert bias is not None
        assert context.logit_scale is not None
        return sigmoid_loss(image, text, context.logit_scale, bias, context.caption_ids, **self.guided(context))
