"""Objectives: the terms of the loss, computed from encoded passes.

An objective is a module that reads named passes of the step, owns its heads, and returns one scalar. To add one from a
script:

    from aclip.config import Pass, TextPass
    from aclip.objectives import OBJECTIVES, Objective

    class Alignment(Objective):
        takes = (Pass, TextPass)
        needs_text = True

        def forward(self, context):
            image_pass, text_pass = self.reads
            images, captions = context.passes[image_pass].features, context.texts[text_pass].features
            return (images - captions).square().sum(dim=-1).mean()

    OBJECTIVES["alignment"] = Alignment

A recipe then names it: `objectives={"alignment": ObjectiveConfig(reads=("masked", "captions"))}`; further constructor
arguments are its `options`. Each rank returns the mean over its own samples, and gradients are averaged over ranks;
an objective that compares samples gathers those of other ranks with `aclip.dist.gather`, as `functional` does.
"""

from aclip.objectives import functional
from aclip.objectives.bag_of_words import BagOfWords
from aclip.objectives.base import Objective
from aclip.objectives.contrastive import Contrastive, Sigmoid
from aclip.objectives.frozen import Affinity, Anchor
from aclip.objectives.maskclip import MaskedDistillation, MaskedLanguage
from aclip.objectives.reconstruction import Reconstruction
from aclip.objectives.self_supervised import Byol, NtXent

OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive": Contrastive,
    "ntxent": NtXent,
    "byol": Byol,
    "masked_distillation": MaskedDistillation,
    "masked_language": MaskedLanguage,
    "reconstruction": Reconstruction,
    "sigmoid": Sigmoid,
    "bag_of_words": BagOfWords,
    "anchor": Anchor,
    "affinity": Affinity,
}
"""Objectives by name; add your own.

Example:
    >>> aclip.OBJECTIVES["ntxent"].__name__
    'NtXent'
"""

__all__ = ["OBJECTIVES", "Affinity", "Anchor", "BagOfWords", "Byol", "Contrastive", "MaskedDistillation",
           "MaskedLanguage", "NtXent", "Objective", "Reconstruction", "Sigmoid", "functional"]
