import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from aclip.errors import ConfigError, DataError
from aclip.evaluation import LinearProbe, linear_probe, linear_probe_sgd
from aclip.evaluation.linear_probe import Regression, search, split

EXPONENTS = [i / 8 for i in range(-48, 49)]


def problem(pictures=60, width=4, classes=3, seed=0):
    """Classes that overlap, features correlated and on very different scales."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (pictures,), generator=generator)
    centres = 0.7 * torch.randn(classes, width, generator=generator)
    x = (centres[targets] + torch.randn(pictures, width, generator=generator)) @ torch.randn(
        width, width, generator=generator)
    return 3.0 + x * torch.logspace(-2, 2, width), targets


def standardised(features):
    x = features.double().numpy()
    return (x - x.mean(axis=0)) / x.std(axis=0)


def literal_objective(weight, bias, x, targets, l2):
    """J of the docstring, picture by picture."""
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


def in_standard_coordinates(regression, solution, features):
    """Read weights back from the classifier alone: logits of the origin and of one step along each feature."""
    classify = regression.classifier(solution)
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    bias = classify(mean[None])[0]
    weight = classify(mean + torch.diag(deviation)) - bias
    return weight.T.double().numpy(), bias.double().numpy()


@pytest.mark.parametrize("l2", [1e-3, 0.3, 10.0, 1e4])
@pytest.mark.parametrize("classes", [2, 3])
def test_solution_is_the_optimum_that_newton_finds(l2, classes):
    features, targets = problem(classes=classes)
    x = standardised(features)
    regression = Regression(features, targets, classes)
    solution = regression.solve(l2)
    weight, bias = in_standard_coordinates(regression, solution, features)
    best = newton(x, targets, classes, l2)
    lowest = literal_objective(*best, x, targets, l2)
    assert literal_objective(weight, bias, x, targets, l2) == pytest.approx(lowest, rel=2e-6)
    ours, theirs = x @ weight.T + bias, x @ best[0].T + best[1]
    np.testing.assert_allclose(ours - ours.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=1e-2)


def test_long_gradient_descent_goes_no_lower():
    features, targets = problem(pictures=200, width=6, classes=4, seed=1)
    x, count = torch.from_numpy(standardised(features)), len(targets)
    regression = Regression(features, targets, 4)
    weight, bias = in_standard_coordinates(regression, regression.solve(1.0), features)
    w, b = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    rate = 1.0 / (0.5 * (torch.linalg.matrix_norm(x, 2) ** 2 / count + 1.0) + 1.0 / count)  # 1 / the curvature's bound
    for _ in range(20_000):
        error = torch.softmax(x @ w.T + b, dim=1) - torch.eye(4, dtype=torch.float64)[targets]
        w, b = w - rate * (error.T @ x + w) / count, b - rate * error.mean(dim=0)
    descended = literal_objective(w.numpy(), b.numpy(), x.numpy(), targets, 1.0)
    assert literal_objective(weight, bias, x.numpy(), targets, 1.0) <= descended * (1 + 2e-6)


def test_chunks_lead_to_the_same_optimum(monkeypatch):
    features, targets = problem(pictures=150)
    regression = Regression(features, targets, 3)
    expected = regression.classifier(regression.solve(0.5))(features).softmax(dim=1)
    monkeypatch.setattr(linear_probe, "CHUNK_ELEMENTS", 7)
    chunked = regression.solve(0.5)
    torch.testing.assert_close(regression.classifier(chunked)(features).softmax(dim=1), expected, rtol=0, atol=2e-3)


def test_scale_and_offset_of_features_do_not_matter():
    features, targets = problem(pictures=150)
    probe = LinearProbe()
    first = probe.fit(features, targets, 3)
    moved = features * torch.tensor([0.01, 1.0, 50.0, 3.0]) - 2.0
    second = probe.fit(moved, targets, 3)
    assert second.settings["l2"] == first.settings["l2"]
    torch.testing.assert_close(second.scores(moved).softmax(dim=1), first.scores(features).softmax(dim=1),
                               rtol=0, atol=2e-3)


def test_features_that_never_vary_have_no_say():
    features, targets = problem(pictures=80)
    constant = torch.cat([features, torch.full((80, 2), 0.1)], dim=1)
    probe = LinearProbe()
    first, second = probe.fit(features, targets, 3), probe.fit(constant, targets, 3)
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
    targets = torch.tensor(labels)
    fitted, held = split(targets, most, seed)
    both = torch.cat([fitted, held])
    assert len(both) == len(set(both.tolist())) == min(most, len(labels))
    assert len(held) == len(both) // 5
    for label in set(labels):
        in_both, in_held = (int((targets[part] == label).sum()) for part in (both, held))
        assert abs(in_held - in_both / 5) < 1
    again = split(targets, most, seed)
    assert torch.equal(fitted, again[0])
    assert torch.equal(held, again[1])


def test_split_depends_on_the_seed_and_needs_five_pictures():
    targets = torch.arange(100) % 3
    assert not torch.equal(split(targets, 100, 0)[1], split(targets, 100, 1)[1])
    with pytest.raises(DataError, match="4 are too few"):
        split(targets[:4], 100, 0)


def test_the_chosen_strength_is_the_best_on_the_validation_split():
    """Against the accuracies at the chosen strength and at all of the coarse grid."""
    features, targets = problem(pictures=120, width=40, classes=4, seed=3)
    classifier = LinearProbe(seed=5).fit(features, targets, 4)
    fitted, held = split(targets, 20_000, 5)
    regression = Regression(features[fitted], targets[fitted], 4)

    def accuracy(l2):
        scores = regression.classifier(regression.solve(l2))(features[held])
        return float((scores.argmax(dim=1) == targets[held]).double().mean())

    coarse = [accuracy(10.0**exponent) for exponent in range(-6, 7, 2)]
    assert math.log10(classifier.settings["l2"]) in [pytest.approx(e) for e in EXPONENTS]
    assert accuracy(classifier.settings["l2"]) >= max(coarse)
    assert max(coarse) > min(coarse)  # there was something to choose


def test_the_final_fit_is_on_all_pictures_and_the_search_on_some(monkeypatch):
    sizes = []
    prepare = Regression.__init__

    def spy(self, features, targets, num_classes):
        sizes.append(len(features))
        prepare(self, features, targets, num_classes)

    monkeypatch.setattr(Regression, "__init__", spy)
    features, targets = problem(pictures=300)
    LinearProbe(search_pictures=100).fit(features, targets, 3)
    assert sizes == [80, 300]


def test_a_fit_that_is_stopped_says_so(monkeypatch, caplog):
    features, targets = problem()
    monkeypatch.setattr(linear_probe, "MAX_ITERATIONS", 2)
    with caplog.at_level(logging.WARNING, logger="aclip"):
        assert LinearProbe().fit(features, targets, 3).settings["iterations"] == 2
    assert "linear_probe stopped after 2 iterations" in caplog.text


@pytest.fixture(scope="module")
def digits():
    """1,797 handwritten digits of 8 x 8 pixels, two thirds to learn from."""
    found = load_digits()
    features, targets = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    learn, held = order[:1200], order[1200:]
    return features[learn], targets[learn], features[held], targets[held]


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_accuracy_is_that_of_scikit_learn_at_the_penalty_found(digits, solver):
    """On digits, within half a point; J / n has a penalty of l2 / n, which SGD calls its decay."""
    features, targets, held, answers = digits
    classifier = LinearProbe(solver=solver).fit(features, targets, 10)
    accuracy = float((classifier.scores(held).argmax(dim=1) == answers).double().mean())
    settings = classifier.settings
    l2 = settings["l2"] if solver == "lbfgs" else settings["weight_decay"] * len(targets)
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-9)
    theirs = LogisticRegression(C=1 / l2, max_iter=2000).fit((features - mean) / deviation, targets)
    assert abs(accuracy - theirs.score((held - mean) / deviation, answers)) <= 0.005
    assert accuracy > 0.9


def test_heads_side_by_side_are_those_trained_alone(digits):
    features, targets, *_ = digits
    regression = linear_probe_sgd.SgdRegression(features[:300], targets[:300], 10, seed=3)
    heads = [linear_probe_sgd.Head(0.1, 1e-3), linear_probe_sgd.Head(1.0, 0.0)]
    weight, bias = regression.train(heads)
    for i, head in enumerate(heads):
        alone, alone_bias = regression.train([head])
        torch.testing.assert_close(weight[i], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(bias[i], alone_bias[0], atol=1e-5, rtol=1e-5)


def test_one_step_of_sgd_is_the_gradient_by_autograd(digits, monkeypatch):
    features, targets, *_ = digits
    monkeypatch.setattr(linear_probe_sgd, "EPOCHS", 1)
    x, y = features[:200], targets[:200]  # one batch, so one step, at the peak rate
    regression = linear_probe_sgd.SgdRegression(x, y, 10, seed=0)
    weight, bias = regression.train([linear_probe_sgd.Head(0.5, 0.1)])
    deviation = x.double().std(dim=0, correction=0)  # pixels that are always white have none, and no say
    standard = (x.double() - x.double().mean(dim=0)) / torch.where(deviation > 0, deviation, torch.inf)
    w, b = torch.zeros(10, 64, dtype=torch.float64, requires_grad=True), torch.zeros(10, dtype=torch.float64,
                                                                                   requires_grad=True)
    torch.nn.functional.cross_entropy(standard @ w.T + b, y).backward()
    # Nesterov's first step is the gradient times (1 + momentum)
    torch.testing.assert_close(weight[0].double(), -0.5 * 1.9 * w.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bias[0].double(), -0.5 * 1.9 * b.grad, atol=1e-5, rtol=1e-4)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'lbfgs'"):
        LinearProbe(solver="lbfg")
