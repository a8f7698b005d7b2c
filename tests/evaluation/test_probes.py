"""What all probes have in common, run over the table."""

import logging
from dataclasses import replace

import pytest
import torch

from aclip.errors import ConfigError, DataError
from aclip.evaluation import EVALUATORS, ranking
from aclip.evaluation.features import encode_image_set
from aclip.evaluation.probes import Probe

PROBES = [entry for entry in EVALUATORS.values() if isinstance(entry, type) and issubclass(entry, Probe)]


@pytest.fixture(params=PROBES, ids=lambda probe: probe.name)
def probe(request):
    return request.param()


@pytest.fixture
def task(table_model, image_set, cpu):
    """A function that makes a model, encoded training images and a held-out set of uneven classes."""

    def make(classes=7, train=210, held=50, noise=1.0):
        generator = torch.Generator().manual_seed(4)
        centres = 3.0 * torch.randn(classes, 12, generator=generator)
        of = torch.randint(0, classes, (train + held,), generator=generator).clamp(min=1)
        of[: 2 * classes] = torch.arange(classes).repeat(2)
        of[-2:] = 0
        images = centres[of] + noise * torch.randn(train + held, 12, generator=generator)
        names = [f"Class {i}" for i in of.tolist()]
        training = encode_image_set(table_model(images[:train]), image_set([""] * train, names[:train]), cpu,
                                   space="trunk")
        return table_model(images[train:]), training, image_set([""] * held, names[train:])

    return make


def test_learns_what_the_features_tell(probe, task, cpu):
    model, training, held = task()
    result = probe.fit(training).run(model, held, cpu)
    assert result.evaluator == probe.name
    assert result.metrics["top1"] > 3 / 7  # far above chance, and above always naming the commonest class
    assert result.metrics["top1"] <= result.metrics["top5"]
    assert result.chance == pytest.approx({"top1": 1 / 7, "top5": 5 / 7, "mean_per_class": 1 / 7})
    assert result.counts == {"pictures": 50, "classes": 7, "training_pictures": 210, "skipped": 0,
                             "outside_classes": 0}


def test_metrics_are_those_of_the_literal_ranking_of_scores(probe, task, cpu, monkeypatch):
    model, training, held = task(noise=6.0)
    fitted = probe.fit(training)
    result = fitted.run(model, held, cpu).metrics
    scores = fitted.classifier.scores(model.images).tolist()
    targets = [fitted.classifier.classes.index(label) for label in held.labels]
    rank = [1 + sum(not s < row[t] - 1e-6 for m, s in enumerate(row) if m != t)
            for row, t in zip(scores, targets, strict=True)]
    of_class = {t: [r == 1 for r, other in zip(rank, targets, strict=True) if other == t] for t in targets}
    assert result == pytest.approx({
        "top1": sum(r == 1 for r in rank) / 50, "top5": sum(r <= 5 for r in rank) / 50,
        "mean_per_class": sum(sum(hits) / len(hits) for hits in of_class.values()) / len(of_class)})
    assert result["top1"] != pytest.approx(result["mean_per_class"])  # the case tells them apart
    monkeypatch.setattr(ranking, "CHUNK_ELEMENTS", 600)  # two images at a time
    assert probe.fit(training).run(model, held, cpu).metrics == result


def test_top5_of_five_classes_says_nothing_and_is_left_out(probe, task, cpu):
    model, training, held = task(classes=5)
    result = probe.fit(training).run(model, held, cpu)
    assert set(result.metrics) == set(result.chance) == {"top1", "mean_per_class"}


def test_case_and_spacing_of_labels_do_not_matter(probe, task, cpu):
    model, training, held = task()
    fitted = probe.fit(training)
    expected = fitted.run(model, held, cpu).metrics
    held.labels = [label.upper().replace(" ", "  ") for label in held.labels]
    assert fitted.run(model, held, cpu).metrics == expected


def test_labels_that_differ_in_case_alone_are_two_classes(probe, task, cpu):
    """As EMNIST's 62, which case makes of 36."""
    model, training, held = task()
    spelled = {f"Class {i}": "aAbBcCd"[i] for i in range(7)}
    expected = probe.fit(training).run(model, held, cpu).metrics
    training = replace(training, labels=[spelled[label] for label in training.labels])
    held.labels = [spelled[label].upper() if label == "Class 6" else spelled[label] for label in held.labels]
    result = probe.fit(training).run(model, held, cpu)
    assert (result.counts["classes"], result.counts["outside_classes"]) == (7, 0)
    assert result.metrics == expected


def test_images_of_other_classes_and_without_label_are_left_out_and_counted(probe, task, cpu, caplog):
    model, training, held = task()
    fitted = probe.fit(training)
    held.labels[0], held.labels[1], held.labels[2] = None, "elephant", "mouse"
    with caplog.at_level(logging.WARNING, logger="aclip"):
        result = fitted.run(model, held, cpu)
    assert (result.counts["pictures"], result.counts["outside_classes"]) == (47, 3)
    assert "3 of 50 images are of none of the 7 training classes" in caplog.text
    held.labels = ["elephant"] * 50
    with pytest.raises(ConfigError, match="one of the 7 training classes; the set has, for example: elephant"):
        fitted.run(model, held, cpu)


def test_a_collapsed_model_is_not_above_chance(probe, table_model, image_set, cpu):
    labels = [f"c{i % 8}" for i in range(40)]
    model, images = table_model(torch.full((40, 6), 0.3)), image_set([""] * 40, labels)
    training = encode_image_set(model, images, cpu, space="trunk")
    metrics = probe.fit(training).run(model, images, cpu).metrics
    assert metrics["top1"] <= 1 / 8


def test_training_sets_that_teach_nothing_are_refused(probe, task):
    _, training, _ = task()
    with pytest.raises(DataError, match="which 1 of 210 training images do not have"):
        probe.fit(replace(training, labels=(None, *training.labels[1:])))
    with pytest.raises(DataError, match="all 210 training images are of class 'big cat'"):
        probe.fit(replace(training, labels=("big_cat", "big  cat") * 105))


def test_measures_only_after_it_has_learned(probe, task, cpu):
    model, _, held = task()
    with pytest.raises(ConfigError, match=f"{probe.name} learns from labelled images"):
        probe.run(model, held, cpu)


def test_learning_twice_gives_the_same(probe, task, cpu):
    model, training, held = task(noise=4.0)
    first, second = (probe.fit(training).run(model, held, cpu) for _ in range(2))
    assert first == second
