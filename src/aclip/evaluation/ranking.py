"""Ranks, which retrieval and classification measure.

The rank of a query is 1 + the number of wrong items whose similarity is not at least `TIE` below that of its best
right item. Ties count against the model: one that maps everything to a point scores 0, not 100 %.

The similarity matrix is never held: it is computed in tiles, each counted in both directions and dropped. With
sharding each rank takes every n-th band of rows, and the counts are summed.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from aclip.evaluation import sharding

TIE = 1e-6
"""Similarities and class scores closer than this are equal: float32 resolves no more."""

CHUNK_ELEMENTS = 2**22
"""Entries of the similarity matrix held at a time (32 MiB in float64)."""

EXACT_ENTRIES = 2**31
"""Matrices of at most this many entries are computed in float64, larger ones in float32, in half the time."""

_TILE_ITEMS = 4096  # columns of a tile: wide enough for matrix products at full speed


@dataclass(frozen=True)
class Ranks:
    """Ranks in both directions, on the CPU.

    Attributes:
        queries: (Q,) int64 rank of the best right item of every query, from 1.
        items: (I,) int64 rank of the best right query of every item, from 1; 0 for items that are right for no query.
        margins: (Q,) float64, similarity of the best right item minus that of the best wrong one (infinite where no
            item is wrong).
        nearest: (Q,) int64, the item most similar to every query, right or wrong; the first of equal ones.
    """

    queries: Int[Tensor, " Q"]
    items: Int[Tensor, " I"]
    margins: Float[Tensor, " Q"]
    nearest: Int[Tensor, " Q"]


def rank_both_ways(
    queries: Float[Tensor, "Q D"],
    items: Float[Tensor, "I D"],
    query_groups: Int[Tensor, " Q"],
    item_groups: Int[Tensor, " I"],
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Ranks:
    """Rank the best right item of every query among the wrong ones, and the best right query of every item.

    rank(q) = 1 + #{i wrong : not s(q, i) < max over right r of s(q, r) - TIE},  s = <q, i>

    and the same with the roles exchanged. In float64 up to `EXACT_ENTRIES`, where the result depends neither on the
    chunk size nor on reduced-precision matrix products; beyond that, and on devices without float64, in float32, where
    a similarity within 1e-6 of the limit can be counted on the wrong side.

    Takes the memory of the features (once more in float64) and a few tiles. Equal on all ranks.

    Args:
        queries, items: (Q, D) and (I, D), L2-normalised and finite.
        query_groups, item_groups: (Q,) and (I,) int64; an item is right for a query if their groups are equal; every
            query has at least one right item.
        chunk_elements: entries of the similarity matrix held at once; does not change the result.
    """
    exact = queries.device.type != "mps" and len(queries) * len(items) <= EXACT_ENTRIES
    wide = torch.float64 if exact else torch.float32
    a, b = queries.to(wide), items.to(wide)
    pairs = _right_pairs(query_groups, item_groups)
    best = _best_of_pairs(a, b, pairs, chunk_elements)
    right_queries = torch.bincount(pairs[1], minlength=len(b))
    rank_a, nearest = (torch.zeros(len(a), device=a.device, dtype=torch.int64) for _ in range(2))
    rank_b, best_wrong = torch.zeros_like(right_queries), torch.zeros_like(best[0])
    columns = min(len(b), _TILE_ITEMS, chunk_elements)
    rows = max(1, chunk_elements // columns)
    for number, start in enumerate(range(0, len(a), rows)):
        if number % sharding.world_size() == sharding.rank():
            some = slice(start, start + rows)
            band = pairs[:, torch.searchsorted(pairs[0], start) : torch.searchsorted(pairs[0], start + rows)]
            band = torch.stack([band[0] - start, band[1]])
            rank_a[some], in_columns, best_wrong[some], nearest[some] = _rank_band(
                a[some], b, band, best[0][some] - TIE, best[1] - TIE, columns)
            rank_b += in_columns
    rank_a, rank_b, best_wrong, nearest = map(sharding.sum_over_ranks, (rank_a, rank_b, best_wrong, nearest))
    return Ranks((1 + rank_a).cpu(), torch.where(right_queries > 0, 1 + rank_b, 0).cpu(),
                 (best[0] - best_wrong).cpu().double(), nearest.cpu())


def _rank_band(
    own: Float[Tensor, "q D"], b: Float[Tensor, "I D"], band: Int[Tensor, "2 P"], limits_a: Float[Tensor, " q"],
    limits_b: Float[Tensor, " I"], columns: int,
) -> tuple[Int[Tensor, " q"], Int[Tensor, " I"], Float[Tensor, " q"], Int[Tensor, " q"]]:
    """Count one band of rows of the matrix, tile by tile.

    Args:
        own: rows of the band. band: its right pairs (row within the band, column).
        limits_a, limits_b: wrong entries not below them are counted.
        columns: of a tile.

    Returns:
        Wrong entries that count in each row and in each column; highest similarity of a wrong item in each row; item
        with the highest similarity of all.
    """
    in_rows, nearest = (torch.zeros(len(own), device=b.device, dtype=torch.int64) for _ in range(2))
    in_columns = torch.zeros(len(b), device=b.device, dtype=torch.int64)
    top = torch.full((len(own),), -math.inf, device=b.device, dtype=b.dtype)
    best_wrong = top.clone()
    band = band[:, band[1].argsort()]
    for start in range(0, len(b), columns):
        tile = own @ b[start : start + columns].T
        high, at = tile.max(dim=1)
        nearest = torch.where(high > top, at + start, nearest)
        top = torch.maximum(top, high)
        ends = torch.searchsorted(band[1].contiguous(), torch.tensor([start, start + columns], device=b.device))
        i, j = band[:, ends[0] : ends[1]]
        tile[i, j - start] = -math.inf  # right entries do not count
        best_wrong = torch.maximum(best_wrong, tile.amax(dim=1))
        # int32 sums are five times as fast as the default's
        limits = limits_b[None, start : start + columns]
        in_rows += tile.shape[1] - (tile < limits_a[:, None]).sum(dim=1, dtype=torch.int32)
        in_columns[start : start + columns] += len(tile) - (tile < limits).sum(dim=0, dtype=torch.int32)
    return in_rows, in_columns, best_wrong, nearest


def _right_pairs(query_groups: Int[Tensor, " Q"], item_groups: Int[Tensor, " I"]) -> Int[Tensor, "2 P"]:
    """Return all (query, item) of equal groups, in the order of the queries."""
    order = item_groups.argsort(stable=True)
    ordered = item_groups[order]
    first = torch.searchsorted(ordered, query_groups)
    count = torch.searchsorted(ordered, query_groups, right=True) - first
    query = torch.arange(len(query_groups), device=order.device).repeat_interleave(count)
    within = torch.arange(len(query), device=order.device) - (count.cumsum(0) - count)[query]
    return torch.stack([query, order[first[query] + within]])


def _best_of_pairs(
    a: Float[Tensor, "Q D"], b: Float[Tensor, "I D"], pairs: Int[Tensor, "2 P"], chunk_elements: int
) -> tuple[Float[Tensor, " Q"], Float[Tensor, " I"]]:
    """Return the highest similarity of a right pair of every query and of every item; -inf without any."""
    best = tuple(torch.full((len(x),), -math.inf, device=x.device, dtype=x.dtype) for x in (a, b))
    for i, j in pairs.split(max(1, chunk_elements // a.shape[1]), dim=1):
        similarity = (a[i] * b[j]).sum(dim=1)
        for highest, index in zip(best, (i, j), strict=True):
            highest.scatter_reduce_(0, index, similarity, "amax")
    return best[0], best[1]


def class_ranks(scores: Float[Tensor, "Q M"], targets: Int[Tensor, " Q"]) -> Int[Tensor, " Q"]:
    """Rank the right class of every query among all, by the scores of a classifier.

    rank(q) = 1 + #{m wrong : not scores(q, m) < scores(q, right) - TIE}

    Args:
        scores: (Q, M), higher for likelier classes. targets: (Q,) int64, the right classes.

    Returns:
        (Q,) int64 ranks from 1 on the CPU.
    """
    below = scores < scores.gather(1, targets[:, None]) - TIE  # false for the right class itself
    return (~below).sum(dim=1).cpu()


def recall(rank: Int[Tensor, " Q"], k: int) -> float:
    """Return the fraction of queries whose rank is at most `k`, in [0, 1]."""
    return float((rank <= k).double().mean())


def mean_per_class(rank: Int[Tensor, " Q"], targets: Int[Tensor, " Q"]) -> float:
    """Return the mean of the classes' top-1 accuracies, over classes that have a query.

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


