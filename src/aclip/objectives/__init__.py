"""What is asked of the encoded passes: one objective a file, one line each in `OBJECTIVES`.

An objective reads named passes of the step and returns one scalar; it owns its heads. To add one: a file
with a class that follows `Objective`, and a line in the table; the contract tests run over the table.
"""

from aclip.objectives import functional
from aclip.objectives.bag_of_words import BagOfWords
from aclip.objectives.base import Objective
from aclip.objectives.byol import Byol
from aclip.objectives.contrastive import Contrastive
from aclip.objectives.masked_distillation import MaskedDistillation
from aclip.objectives.masked_language import MaskedLanguage
from aclip.objectives.ntxent import NtXent
from aclip.objectives.reconstruction import Reconstruction
from aclip.objectives.sigmoid import Sigmoid

OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive": Contrastive,
    "ntxent": NtXent,
    "byol": Byol,
    "masked_distillation": MaskedDistillation,
    "masked_language": MaskedLanguage,
    "reconstruction": Reconstruction,
    "sigmoid": Sigmoid,
    "bag_of_words": BagOfWords,
}

__all__ = [
    "OBJECTIVES",
    "BagOfWords",
    "Byol",
    "Contrastive",
    "MaskedDistillation",
    "MaskedLanguage",
    "NtXent",
    "Objective",
    "Reconstruction",
    "Sigmoid",
    "functional",
]
