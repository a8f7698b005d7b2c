"""Probes: what an image tower has learned, told by a simple classifier on its frozen features.

The classifier learns from a labelled training set and is measured on held-out sets. It reads the pooled
image token before the projection into the joint space, as the probes of CLIP (arXiv 2103.00020, appendix
A.3) and SLIP (arXiv 2112.12750) do, so that models trained without text are measured alike.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aclip.errors import ConfigError, DataError
from aclip.evaluation.base import Evaluation, Evaluator
from aclip.evaluation.classes import members, told_apart
from aclip.evaluation.features import PictureFeatures
from aclip.evaluation.ranking import chance_recall, class_ranks, mean_per_class, recall
from aclip.evaluation.texts import TextEncoder
from aclip.evaluation.zero_shot import confusions

CHUNK_ELEMENTS = 2**24
"""Float32 entries that scoring pictures holds at a time (64 MiB)."""


@dataclass(frozen=True)
class Classifier:
    """What a probe has learned.

    Attributes:
        scores: (q, C) features -> (q, M) scores of the classes, the higher the likelier.
        width: entries held for each picture that is scored; bounds how many are scored at once.
        settings: name -> what it was fitted with.
    """

    scores: Callable[[Float[Tensor, "q C"]], Float[Tensor, "q M"]]
    width: int
    settings: Mapping[str, float]


@dataclass(frozen=True)
class Learned:
    """A classifier with the names of its classes and the number of pictures that it was fitted on."""

    classifier: Classifier
    classes: tuple[str, ...]
    pictures: int


@dataclass(frozen=True)
class Probe(Evaluator):
    """Classifies held-out pictures by what it has learned from labelled ones; subclasses implement `fit`.

    `learn` comes first and once; what it returns measures any number of sets. Metrics are `top1`, `top5`
    (of more than five classes) and `mean_per_class`, shares in [0, 1]; the classes are those of the training
    set. Counts are `pictures`, `classes`, `training_pictures`, `skipped` and `outside_classes` (held-out
    pictures left out because no training picture is of their class). Scores that tie count against the
    model, see `aclip.evaluation.ranking`.

    Attributes:
        learned: the fitted classifier; None before `learn`.
        chunk_elements: entries held at once when pictures are scored; does not change the result.
    """

    space = "trunk"
    learned: Learned | None = field(default=None, repr=False, kw_only=True)
    chunk_elements: int = field(default=CHUNK_ELEMENTS, repr=False, kw_only=True)

    def learn(self, training: PictureFeatures) -> Self:
        """Return this probe, fitted on labelled pictures.

        Args:
            training: as `encode_pictures` returns them with `space="trunk"`; the fit runs on their device.

        Raises:
            DataError: pictures without label, fewer than two classes, or features that are no numbers.
        """
        labels = [label for label in training.labels if label is not None]
        if len(labels) < training.size:
            raise DataError(f"{self.name} learns from labels, which {training.size - len(labels)} of "
                            f"{training.size} training pictures do not have")
        classes, numbers = told_apart(labels)
        if len(classes) < 2:
            raise DataError(f"{self.name} tells classes apart, and all {training.size} training pictures are of "
                            f"class '{classes[0]}'")
        if not bool(training.features.isfinite().all()):
            raise DataError(f"{self.name} cannot learn: the model's features of the training pictures are not all "
                            "finite numbers, so its training has diverged")
        targets = torch.tensor(numbers, device=training.features.device)
        classifier = self.fit(training.features, targets, len(classes))
        return replace(self, learned=Learned(classifier, tuple(classes), training.size))

    @abstractmethod
    def fit(self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int) -> Classifier:
        """Fit a classifier.

        Args:
            features: (B, C) float32, finite.
            targets: (B,) int64 in [0, num_classes), on the device of `features`.
            num_classes: M, at least 2.
        """

    def measure(self, texts: TextEncoder, pictures: PictureFeatures) -> Evaluation:
        """See `Evaluator.measure`; reads no text. Pictures without label are left out as skipped.

        Raises:
            ConfigError: it has not learned yet, or no picture of the set is of a training class.
        """
        if self.learned is None:
            raise ConfigError(f"{self.name} learns from labelled pictures before it is measured: call learn first")
        classes, classifier = self.learned.classes, self.learned.classifier
        labelled = [i for i, label in enumerate(pictures.labels) if label is not None]
        names = [label for label in pictures.labels if label is not None]
        kept, numbers = members(names, classes, "training")
        features = pictures.features[torch.tensor([labelled[i] for i in kept], device=pictures.features.device)]
        targets = torch.tensor(numbers, device=features.device)
        rows = max(1, self.chunk_elements // classifier.width)
        with torch.inference_mode():
            scored = [(class_ranks(scores, right), scores.argmax(dim=1).cpu()) for scores, right in
                      ((classifier.scores(some), right) for some, right in
                       zip(features.split(rows), targets.split(rows), strict=True))]
        rank, nearest = (torch.cat(part) for part in zip(*scored, strict=True))
        cutoffs = (1, 5) if len(classes) > 5 else (1,)
        metrics = {f"top{k}": recall(rank, k) for k in cutoffs}
        chance = {f"top{k}": chance_recall(1, len(classes), k) for k in cutoffs}
        metrics["mean_per_class"] = mean_per_class(rank, targets.cpu())
        chance["mean_per_class"] = chance["top1"]
        counts = {"pictures": len(kept), "classes": len(classes), "training_pictures": self.learned.pictures,
                  "skipped": len(pictures.skipped) + pictures.size - len(labelled),
                  "outside_classes": len(labelled) - len(kept)}
        return Evaluation(self.name, metrics, chance, counts, settings=classifier.settings,
                          details=confusions(classes, targets.cpu(), rank, nearest))
