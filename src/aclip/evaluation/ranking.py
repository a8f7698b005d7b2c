"""Ranks, which retrieval and classification measure.

The rank of a query is 1 + the number of wrong items whose similarity is not at least `TIE` below that of its best
right item. Ties count against the model: one that maps everything to a point scores 0, not 100 %.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aclip.evaluation import sharding

TIE = 1e-6
"""Similarities and class scores closer than this are equal: float32 resolves no more."""

CHUNK_ELEMENTS = 2**26
"""Entries of a matrix of class scores held at a time (256 MiB); of similarities a quarter (128 MiB in float64)."""

EXACT_ENTRIES = 2**31
"""Matrices of at most this many entries are computed in float64, larger ones in float32, in half the time."""


class Ranks(NamedTuple):
    """Ranks on the CPU, from 1, of each query's best right item and of each item's best right query.

    `margins` are similarities of the best right item minus those of the best wrong one; infinite where none is wrong.
    """

    queries: Int[Tensor, " Q"]
    items: Int[Tensor, " I"]
    margins: Float[Tensor, " Q"]


def rank_both_ways(
    queries: Float[Tensor, "Q D"], items: Float[Tensor, "I D"], right: Int[Tensor, "2 P"], *,
    chunk_elements: int = CHUNK_ELEMENTS // 4,
) -> Ranks:
    """Rank the best right item of every query among the wrong ones, and the best right query of every item.

    rank(q) = 1 + #{i wrong : s(q, i) >= max over right r of s(q, r) - TIE},  s = <q, i>

    and the same with the roles exchanged, of L2-normalised and finite features. `right` are all pairs (query, item)
    that are right, int64; every query and every item is in at least one.

    In float64, exact, up to `EXACT_ENTRIES` where the device has it. The matrix is never held: bands of rows, of at
    most `chunk_elements` or one row, are computed, counted in both directions and dropped. With sharding each rank
    takes every n-th band, and the counts are summed, so that the result is equal on all ranks.
    """
    a, b = map(widened, (queries, items)) if len(queries) * len(items) <= EXACT_ENTRIES else (queries, items)
    best_a, best_b = (x.new_full((len(x),), -math.inf) for x in (a, b))
    for i, j in right.split(max(1, chunk_elements // a.shape[1]), dim=1):
        similarity = (a[i] * b[j]).sum(dim=1)
        best_a.scatter_reduce_(0, i, similarity, "amax")
        best_b.scatter_reduce_(0, j, similarity, "amax")
    above_a, above_b = (torch.zeros(len(x), dtype=torch.int64, device=x.device) for x in (a, b))
    best_wrong = torch.zeros_like(best_a)
    rows = max(1, chunk_elements // len(b))
    for start in range(0, len(a), rows)[sharding.rank() :: sharding.world_size()]:
        band = slice(start, start + rows)
        wrong = a[band] @ b.T
        i, j = right[:, (right[0] >= start) & (right[0] < start + rows)]
        wrong[i - start, j] = -math.inf
        best_wrong[band] = wrong.amax(dim=1)
        # int32 sums are five times as fast as the default's
        above_a[band] = (wrong >= best_a[band, None] - TIE).sum(dim=1, dtype=torch.int32).long()
        above_b += (wrong >= best_b - TIE).sum(dim=0, dtype=torch.int32)
    found = (above_a, above_b, best_wrong)
    above_a, above_b, best_wrong = (torch.stack(sharding.collect(x.cpu())).sum(dim=0) for x in found)
    return Ranks(1 + above_a, 1 + above_b, (best_a.cpu() - best_wrong).double())


def widened(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `x` in float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()


def classify(
    scores: Callable[[Float[Tensor, "q D"]], Float[Tensor, "q M"]], features: Float[Tensor, "B D"],
    targets: Int[Tensor, " B"], classes: Sequence[str], *, row_elements: int = 0,
) -> dict[str, Any]:
    """Measure a classifier by the scores of its M classes, higher for likelier ones; targets are the right ones.

    Of classes with equal names (ImageNet has two such pairs), which no model can distinguish, the first counts as
    nearer. `row_elements` are the entries that `scores` holds for an image, if more than M.

    Return, as in `Evaluation`, `metrics` (`top1`, `top5` of more than five classes, and `mean_per_class`), `chance`,
    and `details`: `classes`; `pictures` and `right`, a count for each; `confusions`, [class, prediction, images] of the
    wrong predictions, the most frequent first.
    """
    ranks, predictions = [], []
    for some, own in in_chunks(features, targets, max(len(classes), row_elements)):
        found = scores(some)
        ranks.append(class_ranks(found, own))
        predictions.append(found.argmax(dim=1).cpu())
    targets = targets.cpu()
    rank = torch.cat(ranks) - _later_namesakes(classes)[targets]
    cutoffs = (1, 5) if len(classes) > 5 else (1,)
    pairs = Counter(zip(targets.tolist(), torch.cat(predictions).tolist(), strict=True))
    wrong = sorted(([i, j, count] for (i, j), count in pairs.items() if i != j), key=lambda one: (-one[2], *one[:2]))
    seen, right = (torch.bincount(some, minlength=len(classes)).tolist() for some in (targets, targets[rank == 1]))
    return {
        "metrics": {f"top{k}": recall(rank, k) for k in cutoffs} | {"mean_per_class": mean_per_class(rank, targets)},
        "chance": {f"top{k}": k / len(classes) for k in cutoffs} | {"mean_per_class": 1 / len(classes)},
        "details": {"classes": list(classes), "pictures": seen, "right": right, "confusions": wrong},
    }


def in_chunks(
    features: Float[Tensor, "B D"], targets: Int[Tensor, " B"], row_elements: int
) -> Iterator[tuple[Float[Tensor, "q D"], Int[Tensor, " q"]]]:
    """Return images with their classes, as many at a time as `CHUNK_ELEMENTS` holds rows of `row_elements`."""
    rows = max(1, CHUNK_ELEMENTS // row_elements)
    return zip(features.split(rows), targets.split(rows), strict=True)


def class_ranks(scores: Float[Tensor, "Q M"], targets: Int[Tensor, " Q"]) -> Int[Tensor, " Q"]:
    """Return the rank from 1 of the right class of every query, on the CPU, by scores higher for likelier ones.

    rank(q) = 1 + #{m wrong : not scores(q, m) < scores(q, right) - TIE}
    """
    below = scores < scores.gather(1, targets[:, None]) - TIE  # false for the right class itself
    return (~below).sum(dim=1).cpu()


def recall(rank: Int[Tensor, " Q"], k: int) -> float:
    """Return the fraction of queries whose rank is at most `k`, in [0, 1]."""
    return float((rank <= k).double().mean())


def mean_per_class(rank: Int[Tensor, " Q"], targets: Int[Tensor, " Q"]) -> float:
    """Return the mean of the classes' top-1 accuracies, over classes that have a query; arguments on the CPU."""
    seen = torch.bincount(targets)
    right = torch.bincount(targets, weights=(rank == 1).double())
    return float((right / seen)[seen > 0].mean())


def chance_recall(right: int, items: int, k: int) -> float:
    """Return the probability that a random order has one of `right` items among the first `k`, hypergeometric."""
    k = min(k, items)
    return 1 - math.comb(items - right, k) / math.comb(items, k)


def _later_namesakes(classes: Sequence[str]) -> Int[Tensor, " M"]:
    seen: Counter[str] = Counter()
    later = []
    for name in reversed(classes):
        later.append(seen[name])
        seen[name] += 1
    return torch.tensor(later[::-1])
