"""Probes: how well a simple classifier on an image tower's frozen features does.

The classifier is fitted on labelled training images and measured on held-out sets. It reads the pooled image token
before the projection into the joint space, as the probes of CLIP (arXiv 2103.00020, appendix A.3) and SLIP (arXiv
2112.12750) do, so that models trained without text are measured alike.
"""

import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from aclip.errors import ConfigError, DataError
from aclip.evaluation.base import Evaluation, Evaluator
from aclip.evaluation.features import ImageFeatures, TextEncoder
from aclip.evaluation.ranking import accuracies, class_ranks, confusions, recall
from aclip.evaluation.zero_shot import ClassFinder, distinct_labels, select_known
from aclip.rng import generator

CHUNK_ELEMENTS = 2**26
"""Float32 entries of scores or similarities held at once (256 MiB): 1,024 queries by 65,536 training images."""

QUERIES = 1024
"""Queries whose neighbours are searched at once."""

MAX_ITERATIONS = 1000
LOWEST, HIGHEST, FIRST_STEP, LAST_STEP = -6.0, 6.0, 2.0, 0.125  # decimal exponents of the penalties searched
VALIDATION_EVERY = 5  # one in this many training images validates during the search

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier.

    Attributes:
        scores: (q, C) features -> (q, M) scores of the classes, higher for likelier ones.
        settings: name -> what it was fitted with.
        classes: names of the M classes. images: number of training images.
    """

    scores: Callable[[Float[Tensor, "q C"]], Float[Tensor, "q M"]]
    settings: Mapping[str, float]
    classes: tuple[str, ...] = ()
    images: int = 0


@dataclass(frozen=True)
class Probe(Evaluator):
    """Classifies held-out images by a classifier fitted on labelled ones; subclasses implement `fit_classifier`.

    `fit` comes first and once; what it returns measures any number of sets. Metrics are `top1`, `top5` (of more than
    five classes) and `mean_per_class`, fractions in [0, 1]; the classes are those of the training set. Counts are
    `pictures`, `classes`, `training_pictures`, `skipped` and `outside_classes` (images left out because no training
    image is of their class). Ties count against the model, see `aclip.evaluation.ranking`.

    Attributes:
        classifier: None before `fit`.
    """

    space = "trunk"
    classifier: Classifier | None = field(default=None, repr=False, kw_only=True)

    def fit(self, training: ImageFeatures) -> Self:
        """Return this probe, fitted on labelled images (`encode_image_set` with `space="trunk"`).

        Raises:
            DataError: images without label, or fewer than two classes.
        """
        labels = [label for label in training.labels if label is not None]
        if len(labels) < len(training):
            raise DataError(f"{self.name} learns from labels, which {len(training) - len(labels)} of "
                            f"{len(training)} training images do not have")
        classes, indices = distinct_labels(labels)
        if len(classes) < 2:
            raise DataError(f"{self.name} needs at least two classes, and all {len(training)} training images are of "
                            f"class '{classes[0]}'")
        targets = torch.tensor(indices, device=training.features.device)
        found = self.fit_classifier(training.features, targets, len(classes))
        return replace(self, classifier=replace(found, classes=tuple(classes), images=len(training)))

    @abstractmethod
    def fit_classifier(
        self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int
    ) -> Classifier:
        """Fit a classifier.

        Args:
            features: (B, C) float32, finite.
            targets: (B,) int64 in [0, num_classes), on the device of `features`.
            num_classes: M, at least 2.
        """

    def measure(self, images: ImageFeatures, texts: TextEncoder) -> Evaluation:
        """See `Evaluator.measure`; reads no text. Images without label count as skipped.

        Raises:
            ConfigError: `fit` has not been called, or no image is of a training class.
        """
        if self.classifier is None:
            raise ConfigError(f"{self.name} learns from labelled images before it is measured: call fit first")
        classes, scores = self.classifier.classes, self.classifier.scores
        labelled = [(i, label) for i, label in enumerate(images.labels) if label is not None]
        labels = [label for _, label in labelled]
        find = ClassFinder(classes)
        kept, indices = select_known([find(label) for label in labels], len(classes), "training", labels)
        targets = torch.tensor(indices, device=images.features.device)
        features = images.features[torch.tensor([labelled[i][0] for i in kept], device=targets.device)]
        rows = max(1, CHUNK_ELEMENTS // len(classes))
        ranks, nearest = [], []
        with torch.inference_mode():
            for some, right in zip(features.split(rows), targets.split(rows), strict=True):
                found = scores(some)
                ranks.append(class_ranks(found, right))
                nearest.append(found.argmax(dim=1).cpu())
        rank, targets = torch.cat(ranks), targets.cpu()
        counts = {"pictures": len(kept), "classes": len(classes), "training_pictures": self.classifier.images,
                  "skipped": len(images.skipped) + len(images) - len(labelled),
                  "outside_classes": len(labelled) - len(kept)}
        return Evaluation(self.name, *accuracies(rank, targets, len(classes)), counts,
                          settings=self.classifier.settings,
                          details=confusions(classes, targets, rank, torch.cat(nearest)))


@dataclass(frozen=True)
class NearestNeighbours(Probe):
    """The weighted vote of Wu et al. 2018 (arXiv 1805.01978, section 3.4), with the settings of DINO (2104.14294).

    score(q, m) = sum over i in N_k(q) of exp(s(q, i) / temperature) [class of i = m],  s = cosine similarity

    N_k(q) are the k training images most similar to q, or all if there are fewer. Nothing is chosen on the data. Scores
    are divided by their sum, which changes no rank. Memory is bounded by `CHUNK_ELEMENTS` for any training set.

    Attributes:
        k: neighbours that vote; Wu et al. take 200, DINO finds 20 best.
        temperature: of the weights, as in both.

    Raises:
        ConfigError: k below 1, or a temperature that is not above 0.
    """

    name = "knn"
    k: int = 20
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.k < 1 or not self.temperature > 0:
            raise ConfigError(f"{self.name} needs k of at least 1 and a temperature above 0, "
                              f"not k {self.k} and temperature {self.temperature:g}")

    def fit_classifier(
        self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int
    ) -> Classifier:
        """See `Probe.fit_classifier`; keeps the normalised features."""
        items = F.normalize(features, dim=1)

        def scores(queries: Float[Tensor, "q C"]) -> Float[Tensor, "q M"]:
            return torch.cat([self._vote(F.normalize(some, dim=1), items, targets, num_classes)
                              for some in queries.split(QUERIES)])

        return Classifier(scores, {"k": self.k, "temperature": self.temperature})

    def _vote(
        self, queries: Float[Tensor, "q C"], items: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int
    ) -> Float[Tensor, "q M"]:
        similarity = queries.new_empty(len(queries), 0)
        nearest = targets.new_empty(len(queries), 0)
        for start, tile in zip(range(0, len(items), _tile()), items.split(_tile()), strict=True):
            found, index = (queries @ tile.T).topk(min(self.k, len(tile)), dim=1)
            merged, order = torch.cat([similarity, found], dim=1).sort(dim=1, descending=True, stable=True)
            similarity = merged[:, : self.k]
            nearest = torch.cat([nearest, index + start], dim=1).gather(1, order[:, : self.k])
        weights = ((similarity - 1.0) / self.temperature).exp()  # relative to the largest possible: no overflow
        votes = queries.new_zeros(len(queries), num_classes).scatter_add_(1, targets[nearest], weights)
        return votes / weights.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class LinearProbe(Probe):
    """Multinomial logistic regression with CLIP's search of the penalty (arXiv 2103.00020, appendix A.3).

        J(W, b) = - sum_i log softmax(W x_i + b)[y_i] + l2 / 2 ||W||^2

    by scikit-learn's L-BFGS, at most `MAX_ITERATIONS` iterations, l2 = 1 / C; the bias is not penalised. The penalty is
    searched on a held-out part of the training images, the final fit is on all of them.

    Features x are standardised by the mean and standard deviation of the fitted images. CLIP's are not: but the penalty
    depends on the scale of the features, which differs between towers, and penalties are comparable on a common scale
    only. Standardising is affine, so the probe remains linear in the features. A constant feature has no effect.

    The search runs on at most `search_images` training images, drawn by `seed`; every fifth of them, class by class,
    validates. Its criterion is top-1 accuracy; of equal ones the strongest penalty wins. `settings` are `l2` and the
    `iterations` of the final fit.

    Attributes:
        search_images: bounds the cost of the search.
        seed: of the split.
    """

    name = "linear_probe"
    search_images: int = 20_000
    seed: int = 0

    def fit_classifier(
        self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int
    ) -> Classifier:
        """See `Probe.fit_classifier`.

        Raises:
            DataError: too few images to hold some out.
        """
        fitted, held = split(targets, self.search_images, self.seed)

        def accuracy(exponent: float) -> float:
            found = fit_logistic(features[fitted], targets[fitted], num_classes, 10.0**exponent)
            return recall(class_ranks(found.scores(features[held]), targets[held]), 1)

        found = fit_logistic(features, targets, num_classes, 10.0 ** search(accuracy))
        if found.settings["iterations"] >= MAX_ITERATIONS:
            logger.warning("%s stopped after %d iterations, before it had converged", self.name, MAX_ITERATIONS)
        return found


def fit_logistic(
    features: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int, l2: float
) -> Classifier:
    """Fit the logistic regression of `LinearProbe` for one penalty; classes without an image are never predicted.

    Raises:
        DataError: all images are of one class.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    varies = std > 1e-6 * features.abs().amax(dim=0)  # below that it is rounding
    inverse = torch.where(varies, std, torch.inf).reciprocal()
    present = targets.unique()
    if len(present) < 2:
        raise DataError("the linear probe needs several training images of at least two classes to choose its penalty")
    # for two classes scikit-learn has one row w of logits, W = (-w / 2, w / 2), and penalises ||w||^2 = 2 ||W||^2
    strength = l2 / 2 if len(present) == 2 else l2
    regression = LogisticRegression(C=1 / strength, max_iter=MAX_ITERATIONS, tol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit(((features - mean) * inverse).cpu().numpy(), targets.cpu().numpy())
    coefficients, intercepts = (torch.from_numpy(x).to(features) for x in (regression.coef_, regression.intercept_))
    if len(present) == 2:
        coefficients = torch.cat([-coefficients, coefficients]) / 2
        intercepts = torch.cat([-intercepts, intercepts]) / 2
    weight = features.new_zeros(num_classes, features.shape[1]).index_copy_(0, present, coefficients * inverse)
    bias = features.new_full((num_classes,), -torch.inf).index_copy_(0, present, intercepts)
    settings = {"l2": l2, "iterations": int(regression.n_iter_.max())}
    return Classifier(lambda queries: F.linear(queries - mean, weight, bias), settings)


def search(score: Callable[[float], float]) -> float:
    """Return the exponent with the highest score, by CLIP's parametric binary search.

    Scores -6, -4, ..., 6, then halves the interval around the peak until it is an eighth: 15 of 97 values. A single
    peak is found exactly; of equal scores the highest exponent wins.
    """
    step = FIRST_STEP
    scores = {LOWEST + i * step: score(LOWEST + i * step) for i in range(round((HIGHEST - LOWEST) / step) + 1)}
    while step > LAST_STEP:
        step /= 2
        peak = max(scores, key=lambda exponent: (scores[exponent], exponent))
        scores |= {at: score(at) for at in (peak + step, peak - step) if LOWEST <= at <= HIGHEST}
    return max(scores, key=lambda exponent: (scores[exponent], exponent))


def split(targets: Int[Tensor, " B"], most: int, seed: int) -> tuple[Int[Tensor, " F"], Int[Tensor, " H"]]:
    """Return the indices of images to fit and of images to validate on, on the device of `targets`.

    `most` images in an order drawn by `seed`, sorted by class; every fifth validates, so that both parts have the same
    fractions of classes, as far as whole images allow.

    Raises:
        DataError: fewer than five images.
    """
    order = torch.from_numpy(generator(seed, "linear_probe").permutation(len(targets))[:most]).to(targets.device)
    order = order[targets[order].sort(stable=True).indices]
    held = torch.arange(len(order), device=order.device) % VALIDATION_EVERY == VALIDATION_EVERY - 1
    if not bool(held.any()):
        raise DataError(f"the linear probe holds out one in {VALIDATION_EVERY} training images to choose its penalty: "
                        f"{len(order)} are too few")
    return order[~held], order[held]


def _tile() -> int:
    return max(1, CHUNK_ELEMENTS // QUERIES)
