"""Calibration against the literal definitions."""

import math

import numpy as np
import pytest
import torch

from aclip.evaluation import ranking
from aclip.evaluation.zero_shot import Calibration


@pytest.fixture
def task(table_model, image_set):
    generator = torch.Generator().manual_seed(5)
    classes = [f"class {i}" for i in range(6)]
    texts = {c: torch.randn(8, generator=generator) for c in classes}
    labels = [classes[i % 6] for i in range(60)]
    images = torch.stack([texts[label] for label in labels]) + 1.5 * torch.randn(60, 8, generator=generator)
    model = table_model(images, texts)
    model.logit_scale = torch.nn.Parameter(torch.tensor(math.log(7.0)))
    return model, image_set([f"caption {i}" for i in range(60)], labels), classes


def literal(model, labels, classes, bins):
    """Every image and every bin in turn."""
    sure, right, nll = [], [], []
    for image, label in zip(model.images.double().numpy(), labels, strict=True):
        texts = [model.texts[c].double().numpy() for c in classes]
        cosines = np.array([t @ image / np.linalg.norm(t) / np.linalg.norm(image) for t in texts])
        odds = np.exp(7.0 * cosines)
        p = odds / odds.sum()
        sure.append(p.max())
        right.append(classes[int(p.argmax())] == label)
        nll.append(-np.log(p[classes.index(label)]))
    ece = 0.0
    for b in range(bins):
        inside = [i for i, s in enumerate(sure) if b / bins < s <= (b + 1) / bins]
        if inside:
            gap = np.mean([right[i] for i in inside]) - np.mean([sure[i] for i in inside])
            ece += len(inside) / len(sure) * abs(gap)
    return {"ece": ece, "nll": np.mean(nll), "confidence": np.mean(sure), "accuracy": np.mean(right)}


@pytest.mark.parametrize("bins", [4, 15])
def test_metrics_equal_the_definitions(task, bins, cpu):
    model, images, classes = task
    result = Calibration(templates=("{}",), bins=bins).run(model, images, cpu)
    assert result.metrics == pytest.approx(literal(model, images.labels, classes, bins), abs=1e-6)
    assert result.chance["nll"] == pytest.approx(math.log(6))
    assert sum(one["pictures"] for one in result.details["reliability"]) == 60
    assert result.details["logit_scale"] == pytest.approx(7.0)


def test_chunks_do_not_matter(task, cpu, monkeypatch):
    model, images, _ = task
    expected = Calibration(templates=("{}",)).run(model, images, cpu).metrics
    monkeypatch.setattr(ranking, "CHUNK_ELEMENTS", 1)
    assert Calibration(templates=("{}",)).run(model, images, cpu).metrics == pytest.approx(expected)
