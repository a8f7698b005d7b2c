"""The linear probe: multinomial logistic regression on frozen features.

CLIP's protocol (Radford et al. 2021, arXiv 2103.00020, appendix A.3): L-BFGS, at most 1000 iterations, the
strength of the L2 penalty found by a search on a validation split, the final fit on all training pictures.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from aclip.errors import ConfigError, DataError, unknown_name
from aclip.evaluation import linear_probe_sgd as sgd
from aclip.evaluation.probe import CHUNK_ELEMENTS, Classifier, Probe
from aclip.evaluation.ranking import class_ranks, recall
from aclip.rng import generator

MAX_ITERATIONS = 1000

LOWEST, HIGHEST = -6.0, 6.0
"""Decimal exponents between which the strength is searched."""

FIRST_STEP, LAST_STEP = 2.0, 0.125
"""Steps between exponents: of the first, coarse grid and of the last, finest one (8 a decade)."""

VALIDATION_SHARE = 5
"""One in this many training pictures validates during the search."""

SOLVERS = ("lbfgs", "sgd")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinearProbe(Probe):
    """Multinomial logistic regression with the strength of its penalty searched as CLIP does.

    Features are standardised by the mean and deviation of the pictures that are fitted. CLIP's are not: but
    the penalty is not invariant to scale, the scale of features differs from tower to tower by what their
    last norm has learned, and only on a common scale do the strengths mean the same for all models that are
    compared. Unlike L2 normalisation it is affine, so the probe remains linear in the features.

    The search runs on at most `search_pictures` training pictures, drawn by `seed`; every fifth of them,
    class by class, validates and the others are fitted. Its criterion is top-1 accuracy, and of equal ones
    the stronger penalty wins. `settings` say what was found: `l2` (the strength, see `Regression`) and
    `iterations` of the final fit.

    With `solver="sgd"` the classifier is fitted by stochastic gradient descent in place of L-BFGS, and what is
    searched, on the same split by the same criterion, is the whole grid of `linear_probe_sgd.LEARNING_RATES` and
    `WEIGHT_DECAYS`; `settings` are then `learning_rate` and `weight_decay`.

    Attributes:
        search_pictures: bounds the cost of the search; the final fit is on all.
        seed: of the split, and of the order of SGD's batches.
        solver: in `SOLVERS`.

    Raises:
        ConfigError: an unknown solver.
    """

    name = "linear_probe"
    search_pictures: int = 20_000
    seed: int = 0
    solver: str = "lbfgs"

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ConfigError(unknown_name("solver of the linear probe", self.solver, SOLVERS))

    @property
    def variant(self) -> str:
        """See `Evaluator.variant`."""
        return "" if self.solver == "lbfgs" else self.solver

    def fit(self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int) -> Classifier:
        """See `Probe.fit`.

        Raises:
            DataError: too few pictures to set some apart for validation.
        """
        if self.solver == "sgd":
            return self._fit_by_sgd(features, targets, num_classes)
        l2 = self._choose_strength(features, targets, num_classes)
        regression = Regression(features, targets, num_classes)
        solution = regression.solve(l2)
        if solution.iterations >= MAX_ITERATIONS:
            logger.warning("%s stopped after %d iterations of L-BFGS, before it had converged",
                           self.name, MAX_ITERATIONS)
        settings = {"l2": l2, "iterations": solution.iterations}
        return Classifier(regression.classifier(solution), num_classes + features.shape[1], settings)

    def _fit_by_sgd(
        self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int
    ) -> Classifier:
        fitted, held = split(targets, self.search_pictures, self.seed)
        at_once = max(1, CHUNK_ELEMENTS // (num_classes * max(features.shape[1], sgd.BATCH_SIZE)))
        head = sgd.choose(features, targets, num_classes, self.seed, fitted, held, at_once)
        regression = sgd.SgdRegression(features, targets, num_classes, self.seed)
        (logits,) = regression.classifiers(*regression.train([head]))
        settings = {"learning_rate": head.learning_rate, "weight_decay": head.weight_decay}
        return Classifier(logits, num_classes + features.shape[1], settings)

    def _choose_strength(
        self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int
    ) -> float:
        fitted, held = split(targets, self.search_pictures, self.seed)
        regression = Regression(features[fitted], targets[fitted], num_classes)

        def accuracy(exponent: float) -> float:
            logits = regression.classifier(regression.solve(10.0**exponent))
            return recall(class_ranks(logits(features[held]), targets[held]), 1)

        return float(10.0 ** search(accuracy))


def search(score: Callable[[float], float]) -> float:
    """Return the exponent with the highest score, by CLIP's parametric binary search.

    Scores -6, -4, ..., 6, then halves the interval around the peak until it is an eighth: 15 of the 97
    values. The peak of a score with a single one is found exactly; of equal scores the highest exponent wins.

    Args:
        score: exponent -> what is to be high.
    """
    step = FIRST_STEP
    coarse = (LOWEST + i * step for i in range(round((HIGHEST - LOWEST) / step) + 1))
    scores = {exponent: score(exponent) for exponent in coarse}
    while step > LAST_STEP:
        step /= 2
        peak = max(scores, key=lambda exponent: (scores[exponent], exponent))
        for exponent in (peak + step, peak - step):
            if LOWEST <= exponent <= HIGHEST:
                scores[exponent] = score(exponent)
    return max(scores, key=lambda exponent: (scores[exponent], exponent))


def split(targets: Int[Tensor, " B"], most: int, seed: int) -> tuple[Int[Tensor, " F"], Int[Tensor, " H"]]:
    """Return the numbers of pictures to fit and of pictures to validate on, on the device of `targets`.

    `most` pictures in an order drawn by `seed`, sorted by class; every fifth validates, so that classes
    keep their shares in both parts, as far as whole pictures allow.

    Raises:
        DataError: fewer than five pictures.
    """
    order = torch.from_numpy(generator(seed, "linear_probe").permutation(len(targets))[:most]).to(targets.device)
    order = order[targets[order].sort(stable=True).indices]
    held = torch.arange(len(order), device=order.device) % VALIDATION_SHARE == VALIDATION_SHARE - 1
    if not bool(held.any()):
        raise DataError(f"the linear probe sets one in {VALIDATION_SHARE} training pictures apart to choose its "
                        f"penalty: {len(order)} are too few")
    return order[~held], order[held]


@dataclass(frozen=True)
class Solution:
    """Weights of a `Regression`, in its own coordinates.

    Attributes:
        weight: (M, C + 1), the bias last.
        iterations: of L-BFGS.
    """

    weight: Float[Tensor, "M C+1"]
    iterations: int


class Regression:
    """Multinomial logistic regression on a set of pictures, to be solved for one or several strengths.

        J(W, b) = - sum_i log softmax(W x_i + b)[y_i] + l2 / 2 ||W||^2

    with x standardised; the bias is not penalised. The strength counts against the sum over pictures, as in
    scikit-learn (l2 = 1 / C), which CLIP used: as the prior of the weights it does not depend on how many
    pictures there are. A feature that never varies has no say.

    L-BFGS works in coordinates in which the problem is round: the principal axes of x, which leave ||W|| as
    it is, and the bias as the weight of a constant 1; each scaled by the inverse root of the curvature
    penalty + p (1 - p) x mean square that it has at p = 1 / M. That changes the path and not the optimum;
    strongly correlated features, as towers have, otherwise take ten times as many iterations or more.
    """

    def __init__(self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int) -> None:
        """Prepare; holds one copy of `features`.

        Args:
            features: (B, C) float32, finite. targets: (B,) int64 in [0, num_classes).
            num_classes: M.
        """
        self._targets, self._num_classes = targets, num_classes
        self._mean = features.mean(dim=0)
        deviation = (features - self._mean).square().mean(dim=0).sqrt()
        varies = deviation > 1e-6 * features.abs().amax(dim=0)  # below that it is rounding
        inverse = torch.where(varies, deviation, torch.inf).reciprocal()
        standard = (features - self._mean) * inverse
        # the axes on the CPU in float64: not every device has either
        covariance = (standard.T @ standard / len(features)).cpu().double()
        variance, axes = torch.linalg.eigh(covariance)
        self._axes = inverse[:, None] * axes.to(features)
        self._rotated = F.pad((features - self._mean) @ self._axes, (0, 1), value=1.0)
        self._mean_square = F.pad(variance.clamp(min=0).to(features), (0, 1), value=1.0)
        self._penalised = F.pad(torch.ones_like(self._mean), (0, 1))

    def solve(self, l2: float) -> Solution:
        """Minimise J from zero, as far as float32 resolves it, in at most 1000 iterations.

        Always from zero, though the solution for another strength is nearer: weak penalties on classes that can be
        told apart without error leave J so flat that where it ends depends on where it starts.

        Args:
            l2: the strength, above 0.
        """
        count, classes = len(self._targets), self._num_classes
        penalty = l2 / count * self._penalised
        scale = (penalty + (classes - 1) / classes**2 * self._mean_square).rsqrt()
        rows = max(1, CHUNK_ELEMENTS // classes)
        chunks = list(zip(self._rotated.split(rows), self._targets.split(rows), strict=True))
        point = torch.zeros(classes, len(scale), device=scale.device, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [point], max_iter=MAX_ITERATIONS, max_eval=2 * MAX_ITERATIONS, tolerance_grad=1e-5, tolerance_change=1e-9,
            history_size=10, line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            """J / n: chunk by chunk, so that only one chunk's logits are held."""
            optimizer.zero_grad()
            part = (penalty * (point * scale).square()).sum() / 2
            part.backward()
            total: Tensor = part.detach()
            for x, y in chunks:
                part = F.cross_entropy(F.linear(x, point * scale), y, reduction="sum") / count
                part.backward()
                total = total + part.detach()
            return total

        optimizer.step(objective)
        return Solution(point.detach() * scale, optimizer.state[point]["n_iter"])

    def classifier(self, solution: Solution) -> Callable[[Float[Tensor, "q C"]], Float[Tensor, "q M"]]:
        """Return the map from features, as they were given, to logits."""
        mean, weight, bias = self._mean, solution.weight[:, :-1] @ self._axes.T, solution.weight[:, -1]
        return lambda features: F.linear(features - mean, weight, bias)
