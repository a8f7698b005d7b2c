"""Zero-shot classification: name the class of a picture from the classes' names alone.

The embedding of a class is the L2-normalised mean, over prompt templates, of the L2-normalised features of
the filled-in prompts (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from aclip.errors import ConfigError
from aclip.evaluation.base import Evaluation, Evaluator
from aclip.evaluation.classes import ClassList, among, classes_of
from aclip.evaluation.features import PictureFeatures
from aclip.evaluation.ranking import CHUNK_ELEMENTS, chance_recall, mean_per_class, rank_both_ways, recall
from aclip.evaluation.texts import TextEncoder

DEFAULT_TEMPLATES = ("{}", "a picture of {}", "a photo of a {}", "an image of {}", "a drawing of {}")
"""Prompts for classes of any kind; `{}` stands for the class name."""

_log = logging.getLogger(__name__)

_PROMPTS_AT_ONCE = 4096  # bounds the features held while templates are averaged


@dataclass(frozen=True)
class Named(Evaluator):
    """An evaluator that names the class of a picture from the classes' names.

    Attributes:
        classes: a `ClassList`, or names, or None for the distinct labels of the set (its distinct captions where a
            picture has no label).
        templates: prompts, each with `{}` where the class name goes.
        chunk_elements: see `rank_both_ways`.

    Raises:
        ConfigError: no template, a template without `{}`, a class named twice, or fewer than two.
    """

    classes: ClassList | tuple[str, ...] | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    chunk_elements: int = CHUNK_ELEMENTS

    def __post_init__(self) -> None:
        check_templates(self.templates)
        if isinstance(self.classes, tuple):
            object.__setattr__(self, "classes", ClassList(self.classes))

    def targets(self, pictures: PictureFeatures) -> tuple[tuple[str, ...], list[int], list[int]]:
        """Return the class names, the pictures that are of one, and the number of each one's class.

        Raises:
            ConfigError: no picture of the set is of one of the given classes, or all are of one.
        """
        labels = [label for label in pictures.labels if label is not None]
        if len(labels) < pictures.size:
            labels = [caption or str(label) for caption, label in zip(pictures.captions, pictures.labels, strict=True)]
        classes = self.classes or classes_of(labels)
        assert isinstance(classes, ClassList)
        if self.classes is None and None in pictures.labels and 2 * len(classes.names) > pictures.size:
            _log.warning("pictures have no label, so that %s takes captions for classes: %d for %d pictures, which "
                         "tells nothing of classification; name the classes with --classes, or evaluate retrieval",
                         self.name, len(classes.names), pictures.size)
        kept, numbers = among(classes.numbers(labels), len(classes.names), classes.title)
        if classes.present_only:
            present = sorted(set(numbers))
            return tuple(classes.names[i] for i in present), kept, [present.index(i) for i in numbers]
        return classes.names, kept, numbers


@dataclass(frozen=True)
class ZeroShot(Named):
    """Top-1 and top-5 accuracy and the mean of the classes' top-1 accuracies, shares in [0, 1].

    Metrics are `top1`, `top5` and `mean_per_class`; counts are `pictures`, `classes`, `skipped` and
    `outside_classes` (pictures left out because their class is not among those given). Ties count against
    the model, see `aclip.evaluation.ranking`; but of classes with the same name (ImageNet has two such pairs) the
    first is taken to be nearer, since no model could tell. `details` hold the accuracy of every class and what it is
    taken for.
    """

    name = "zero_shot"

    def measure(self, texts: TextEncoder, pictures: PictureFeatures) -> Evaluation:
        """See `Evaluator.measure`.

        Raises:
            ConfigError: no picture of the set is of one of the given classes, or all are of one.
        """
        classes, kept, targets = self.targets(pictures)
        features = class_embeddings(texts, classes, self.templates)
        wanted = torch.tensor(targets, device=features.device)
        chosen = pictures.features[torch.tensor(kept, device=features.device)]
        numbers = torch.arange(len(classes), device=features.device)
        found = rank_both_ways(chosen, features, wanted, numbers, chunk_elements=self.chunk_elements)
        wanted = wanted.cpu()
        rank = found.queries - _namesakes_behind(classes)[wanted]
        metrics = {"top1": recall(rank, 1), "top5": recall(rank, 5), "mean_per_class": mean_per_class(rank, wanted)}
        top1, top5 = (chance_recall(1, len(classes), k) for k in (1, 5))
        counts = {"pictures": len(kept), "classes": len(classes), "skipped": len(pictures.skipped),
                  "outside_classes": pictures.size - len(kept)}
        return Evaluation(self.name, metrics, {"top1": top1, "top5": top5, "mean_per_class": top1}, counts,
                          details=confusions(classes, wanted, rank, found.nearest))


def check_templates(templates: Sequence[str]) -> None:
    """Check prompts.

    Raises:
        ConfigError: none, or one without `{}`.
    """
    if not templates:
        raise ConfigError("zero-shot classification needs at least one prompt template, e.g. 'a picture of {}'")
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"prompt template '{template}' has no {{}} where the class name goes, "
                              "e.g. 'a picture of {}'")


def confusions(
    classes: Sequence[str], targets: Int[Tensor, " B"], rank: Int[Tensor, " B"], nearest: Int[Tensor, " B"]
) -> dict[str, Any]:
    """Return what a classifier took each class for, as plain JSON values.

    Args:
        classes: M names. targets: (B,) int64, the right classes. rank: (B,) of these, from 1.
        nearest: (B,) int64, what each picture was taken for.

    Returns:
        `classes`; `pictures` and `right`, a number for each; `confusions`, [class, what it was taken for, pictures],
        right answers aside, the most frequent first.
    """
    many = len(classes)
    pairs = Counter(zip(targets.tolist(), nearest.tolist(), strict=True))
    wrong = sorted(((count, i, j) for (i, j), count in pairs.items() if i != j), key=lambda one: (-one[0], *one[1:]))
    return {"classes": list(classes), "pictures": torch.bincount(targets, minlength=many).tolist(),
            "right": torch.bincount(targets[rank == 1], minlength=many).tolist(),
            "confusions": [[i, j, count] for count, i, j in wrong]}


def _namesakes_behind(classes: Sequence[str]) -> Int[Tensor, " M"]:
    """Return how many later classes have the name of each."""
    left = Counter(classes)
    behind = []
    for name in classes:
        left[name] -= 1
        behind.append(left[name])
    return torch.tensor(behind)


def class_embeddings(
    texts: TextEncoder, classes: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "M D"]:
    """Embed classes by their names.

    e_c = normalise(mean over t of normalise(text(t filled with c)))

    Classes of the same name get the same row. The encoder remembers the result: prompts are many, classes few.

    Returns:
        (M, D) float32, L2-normalised, in the order of `classes`.
    """
    return texts.once((tuple(classes), tuple(templates)), lambda: _embed(texts, classes, templates))


def _embed(texts: TextEncoder, classes: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "M D"]:
    distinct_classes = list(dict.fromkeys(classes))
    embeddings = []
    at_once = max(1, _PROMPTS_AT_ONCE // len(templates))
    for start in range(0, len(distinct_classes), at_once):
        some = distinct_classes[start : start + at_once]
        features = texts.encode([template.replace("{}", name) for name in some for template in templates])
        embeddings.append(F.normalize(features.view(len(some), len(templates), -1).mean(dim=1), dim=-1))
    row = {name: i for i, name in enumerate(distinct_classes)}
    return torch.cat(embeddings)[[row[name] for name in classes]]
