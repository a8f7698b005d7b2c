"""Ranks, the one thing that retrieval and classification measure.

The rank of a query is 1 + the number of wrong items whose similarity is not clearly below that of its
best right item. Ties count against the model: one that maps everything to a point scores 0, not 100 %,
and so does one that returns NaN.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TIE = 1e-6
"""Cosine similarities, and scores of classes, closer than this are equal: float32 does not carry more."""

CHUNK_ELEMENTS = 2**22
"""Entries of the similarity matrix held at a time (32 MiB in float64)."""


def similarity_chunks(
    queries: Float[Tensor, "Q D"], items: Float[Tensor, "I D"], chunk_elements: int = CHUNK_ELEMENTS
) -> Iterator[tuple[int, Float[Tensor, "q I"]]]:
    """Yield (first query, similarities of some queries with all items), so that memory stays bounded.

    In float64 where the device has it: the result then depends neither on the size of the chunks nor on
    reduced-precision matrix products.
    """
    wide = torch.float32 if queries.device.type == "mps" else torch.float64
    transposed = items.to(wide).T
    rows = max(1, chunk_elements // max(1, len(items)))
    for start in range(0, len(queries), rows):
        yield start, queries[start : start + rows].to(wide) @ transposed


def ranks(
    queries: Float[Tensor, "Q D"],
    items: Float[Tensor, "I D"],
    query_groups: Int[Tensor, " Q"],
    item_groups: Int[Tensor, " I"],
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Int[Tensor, " Q"], Float[Tensor, " Q"]]:
    """Rank the best right item of every query among the wrong ones.

    rank(q) = 1 + #{i wrong : not s(q, i) < max over right r of s(q, r) - TIE},  s = <q, i>

    Args:
        queries, items: (Q, D) and (I, D), L2-normalised.
        query_groups, item_groups: an item is right for a query when their groups are equal; every query
            has at least one right item.
        chunk_elements: most entries of the similarity matrix held at once; does not change the result.

    Returns:
        (Q,) int64 ranks from 1 on the CPU, and (Q,) float64 margins on the CPU: similarity of the best
        right item minus that of the best wrong one (infinite where no item is wrong).
    """
    all_ranks, all_margins = [], []
    for start, similarity in similarity_chunks(queries, items, chunk_elements):
        right = query_groups[start : start + len(similarity), None] == item_groups[None, :]
        best_right = _best(similarity, right)
        below = similarity < best_right[:, None] - TIE  # false for NaN, which then counts against
        all_ranks.append((1 + (~right & ~below).sum(dim=1)).cpu())
        all_margins.append((best_right - _best(similarity, ~right)).cpu().double())
    return torch.cat(all_ranks), torch.cat(all_margins)


def class_ranks(scores: Float[Tensor, "Q M"], targets: Int[Tensor, " Q"]) -> Int[Tensor, " Q"]:
    """Rank the right class of every query among all, by the scores of a classifier.

    rank(q) = 1 + #{m wrong : not scores(q, m) < scores(q, right) - TIE}

    Args:
        scores: (Q, M), the higher the likelier. targets: (Q,) int64, the right classes.

    Returns:
        (Q,) int64 ranks from 1 on the CPU.
    """
    below = scores < scores.gather(1, targets[:, None]) - TIE  # false for the right class itself, and for NaN
    return (~below).sum(dim=1).cpu()


def recall(rank: Int[Tensor, " Q"], k: int) -> float:
    """Return the share of queries whose rank is at most `k`, in [0, 1]."""
    return float((rank <= k).double().mean())


def mean_per_class(rank: Int[Tensor, " Q"], targets: Int[Tensor, " Q"]) -> float:
    """Return the mean of the classes' top-1 accuracies, over the classes that have a query.

    Args:
        rank: (Q,) from 1, on the CPU. targets: (Q,) int64, on the CPU.
    """
    seen = torch.bincount(targets)
    right = torch.bincount(targets, weights=(rank == 1).double())
    return float((right / seen)[seen > 0].mean())


def chance_recall(right: int, items: int, k: int) -> float:
    """Return the probability that a random order has one of `right` items among the first `k` of `items`.

    1 - C(items - right, k) / C(items, k), hypergeometric.
    """
    k = min(k, items)
    orders = math.comb(items, k)
    return (orders - math.comb(items - right, k)) / orders


def _best(similarity: Float[Tensor, "q I"], allowed: Bool[Tensor, "q I"]) -> Float[Tensor, " q"]:
    return similarity.masked_fill(~allowed, -math.inf).amax(dim=1)
