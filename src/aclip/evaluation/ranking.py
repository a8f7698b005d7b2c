"""Ranks, which retrieval and classification measure.

The rank of a query is 1 + the number of wrong items whose similarity is not at least `TIE` below that of its best
right item. Ties count against the model: one that maps everything to a point scores 0, not 100 %.

The similarity matrix is never held: it is computed in tiles, each counted in both directions and dropped. With
sharding each rank takes every n-th band of rows, and the counts are summed.
"""

import math
from dataclasses import dataclass

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
    counts = _Counts.empty(len(a), len(b), a.device, wide)
    columns = min(len(b), _TILE_ITEMS, chunk_elements)
    rows = max(1, chunk_elements // columns)
    for number, start in enumerate(range(0, len(a), rows)):
        if number % sharding.world_size() == sharding.rank():
            band = pairs[:, torch.searchsorted(pairs[0], start) : torch.searchsorted(pairs[0], start + rows)]
            _count_band(a, b, band, best, slice(start, start + rows), columns, counts)
    right_queries = torch.bincount(pairs[1], minlength=len(b))
    rank_a, rank_b = (1 + sharding.sum_over_ranks(counted) for counted in (counts.rows, counts.columns))
    margins = best[0] - sharding.sum_over_ranks(counts.best_wrong)
    return Ranks(rank_a.cpu(), torch.where(right_queries > 0, rank_b, 0).cpu(), margins.cpu().double(),
                 sharding.sum_over_ranks(counts.nearest).cpu())


@dataclass(frozen=True)
class _Counts:
    """Accumulators over tiles; zero where another rank counts.

    Attributes:
        rows, columns: (Q,) and (I,) int64 wrong entries not at least `TIE` below the best right one.
        best_wrong: (Q,) highest similarity of a wrong item. nearest: (Q,) int64 item with the highest of all.
    """

    rows: Int[Tensor, " Q"]
    columns: Int[Tensor, " I"]
    best_wrong: Float[Tensor, " Q"]
    nearest: Int[Tensor, " Q"]

    @classmethod
    def empty(cls, queries: int, items: int, device: torch.device, wide: torch.dtype) -> "_Counts":
        rows, columns, nearest = (torch.zeros(n, device=device, dtype=torch.int64) for n in (queries, items, queries))
        return cls(rows, columns, torch.zeros(queries, device=device, dtype=wide), nearest)


def _count_band(
    a: Float[Tensor, "Q D"],
    b: Float[Tensor, "I D"],
    band: Int[Tensor, "2 P"],
    best: tuple[Float[Tensor, " Q"], Float[Tensor, " I"]],
    rows: slice,
    columns: int,
    counts: _Counts,
) -> None:
    """Count a band of rows of the matrix, tile by tile; `band` holds its right pairs."""
    own = a[rows]
    top = torch.full((len(own),), -math.inf, device=a.device, dtype=a.dtype)
    nearest = torch.zeros(len(own), device=a.device, dtype=torch.int64)
    best_wrong = top.clone()
    limits_a, limits_b = best[0][rows] - TIE, best[1] - TIE
    band = band[:, band[1].argsort()]
    for start in range(0, len(b), columns):
        tile = own @ b[start : start + columns].T
        high, at = tile.max(dim=1)
        nearest = torch.where(high > top, at + start, nearest)
        top = torch.maximum(top, high)
        # right entries leave the count as -inf
        ends = torch.searchsorted(band[1].contiguous(), torch.tensor([start, start + columns], device=a.device))
        i, j = band[:, ends[0] : ends[1]]
        tile[i - (rows.start or 0), j - start] = -math.inf
        best_wrong = torch.maximum(best_wrong, tile.amax(dim=1))
        # int32 sums are five times as fast as the default's
        limits = limits_b[None, start : start + columns]
        counts.rows[rows] += tile.shape[1] - (tile < limits_a[:, None]).sum(dim=1, dtype=torch.int32)
        counts.columns[start : start + columns] += len(tile) - (tile < limits).sum(dim=0, dtype=torch.int32)
    counts.best_wrong[rows] = best_wrong
    counts.nearest[rows] = nearest


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


