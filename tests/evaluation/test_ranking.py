from itertools import permutations

import pytest
import torch
from torch.nn import functional as F

from aclip.evaluation.ranking import chance_recall, class_ranks, mean_per_class, rank_both_ways, recall


def slow_ranks(queries, items, query_groups, item_groups):
    """The docstring's rule, one query and one item at a time."""
    result = []
    for q, group in zip(queries.double(), query_groups.tolist(), strict=True):
        similarity = [float(q @ item) for item in items.double()]
        right = max(s for s, g in zip(similarity, item_groups.tolist(), strict=True) if g == group)
        wrong = [s for s, g in zip(similarity, item_groups.tolist(), strict=True) if g != group]
        result.append(1 + sum(not s < right - 1e-6 for s in wrong))
    return result


def pairs(query_groups, item_groups):
    return (query_groups[:, None] == item_groups).nonzero().T


@pytest.mark.parametrize("seed", range(4))
def test_ranks_equal_the_literal_rule_for_any_chunk_size(seed):
    generator = torch.Generator().manual_seed(seed)
    queries = F.normalize(torch.randn(23, 5, generator=generator), dim=-1)
    items = F.normalize(torch.randn(17, 5, generator=generator), dim=-1)
    items[3] = items[8]  # a tie
    item_groups = torch.cat([torch.arange(6), torch.randint(0, 6, (11,), generator=generator)])
    query_groups = torch.cat([torch.arange(6), torch.randint(0, 6, (17,), generator=generator)])
    expected = slow_ranks(queries, items, query_groups, item_groups)
    for chunk_elements in (1, 17, 60, 10**6):
        found = rank_both_ways(queries, items, pairs(query_groups, item_groups), chunk_elements=chunk_elements)
        assert found.queries.tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_both_directions_are_counted_in_one_pass(seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(19, 6, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(57, 6, generator=generator), dim=-1)
    of_text = torch.arange(19).repeat_interleave(3)[torch.randperm(57, generator=generator)]
    expected = [slow_ranks(images, texts, torch.arange(19), of_text),
                slow_ranks(texts, images, of_text, torch.arange(19))]
    for entries in (2**31, 0):  # float64, float32
        monkeypatch.setattr("aclip.evaluation.ranking.EXACT_ENTRIES", entries)
        for chunk_elements in (1, 100, 10**6):
            found = rank_both_ways(images, texts, pairs(torch.arange(19), of_text), chunk_elements=chunk_elements)
            assert [found.queries.tolist(), found.items.tolist()] == expected
    assert len(set(expected[0])) > 3


def test_margin_is_best_right_minus_best_wrong():
    items = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    found = rank_both_ways(items[:2], items, torch.tensor([[0, 1, 1], [0, 1, 2]]))
    assert found.queries.tolist() == [1, 1]
    torch.testing.assert_close(found.margins, torch.tensor([0.4, 0.4], dtype=torch.float64), atol=1e-6, rtol=0)


def test_ties_count_against_the_model():
    same = F.normalize(torch.ones(6, 4), dim=-1)
    assert rank_both_ways(same, same, torch.arange(6).expand(2, 6)).queries.tolist() == [6] * 6


def test_noise_of_float32_does_not_break_ties():
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    noisy = F.normalize(torch.ones(6, 4) + 1e-7 * noise, dim=-1)
    assert rank_both_ways(noisy, noisy, torch.arange(6).expand(2, 6)).queries.tolist() == [6] * 6


def test_class_ranks_equal_the_literal_rule():
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(0, 6, (200, 7), generator=generator) / 5.0  # many ties
    scores += 1e-8 * torch.rand(200, 7, generator=generator)
    targets = torch.randint(0, 7, (200,), generator=generator)
    expected = [1 + sum(not s < row[t] - 1e-6 for m, s in enumerate(row) if m != t)
                for row, t in zip(scores.double().tolist(), targets.tolist(), strict=True)]
    assert class_ranks(scores, targets).tolist() == expected


def test_mean_per_class_averages_over_the_classes_that_are_there():
    rank, targets = torch.tensor([1, 2, 1, 1, 3, 1]), torch.tensor([0, 0, 0, 4, 2, 4])
    assert mean_per_class(rank, targets) == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_recall():
    assert recall(torch.tensor([1, 2, 5, 6]), 5) == 0.75


@pytest.mark.parametrize(("right", "items", "k"), [(1, 5, 1), (2, 5, 2), (3, 5, 3), (2, 4, 9)])
def test_chance_recall_equals_the_share_of_all_orders(right, items, k):
    orders = list(permutations(range(items)))
    hits = sum(any(i < right for i in order[:k]) for order in orders)
    assert chance_recall(right, items, k) == pytest.approx(hits / len(orders))
