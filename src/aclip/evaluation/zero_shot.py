"""Zero-shot classification: name the class of a picture from the classes' names alone.

The embedding of a class is the L2-normalised mean, over prompt templates, of the L2-normalised features of
the filled-in prompts (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from aclip.errors import ConfigError
from aclip.evaluation.base import Evaluation, Evaluator
from aclip.evaluation.classes import members
from aclip.evaluation.features import PictureFeatures, encode_texts
from aclip.evaluation.interface import Encoder
from aclip.evaluation.ranking import CHUNK_ELEMENTS, chance_recall, mean_per_class, ranks, recall
from aclip.evaluation.retrieval import distinct

DEFAULT_TEMPLATES = ("{}", "a picture of {}", "a photo of a {}", "an image of {}", "a drawing of {}")
"""Prompts for classes of any kind; `{}` stands for the class name."""

_PROMPTS_AT_ONCE = 4096  # bounds the features held while templates are averaged


@dataclass(frozen=True)
class ZeroShot(Evaluator):
    """Top-1 and top-5 accuracy and the mean of the classes' top-1 accuracies, shares in [0, 1].

    Metrics are `top1`, `top5` and `mean_per_class`; counts are `pictures`, `classes`, `skipped` and
    `outside_classes` (pictures left out because their class is not among those given). Ties count against
    the model, see `aclip.evaluation.ranking`.

    Attributes:
        classes: class names, or None for the distinct labels of the set (its distinct captions where a
            picture has no label).
        templates: prompts, each with `{}` where the class name goes.
        chunk_elements: see `ranks`.

    Raises:
        ConfigError: no template, a template without `{}`, or a class named twice.
    """

    name = "zero_shot"
    classes: tuple[str, ...] | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    chunk_elements: int = CHUNK_ELEMENTS

    def __post_init__(self) -> None:
        if not self.templates:
            raise ConfigError("zero-shot classification needs at least one prompt template, "
                              "e.g. 'a picture of {}'")
        for template in self.templates:
            if "{}" not in template:
                raise ConfigError(f"prompt template '{template}' has no {{}} where the class name goes, "
                                  "e.g. 'a picture of {}'")
        if self.classes is not None and len(distinct(self.classes)[0]) < len(self.classes):
            names = distinct(self.classes)[1]
            twice = next(c for i, c in enumerate(self.classes) if names[i] in names[:i])
            raise ConfigError(f"class '{twice}' is named twice: every class of a zero-shot evaluation once")

    def measure(
        self,
        model: Encoder,
        pictures: PictureFeatures,
        device: torch.device,
        *,
        precision: torch.dtype | None = None,
    ) -> Evaluation:
        """See `Evaluator.measure`.

        Raises:
            ConfigError: no picture of the set is of one of the given classes.
        """
        classes, kept, targets = self._targets(pictures)
        features = class_embeddings(model, classes, self.templates, device, precision=precision)
        wanted = torch.tensor(targets, device=features.device)
        chosen = pictures.features[torch.tensor(kept, device=features.device)]
        numbers = torch.arange(len(classes), device=features.device)
        rank, _ = ranks(chosen, features, wanted, numbers, chunk_elements=self.chunk_elements)
        metrics = {"top1": recall(rank, 1), "top5": recall(rank, 5),
                   "mean_per_class": mean_per_class(rank, wanted.cpu())}
        top1, top5 = (chance_recall(1, len(classes), k) for k in (1, 5))
        counts = {"pictures": len(kept), "classes": len(classes), "skipped": len(pictures.skipped),
                  "outside_classes": pictures.size - len(kept)}
        return Evaluation(self.name, metrics, {"top1": top1, "top5": top5, "mean_per_class": top1}, counts)

    def _targets(self, pictures: PictureFeatures) -> tuple[list[str], list[int], list[int]]:
        """Return the class names, the pictures that are of one, and the number of each one's class."""
        labels = [label for label in pictures.labels if label is not None]
        names = labels if len(labels) == pictures.size else list(pictures.captions)
        if self.classes is None:
            classes, numbers = distinct(names)
            return classes, list(range(pictures.size)), numbers
        return list(self.classes), *members(names, self.classes, "given")


def class_embeddings(
    model: Encoder,
    classes: Sequence[str],
    templates: Sequence[str],
    device: torch.device,
    *,
    precision: torch.dtype | None = None,
) -> Float[Tensor, "M D"]:
    """Embed classes by their names.

    e_c = normalise(mean over t of normalise(text(t filled with c)))

    Returns:
        (M, D) float32, L2-normalised, in the order of `classes`.
    """
    embeddings = []
    at_once = max(1, _PROMPTS_AT_ONCE // len(templates))
    for start in range(0, len(classes), at_once):
        some = classes[start : start + at_once]
        prompts = [template.replace("{}", name) for name in some for template in templates]
        features = encode_texts(model, prompts, device, precision=precision)
        embeddings.append(F.normalize(features.view(len(some), len(templates), -1).mean(dim=1), dim=-1))
    return torch.cat(embeddings)
