import math

import pytest
import torch

from aclip.evaluation.probes import NearestNeighbours


def literal_votes(queries, items, targets, classes, k, temperature):
    """Wu et al. 2018, section 3.4, one query and one neighbour at a time."""
    votes = []
    for q in queries.double().tolist():
        similarity = []
        for item in items.double().tolist():
            dot = sum(a * b for a, b in zip(q, item, strict=True))
            similarity.append(dot / math.sqrt(sum(a * a for a in q)) / math.sqrt(sum(b * b for b in item)))
        nearest = sorted(range(len(items)), key=lambda i: -similarity[i])[:k]
        row = [0.0] * classes
        for i in nearest:
            row[targets[i]] += math.exp(similarity[i] / temperature)
        votes.append([v / sum(row) for v in row])
    return votes


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (5, 1.0), (500, 0.07)])
def test_votes_equal_a_literal_loop(k, temperature):
    generator = torch.Generator().manual_seed(8)
    items, queries = torch.randn(60, 5, generator=generator), torch.randn(25, 5, generator=generator)
    targets = torch.randint(0, 6, (60,), generator=generator)
    classifier = NearestNeighbours(k, temperature).fit_classifier(items, targets)
    expected = torch.tensor(literal_votes(queries, items, targets.tolist(), 6, k, temperature))
    torch.testing.assert_close(classifier.scores(queries), expected, rtol=0, atol=1e-5)
    assert classifier.settings == {"k": k, "temperature": temperature}


def test_lengths_of_features_do_not_matter_and_no_weight_overflows():
    generator = torch.Generator().manual_seed(9)
    items, targets = torch.randn(40, 4, generator=generator), torch.arange(40) % 3
    queries = items[:10]
    expected = NearestNeighbours(temperature=0.001).fit_classifier(items, targets).scores(queries)
    assert torch.isfinite(expected).all()
    lengths = torch.rand(40, 1, generator=generator) + 0.5
    scaled = NearestNeighbours(temperature=0.001).fit_classifier(items * lengths, targets).scores(7.0 * queries)
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-3)
