"""Nearest neighbours: the vote of the most similar training pictures."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from aclip.errors import ConfigError
from aclip.evaluation.probe import Classifier, Probe


@dataclass(frozen=True)
class NearestNeighbours(Probe):
    """The weighted vote of Wu et al. 2018 (arXiv 1805.01978, section 3.4), as DINO (2104.14294) sets it.

    score(q, m) = sum over i in N_k(q) of exp(s(q, i) / temperature) [class of i = m],  s = cosine similarity

    N_k(q) are the k training pictures most similar to q, all of them where there are fewer. Nothing is
    chosen on the data. Scores are divided by their sum, which changes no rank.

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

    def fit(self, features: Float[Tensor, "B C"], targets: Int[Tensor, " B"], num_classes: int) -> Classifier:
        """See `Probe.fit`; keeps the normalised features."""
        items = F.normalize(features, dim=1)
        k = min(self.k, len(items))

        def scores(queries: Float[Tensor, "q C"]) -> Float[Tensor, "q M"]:
            similarity, nearest = (F.normalize(queries, dim=1) @ items.T).topk(k, dim=1)
            weights = ((similarity - 1.0) / self.temperature).exp()  # over the largest there can be: no overflow
            votes = torch.zeros(len(queries), num_classes, device=queries.device)
            votes.scatter_add_(1, targets[nearest], weights)
            return votes / weights.sum(dim=1, keepdim=True)

        return Classifier(scores, len(items), {"k": self.k, "temperature": self.temperature})
