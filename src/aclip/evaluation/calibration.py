"""Calibration: whether a zero-shot classifier is right as often as it is sure.

Its probabilities are softmax(logit_scale x cosine), with the model's own, learned logit_scale (1 / temperature), as its
contrastive training made them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from aclip.errors import UnsupportedModelError
from aclip.evaluation.base import Evaluation
from aclip.evaluation.features import PictureFeatures
from aclip.evaluation.texts import TextEncoder
from aclip.evaluation.zero_shot import Named, class_embeddings


@dataclass(frozen=True)
class Calibration(Named):
    """Expected calibration error and negative log-likelihood of zero-shot classification.

        ECE = sum over bins b of n_b / n |accuracy(b) - mean confidence(b)|

    over `bins` bins of equal width of the confidence, the highest probability of a picture (Guo et al. 2017, arXiv
    1706.04599, equation 3); NLL = mean of -log p(right class), in nats. Metrics are `ece`, `nll`, `confidence` (mean)
    and `accuracy` (share of pictures whose likeliest class is right, the first of equally likely ones). `chance` of
    `nll` is that of equal probabilities, log M. `details` hold the reliability diagram.

    Attributes:
        bins: of the confidence.
    """

    name = "calibration"
    bins: int = 15

    def measure(self, texts: TextEncoder, pictures: PictureFeatures) -> Evaluation:
        """See `Evaluator.measure`.

        Raises:
            ConfigError: no picture of the set is of one of the given classes, or all are of one.
            UnsupportedModelError: the model has no logit_scale.
        """
        classes, kept, targets = self.targets(pictures)
        embeddings = class_embeddings(texts, classes, self.templates)
        scale = logit_scale(texts.model)
        wanted = torch.tensor(targets, device=embeddings.device)
        chosen = pictures.features[torch.tensor(kept, device=embeddings.device)]
        rows = max(1, self.chunk_elements // len(classes))
        confidence, right, nll = [], [], 0.0
        for some, own in zip(chosen.split(rows), wanted.split(rows), strict=True):
            logits = scale * some @ embeddings.T
            nll += float(F.cross_entropy(logits, own, reduction="sum"))
            best, guess = logits.softmax(dim=1).max(dim=1)
            confidence.append(best.cpu())
            right.append((guess == own).cpu())
        sure, hits = torch.cat(confidence).double(), torch.cat(right)
        diagram = reliability(sure, hits, self.bins)
        ece = sum(part["pictures"] / len(kept) * abs(part["accuracy"] - part["confidence"]) for part in diagram)
        metrics = {"ece": ece, "nll": nll / len(kept), "confidence": float(sure.mean()),
                   "accuracy": float(hits.double().mean())}
        counts = {"pictures": len(kept), "classes": len(classes), "skipped": len(pictures.skipped),
                  "outside_classes": pictures.size - len(kept)}
        chance = {"nll": float(torch.tensor(len(classes)).log()), "accuracy": 1 / len(classes)}
        return Evaluation(self.name, metrics, chance, counts, details={"reliability": diagram, "logit_scale": scale})


def reliability(
    confidence: Float[Tensor, " B"], right: Bool[Tensor, " B"], bins: int
) -> list[dict[str, Any]]:
    """Return accuracy and mean confidence of the pictures in each bin ((i - 1) / bins, i / bins] that has any.

    Args:
        confidence: (B,) in [0, 1]. right: (B,) whether the guess was.
        bins: how many.
    """
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    found = []
    for i in range(bins):
        inside = number == i
        if bool(inside.any()):
            found.append({"from": i / bins, "to": (i + 1) / bins, "pictures": int(inside.sum()),
                          "confidence": float(confidence[inside].mean()),
                          "accuracy": float(right[inside].double().mean())})
    return found


def logit_scale(model: Any) -> float:
    """Return what a model multiplies cosines with: exp of its parameter `logit_scale`.

    Raises:
        UnsupportedModelError: it has none.
    """
    while not isinstance(parameter := getattr(model, "logit_scale", None), Tensor) and hasattr(model, "model"):
        model = model.model  # `LoadedModel`, or what wraps it, around open_clip's own
    if not isinstance(parameter, Tensor):
        raise UnsupportedModelError("this model has no logit_scale, so its similarities are not probabilities")
    return float(parameter.detach().float().exp())
