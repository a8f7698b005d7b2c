import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from aclip.errors import DataError
from aclip.evaluation import probes
from aclip.evaluation.probes import LinearProbe, fit_logistic, search, split

EXPONENTS = [i / 8 for i in range(-48, 49)]


def problem(images=60, width=4, classes=3, seed=0):
    """Classes that overlap, features correlated and on very different scales."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (images,), generator=generator)
    centres = 0.7 * torch.randn(classes, width, generator=generator)
    x = (centres[targets] + torch.randn(images, width, generator=generator)) @ torch.randn(
        width, width, generator=generator)
    return 3.0 + x * torch.logspace(-2, 2, width), targets


def standardised(features):
    x = features.double().numpy()
    return (x - x.mean(axis=0)) / x.std(axis=0)


def literal_objective(weight, bias, x, targets, l2):
    """J of the docstring, image by image."""
    total = l2 / 2 * sum(w**2 for row in weight.tolist() for w in row)
    for row, target in zip(x, targets.tolist(), strict=True):
        logits = [float(w @ row + b) for w, b in zip(weight, bias, strict=True)]
        top = max(logits)
        total += top + math.log(sum(math.exp(logit - top) for logit in logits)) - logits[target]
    return total


def newton(x, targets, classes, l2, steps=50):
    """The optimum by damped Newton steps with literal sums of gradients and Hessians; returns (W, b)."""
    size = x.shape[1] + 1
    point = np.zeros(classes * size)
    penalty = np.tile([l2] * (size - 1) + [0.0], classes)

    def value(at):
        table = at.reshape(classes, size)
        return literal_objective(table[:, :-1], table[:, -1], x, targets, l2)

    for _ in range(steps):
        gradient, hessian = penalty * point, np.diag(penalty)
        for row, target in zip(x, targets.tolist(), strict=True):
            extended = np.append(row, 1.0)
            logits = point.reshape(classes, size) @ extended
            p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            gradient = gradient + np.kron(p - np.eye(classes)[target], extended)
            hessian = hessian + np.kron(np.diag(p) - np.outer(p, p), np.outer(extended, extended))
        # a constant added to all biases changes nothing: the pseudo-inverse leaves that direction alone
        direction, length = -np.linalg.pinv(hessian) @ gradient, 1.0
        while length > 1e-12 and value(point + length * direction) > value(point):
            length /= 2
        point = point + length * direction
    table = point.reshape(classes, size)
    return table[:, :-1], table[:, -1]


@pytest.mark.parametrize("l2", [1e-3, 0.3, 10.0, 1e4])
@pytest.mark.parametrize("classes", [2, 3])
def test_solution_is_the_optimum_that_newton_finds(l2, classes):
    features, targets = problem(classes=classes)
    x = standardised(features)
    regression = fit_logistic(features.numpy(), targets.numpy(), l2)[-1]
    weight, bias = regression.coef_, regression.intercept_
    if classes == 2:  # scikit-learn's one row
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    best = newton(x, targets, classes, l2)
    lowest = literal_objective(*best, x, targets, l2)
    assert literal_objective(weight, bias, x, targets, l2) == pytest.approx(lowest, rel=1e-5)
    ours, theirs = x @ weight.T + bias, x @ best[0].T + best[1]
    np.testing.assert_allclose(ours - ours.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=2e-2)


def test_too_few_images_are_refused():
    with pytest.raises(DataError, match="4 images are too few"):
        LinearProbe().fit_classifier(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(DataError, match="5 images are too few"):
        LinearProbe().fit_classifier(torch.randn(5, 3), torch.tensor([0, 0, 0, 0, 1]))


def test_scale_and_offset_of_features_do_not_matter():
    features, targets = problem(images=150)
    probe = LinearProbe()
    first = probe.fit_classifier(features, targets)
    moved = features * torch.tensor([0.01, 1.0, 50.0, 3.0]) - 2.0
    second = probe.fit_classifier(moved, targets)
    assert second.settings["l2"] == first.settings["l2"]
    torch.testing.assert_close(second.scores(moved).softmax(dim=1), first.scores(features).softmax(dim=1),
                               rtol=0, atol=2e-3)


def test_features_that_never_vary_have_no_say():
    features, targets = problem(images=80)
    constant = torch.cat([features, torch.full((80, 2), 0.1)], dim=1)
    probe = LinearProbe()
    first, second = probe.fit_classifier(features, targets), probe.fit_classifier(constant, targets)
    elsewhere = torch.cat([features, torch.full((80, 2), 9.0)], dim=1)
    torch.testing.assert_close(second.scores(elsewhere).softmax(dim=1), first.scores(features).softmax(dim=1),
                               rtol=0, atol=2e-3)


@given(st.integers(0, 96), st.lists(st.floats(0.1, 5.0), min_size=97, max_size=97))
def test_search_finds_the_only_peak_of_any_score(peak, drops):
    """Scores fall from the peak to either side in steps of any size."""
    value = {EXPONENTS[peak]: 0.0}
    for side in (range(peak + 1, 97), range(peak - 1, -1, -1)):
        level = 0.0
        for i in side:
            level -= drops[i]
            value[EXPONENTS[i]] = level
    asked = []

    def score(exponent):
        asked.append(exponent)
        return value[exponent]

    assert search(score) == max(value, key=value.__getitem__)
    assert len(asked) == len(set(asked)) <= 15


def test_search_takes_the_strongest_of_equal_penalties():
    assert search(lambda _: 0.5) == 6.0
    assert search(lambda exponent: float(exponent <= 1.5)) == 1.5


@given(st.lists(st.integers(0, 4), min_size=5, max_size=120), st.integers(5, 150), st.integers(0, 3))
def test_split_keeps_the_shares_of_classes(labels, most, seed):
    targets = np.array(labels)
    fitted, held = split(targets, most, seed)
    both = np.concatenate([fitted, held])
    assert len(both) == len(set(both.tolist())) == min(most, len(labels))
    assert len(held) == len(both) // 5
    for label in set(labels):
        in_both, in_held = (int((targets[part] == label).sum()) for part in (both, held))
        assert abs(in_held - in_both / 5) < 1
    again = split(targets, most, seed)
    assert np.array_equal(fitted, again[0])
    assert np.array_equal(held, again[1])


def test_split_depends_on_the_seed():
    targets = np.arange(100) % 3
    assert not np.array_equal(split(targets, 100, 0)[1], split(targets, 100, 1)[1])


def test_the_chosen_strength_is_the_best_on_the_validation_split():
    """Against the accuracies at the chosen strength and at all of the coarse grid."""
    features, targets = problem(images=120, width=40, classes=4, seed=3)
    classifier = LinearProbe(seed=5).fit_classifier(features, targets)
    x, y = features.numpy(), targets.numpy()
    fitted, held = split(y, 20_000, 5)

    def accuracy(l2):
        return fit_logistic(x[fitted], y[fitted], l2).score(x[held], y[held])

    coarse = [accuracy(10.0**exponent) for exponent in range(-6, 7, 2)]
    assert math.log10(classifier.settings["l2"]) in [pytest.approx(e) for e in EXPONENTS]
    assert accuracy(classifier.settings["l2"]) >= max(coarse)
    assert max(coarse) > min(coarse)  # there was something to choose


def test_the_final_fit_is_on_all_images_and_the_search_on_some(monkeypatch):
    sizes, fit = [], fit_logistic
    monkeypatch.setattr(probes, "fit_logistic", lambda features, *more: (sizes.append(len(features)),
                                                                         fit(features, *more))[1])
    features, targets = problem(images=300)
    LinearProbe(search_images=100).fit_classifier(features, targets)
    assert set(sizes[:-1]) == {80}
    assert sizes[-1] == 300


def test_a_fit_that_is_stopped_says_so(monkeypatch, caplog):
    features, targets = problem()
    monkeypatch.setattr(probes, "MAX_ITERATIONS", 2)
    with caplog.at_level(logging.WARNING, logger="aclip"):
        assert LinearProbe().fit_classifier(features, targets).settings["iterations"] == 2
    assert "linear_probe stopped after 2 iterations" in caplog.text


@pytest.fixture(scope="module")
def digits():
    """1,797 handwritten digits of 8 x 8 pixels, two thirds to learn from."""
    found = load_digits()
    features, targets = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    learn, held = order[:1200], order[1200:]
    return features[learn], targets[learn], features[held], targets[held]


def test_accuracy_is_that_of_scikit_learn_on_a_grid_of_penalties(digits):
    """Within a point (0.7 is the standard error) at the grid's best penalty, within half a point at ours."""
    features, targets, held, answers = digits
    classifier = LinearProbe().fit_classifier(features, targets)
    accuracy = float((classifier.scores(held).argmax(dim=1) == answers).double().mean())
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-9)
    x, z = (features - mean) / deviation, (held - mean) / deviation
    fitted, validating = split(targets.numpy(), 20_000, 0)
    grid = {l2: LogisticRegression(C=1 / l2, max_iter=2000).fit(x[fitted], targets[fitted]).score(
        x[validating], targets[validating]) for l2 in 10.0 ** np.arange(-6, 7)}
    best = max(grid, key=lambda l2: (grid[l2], l2))
    for l2, close in ((best, 0.01), (classifier.settings["l2"], 0.005)):
        theirs = LogisticRegression(C=1 / l2, max_iter=2000).fit(x, targets).score(z, answers)
        assert abs(accuracy - theirs) <= close
    assert accuracy > 0.9