def accuracies(
    rank: Int[Tensor, " B"], targets: Int[Tensor, " B"], classes: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return metrics and chance of a classifier: `top1`, `top5` of more than five classes, `mean_per_class`."""
    cutoffs = (1, 5) if classes > 5 else (1,)
    metrics = {f"top{k}": recall(rank, k) for k in cutoffs} | {"mean_per_class": mean_per_class(rank, targets)}
    chance = {f"top{k}": chance_recall(1, classes, k) for k in cutoffs}
    return metrics, chance | {"mean_per_class": chance["top1"]}


def confusions(
    classes: Sequence[str], targets: Int[Tensor, " B"], rank: Int[Tensor, " B"], nearest: Int[Tensor, " B"]
) -> dict[str, Any]:
    """Return what a classifier confuses, as plain JSON values.

    Args:
        classes: M names. targets: (B,) int64, the right classes. rank: (B,) of these, from 1.
        nearest: (B,) int64, predicted classes.

    Returns:
        `classes`; `pictures` and `right`, a count for each; `confusions`, [class, prediction, images] of the wrong
        predictions, the most frequent first.
    """
    pairs = Counter(zip(targets.tolist(), nearest.tolist(), strict=True))
    wrong = sorted(((count, i, j) for (i, j), count in pairs.items() if i != j), key=lambda one: (-one[0], *one[1:]))
    return {"classes": list(classes), "pictures": torch.bincount(targets, minlength=len(classes)).tolist(),
            "right": torch.bincount(targets[rank == 1], minlength=len(classes)).tolist(),
            "confusions": [[i, j, count] for count, i, j in wrong]}
