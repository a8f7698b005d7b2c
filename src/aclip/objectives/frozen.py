"""Objectives that hold a model to a frozen one: to what it was (`Anchor`), or to a teacher (`Affinity`)."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from aclip.config import Fraction, Pass, TextPass
from aclip.errors import ConfigError
from aclip.objectives.base import Objective
from aclip.objectives.functional import affinity_loss
from aclip.structs import StepContext, TowerShape


class Affinity(Objective):
    """The mean over views of the divergence of a batch's similarities from a frozen model's (`affinity_loss`).

    MobileCLIP's distillation (arXiv 2311.17049) with one teacher; each model has its own multiplier. A view is compared
    with the frozen pass's of the same name, or with its only one. The widths of the two joint spaces may differ.

    Reads the image pass, the text pass, the frozen image pass, the frozen text pass.

    Args:
        label_share: of the pairs themselves in the targets.
    """

    takes = (Pass, TextPass, Pass, TextPass)
    needs_text = True
    max_logit_scale: float | None = 100.0

    def __init__(self, reads: Mapping[str, Pass | TextPass], shape: TowerShape, label_share: Fraction = 0.0) -> None:
        super().__init__(reads, shape)
        (own, image), (name, text), (other, frozen), _ = reads.items()
        assert isinstance(image, Pass)
        assert isinstance(frozen, Pass)
        assert isinstance(text, TextPass)
        if [one.encoder for one in reads.values()] != ["online", "online", "frozen", "frozen"]:
            found = ", ".join(f"{name} ({one.encoder})" for name, one in reads.items())
            raise ConfigError(f"objective {type(self).__name__} reads an online image and text pass, then a frozen "
                              f"image and text pass, not {found}")
        if text.mask_ratio > 0:
            raise ConfigError(f"text pass '{name}' hides {text.mask_ratio:.0%} of the tokens and has no feature of the "
                              "caption: read a text pass whose mask_ratio is 0")
        if len(frozen.views) > 1 and not set(image.views) <= set(frozen.views):
            raise ConfigError(f"objective {type(self).__name__}: a view of pass '{own}' is not among those of the "
                              f"frozen pass '{other}': {', '.join(frozen.views)}")
        self.label_share = label_share
        self.counterparts = [frozen.views.index(view) if view in frozen.views else 0 for view in image.views]

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        image, text, frozen, frozen_text = self.reads
        captions, theirs = context.texts[text].features, context.texts[frozen_text].features
        assert captions is not None
        assert theirs is not None
        assert context.logit_scale is not None
        assert context.frozen_logit_scale is not None
        return torch.stack([
            affinity_loss(view, captions, context.logit_scale, context.passes[frozen].features[counterpart], theirs,
                          context.frozen_logit_scale, context.caption_ids, label_share=self.label_share)
            for view, counterpart in zip(context.passes[image].features, self.counterparts, strict=True)]).mean()


class Anchor(Affinity):
    """`Affinity` with the pairs in half of the targets: the hybrid distillation of CLIP-Refine (arXiv 2504.12717).

    The model learns the pairs, and keeps in the rest of the batch the similarities that the frozen one sees.

    Reads as `Affinity`.

    Args:
        label_share: alpha of the paper.
    """

    def __init__(self, reads: Mapping[str, Pass | TextPass], shape: TowerShape, label_share: Fraction = 0.5) -> None:
        super().__init__(reads, shape, label_share)
