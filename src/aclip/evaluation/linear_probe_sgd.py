"""The linear probe by stochastic gradient descent, with the sweep of learning rates and decays that goes with it.

Papers on self-supervised towers fit their linear probes so (MoCo, arXiv 1911.05722; MAE, 2111.06377; DINOv2,
2304.07193, which trains a grid of heads side by side and takes the best on validation pictures): an epoch costs what an
iteration of L-BFGS does, and where pictures are many a few are enough.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from aclip.evaluation.ranking import class_ranks, recall
from aclip.rng import generator

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Peak learning rates of the sweep, for the mean loss over a batch of standardised features."""

WEIGHT_DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
"""Of the weights, not of the bias: a penalty of decay / 2 x ||W||^2 beside the mean loss."""

EPOCHS = 30
BATCH_SIZE = 256
MOMENTUM = 0.9


@dataclass(frozen=True)
class Head:
    """One setting of the sweep."""

    learning_rate: float
    weight_decay: float


class SgdRegression:
    """Linear classifiers on standardised features, several settings trained side by side on the same batches.

    Nesterov momentum 0.9, cosine decay of the learning rate to zero over 30 epochs, batches of 256 pictures in an order
    drawn by the seed; weights start at zero. A feature that never varies has no say.
    """

    def __init__(self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int, seed: int) -> None:
        """Prepare; holds one copy of `features`.

        Args:
            features: (B, C) float32, finite. targets: (B,) int64 in [0, num_classes).
            num_classes: M. seed: of the order of the batches.
        """
        self._targets, self._num_classes, self._seed = targets, num_classes, seed
        self._mean = features.mean(dim=0)
        deviation = (features - self._mean).square().mean(dim=0).sqrt()
        varies = deviation > 1e-6 * features.abs().amax(dim=0)  # below that it is rounding
        self._inverse = torch.where(varies, deviation, torch.inf).reciprocal()
        self._standard = (features - self._mean) * self._inverse

    def train(self, heads: list[Head]) -> tuple[Float[Tensor, "H M C"], Float[Tensor, "H M"]]:
        """Return weights and biases of every head, for standardised features."""
        x, count = self._standard, len(self._standard)
        shape = (len(heads), self._num_classes, x.shape[1] + 1)  # the bias is the last column
        weight, momentum = (torch.zeros(shape, device=x.device) for _ in range(2))
        rates = torch.tensor([head.learning_rate for head in heads], device=x.device)[:, None, None]
        decay = torch.zeros(len(heads), 1, shape[2], device=x.device)
        decay[:, 0, :-1] = torch.tensor([head.weight_decay for head in heads], device=x.device)[:, None]
        orders = generator(self._seed, "linear_probe_sgd")
        batches = -(-count // BATCH_SIZE)
        steps = torch.arange(EPOCHS * batches, dtype=torch.float64)
        schedule = (0.5 * (1 + (torch.pi * steps / len(steps)).cos())).tolist()
        for epoch in range(EPOCHS):
            order = torch.from_numpy(orders.permutation(count)).to(x.device)
            for number, rows in enumerate(order.split(BATCH_SIZE)):
                some = F.pad(x[rows], (0, 1), value=1.0)
                # d/dlogits of the mean cross-entropy is (softmax - one-hot) / b
                wrong = torch.einsum("hmc,bc->hbm", weight, some).softmax(dim=-1)
                wrong -= F.one_hot(self._targets[rows], self._num_classes).to(wrong)
                gradient = torch.einsum("hbm,bc->hmc", wrong, some) / len(rows) + decay * weight
                momentum.mul_(MOMENTUM).add_(gradient)
                weight -= schedule[epoch * batches + number] * rates * (gradient + MOMENTUM * momentum)
        return weight[..., :-1], weight[..., -1]

    def classifiers(
        self, weight: Float[Tensor, "H M C"], bias: Float[Tensor, "H M"]
    ) -> list[Callable[[Float[Tensor, "q C"]], Float[Tensor, "q M"]]]:
        """Return, for every head, the map from features as they were given to logits."""
        mean, inverse = self._mean, self._inverse

        def of(w: Float[Tensor, "M C"], b: Float[Tensor, " M"]) -> Callable[[Float[Tensor, "q C"]], Tensor]:
            return lambda features: F.linear((features - mean) * inverse, w, b)

        return [of(w, b) for w, b in zip(weight, bias, strict=True)]


def sweep() -> list[Head]:
    """Return all settings, stronger decay first and then the lower learning rate: of equal ones the first is taken."""
    return [Head(rate, decay) for decay in reversed(WEIGHT_DECAYS) for rate in LEARNING_RATES]


def choose(
    features: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int, seed: int,
    fitted: Int[Tensor, " F"], held: Int[Tensor, " H"], at_once: int,
) -> Head:
    """Return the setting with the highest top-1 accuracy on the pictures `held`, trained on those `fitted`."""
    regression = SgdRegression(features[fitted], targets[fitted], num_classes, seed)
    heads = sweep()
    best, best_accuracy = heads[0], -1.0
    for start in range(0, len(heads), at_once):
        some = heads[start : start + at_once]
        for head, logits in zip(some, regression.classifiers(*regression.train(some)), strict=True):
            accuracy = recall(class_ranks(logits(features[held]), targets[held]), 1)
            if accuracy > best_accuracy:
                best, best_accuracy = head, accuracy
    return best
