"""Probes: how well a simple classifier on an image tower's frozen features does.

They read the pooled image token before the projection into the joint space, as those of CLIP (arXiv 2103.00020,
appendix A.3) and SLIP (arXiv 2112.12750) do, so that models trained without text are measured alike.
"""

import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from aclip.errors import ConfigError, DataError
from aclip.evaluation.base import Evaluation, Evaluator
from aclip.evaluation.features import ImageFeatures, TextEncoder
from aclip.evaluation.ranking import classify
from aclip.evaluation.zero_shot import class_finder, known_images, spaced
from aclip.rng import generator

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

MAX_ITERATIONS = 1000
COARSE = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # decimal exponents of the penalties searched first
FINEST = 0.125  # step of the last ones
VALIDATION_EVERY = 5  # one in this many training images validates during the search

logger = logging.getLogger(__name__)


class Classifier(NamedTuple):
    """Scores, higher for likelier classes; what they were fitted with; names of classes, and number of images."""

    scores: Callable[[Float[Tensor, "q C"]], Float[Tensor, "q M"]]
    settings: Mapping[str, float]
    classes: tuple[str, ...] = ()
    images: int = 0


@dataclass(frozen=True)
class Probe(Evaluator):
    """Classifies held-out images by a classifier fitted on labelled ones; subclasses implement `fit_classifier`.

    `fit` comes first and once; what it returns measures any number of sets. For metrics see `ranking.classify`; counts
    are `pictures`, `classes` (of the training set), `training_pictures`, `skipped` and `outside_classes` (images left
    out because no training image is of their class).
    """

    space = "trunk"
    classifier: Classifier | None = field(default=None, repr=False, kw_only=True)

    def fit(self, training: ImageFeatures) -> Self:
        """Return this probe, fitted on images encoded into "trunk"; raise a `DataError` without labels or classes."""
        labels = [spaced(label) for label in training.labels if label is not None]
        if len(labels) < len(training):
            raise DataError(f"{self.name} learns from labels, which {len(training) - len(labels)} of "
                            f"{len(training)} training images do not have")
        classes = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        if len(classes) < 2:
            raise DataError(f"{self.name} needs at least two classes, and all {len(training)} training images are of "
                            f"class '{labels[0]}'")
        targets = torch.tensor([classes[label] for label in labels], device=training.features.device)
        found = self.fit_classifier(training.features, targets)
        return replace(self, classifier=found._replace(classes=tuple(classes), images=len(training)))

    @abstractmethod
    def fit_classifier(self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"]) -> Classifier:
        """Fit a classifier on finite float32 features; each of the M >= 2 classes, targets in [0, M), has an image."""

    def measure(self, images: ImageFeatures, texts: TextEncoder) -> Evaluation:
        """See `Evaluator.measure`; raises a `ConfigError` before `fit`, or if no image is of a training class."""
        if self.classifier is None:
            raise ConfigError(f"{self.name} learns from labelled images before it is measured: call fit first")
        scores, settings, classes, trained_on = self.classifier
        labels = [label or "" for label in images.labels]
        indices = list(map(class_finder(classes), labels))
        features, targets = known_images(images, labels, indices, f"{len(classes)} training")
        counts = {"pictures": len(features), "classes": len(classes), "training_pictures": trained_on,
                  "skipped": len(images.skipped), "outside_classes": len(images) - len(features)}
        return Evaluation(self.name, counts=counts, settings=settings,
                          **classify(scores, features, targets, classes, row_elements=trained_on))


@dataclass(frozen=True)
class NearestNeighbours(Probe):
    """The weighted vote of Wu et al. 2018 (arXiv 1805.01978, section 3.4), with the settings of DINO (2104.14294).

    score(q, m) = sum over i in N_k(q) of exp(s(q, i) / temperature) [class of i = m],  s = cosine similarity

    N_k(q) are the k training images most similar to q, or all if there are fewer. Nothing is chosen on the data. Scores
    are divided by their sum, which changes no rank.

    Attributes:
        k: neighbours that vote; Wu et al. take 200, DINO finds 20 best.
        temperature: of the weights, as in both.
    """

    name = "knn"
    k: int = 20
    temperature: float = 0.07

    def fit_classifier(self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"]) -> Classifier:
        items, num_classes = F.normalize(features, dim=1), int(targets.max()) + 1

        def scores(queries: Float[Tensor, "q C"]) -> Float[Tensor, "q M"]:
            similarity, nearest = (F.normalize(queries, dim=1) @ items.T).topk(min(self.k, len(items)), dim=1)
            weights = ((similarity - 1.0) / self.temperature).exp()  # relative to the largest possible: no overflow
            votes = queries.new_zeros(len(queries), num_classes).scatter_add_(1, targets[nearest], weights)
            return votes / weights.sum(dim=1, keepdim=True)

        return Classifier(scores, {"k": self.k, "temperature": self.temperature})


@dataclass(frozen=True)
class LinearProbe(Probe):
    """Multinomial logistic regression with CLIP's search of the penalty (arXiv 2103.00020, appendix A.3).

        J(W, b) = - sum_i log softmax(W x_i + b)[y_i] + l2 / 2 ||W||^2

    by scikit-learn's L-BFGS on the CPU, at most `MAX_ITERATIONS` iterations, l2 = 1 / C; the bias is not penalised.

    Features x are standardised. CLIP's are not: but the penalty depends on the scale of the features, which differs
    between towers. Standardising is affine, so the probe remains linear in the features.

    The penalty is searched on at most `search_images` training images, drawn by `seed`; every fifth of them, class by
    class, validates. Its criterion is top-1 accuracy; of equal ones the strongest penalty wins. The final fit is on all
    images. `settings` are `l2` and the `iterations` of the final fit.
    """

    name = "linear_probe"
    search_images: int = 20_000
    seed: int = 0

    def fit_classifier(self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"]) -> Classifier:
        """See `Probe.fit_classifier`; raises a `DataError` for too few images to hold some out."""
        x, y = features.cpu().numpy(), targets.cpu().numpy()
        fitted, held = split(y, self.search_images, self.seed)
        if not len(held) or len(np.unique(y[fitted])) < 2:
            raise DataError(f"{self.name} holds out one in {VALIDATION_EVERY} training images to choose its penalty, "
                            f"and needs two classes among the others: {len(y)} images are too few")

        def accuracy(exponent: float) -> float:
            return float(fit_logistic(x[fitted], y[fitted], 10.0**exponent).score(x[held], y[held]))

        l2 = 10.0 ** search(accuracy)
        pipeline = fit_logistic(x, y, l2)
        iterations = int(pipeline[-1].n_iter_.max())
        if iterations >= MAX_ITERATIONS:
            logger.warning("%s stopped after %d iterations, before it had converged", self.name, MAX_ITERATIONS)

        def scores(queries: Float[Tensor, "q C"]) -> Float[Tensor, "q M"]:
            logits = pipeline.decision_function(queries.cpu().numpy())
            logits = np.stack([-logits, logits], axis=1) / 2 if logits.ndim == 1 else logits
            return torch.from_numpy(logits).to(queries)

        return Classifier(scores, {"l2": l2, "iterations": iterations})


def fit_logistic(features: Float[np.ndarray, "B C"], targets: Int[np.ndarray, " B"], l2: float) -> "Pipeline":
    """Return scikit-learn's pipeline of standardisation and the logistic regression of `LinearProbe`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # for two classes scikit-learn has one row w of logits, W = (-w / 2, w / 2), and penalises ||w||^2 = 2 ||W||^2
    strength = l2 / 2 if len(np.unique(targets)) == 2 else l2
    regression = LogisticRegression(C=1 / strength, max_iter=MAX_ITERATIONS, tol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes")  # fifteen times where classes are small
        return make_pipeline(StandardScaler(), regression).fit(features, targets)


def search(score: Callable[[float], float]) -> float:
    """Return the exponent with the highest score, by CLIP's parametric binary search; of equal scores the highest.

    Scores -6, -4, ..., 6, then halves the interval around the peak until it is an eighth: 15 of 97 values. A single
    peak is found exactly.
    """
    scores = {at: score(at) for at in COARSE}
    step = COARSE[1] - COARSE[0]
    while True:
        peak = max(scores, key=lambda exponent: (scores[exponent], exponent))
        if step <= FINEST:
            return peak
        step /= 2
        scores |= {at: score(at) for at in (peak + step, peak - step) if COARSE[0] <= at <= COARSE[-1]}


def split(
    targets: Int[np.ndarray, " B"], most: int, seed: int
) -> tuple[Int[np.ndarray, " F"], Int[np.ndarray, " H"]]:
    """Return the indices of images to fit and of images to validate on: `most` images in an order drawn by `seed`.

    Sorted by class every fifth validates, so that both parts have the same fractions of classes, as far as whole images
    allow; scikit-learn's splits need several images of each.
    """
    order = generator(seed, "linear_probe").permutation(len(targets))[:most]
    order = order[targets[order].argsort(kind="stable")]
    held = np.arange(len(order)) % VALIDATION_EVERY == VALIDATION_EVERY - 1
    return order[~held], order[held]
