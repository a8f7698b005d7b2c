import logging

import numpy as np
import pytest
import torch

from aclip.errors import ConfigError
from aclip.evaluation import TextEncoder
from aclip.evaluation.zero_shot import ZeroShot, class_embeddings

TEMPLATES = ("{}", "a image of {}")


@pytest.fixture
def task(table_model, image_set):
    """30 images in 6 classes of uneven sizes; two prompts a class."""
    generator = torch.Generator().manual_seed(5)
    classes = [f"class {i}" for i in range(6)]
    texts = {t.replace("{}", c): torch.randn(8, generator=generator) for c in classes for t in TEMPLATES}
    labels = [classes[min(i % 9, 5)] for i in range(30)]
    images = torch.stack([texts[label] for label in labels]) + torch.randn(30, 8, generator=generator)
    return table_model(images, texts), image_set([f"caption {i}" for i in range(30)], labels), classes


def oracle(model, labels, classes):
    """Literal loops over images, classes and templates."""
    embeddings = []
    for c in classes:
        prompts = [model.texts[t.replace("{}", c)].double().numpy() for t in TEMPLATES]
        mean = np.mean([p / np.linalg.norm(p) for p in prompts], axis=0)
        embeddings.append(mean / np.linalg.norm(mean))
    hits1, hits5, per_class = [], [], {c: [] for c in classes}
    for image, label in zip(model.images.double().numpy(), labels, strict=True):
        order = [classes[i] for i in np.argsort([-e @ image for e in embeddings])]
        hits1.append(order[0] == label)
        hits5.append(label in order[:5])
        per_class[label].append(order[0] == label)
    return {"top1": np.mean(hits1), "top5": np.mean(hits5),
            "mean_per_class": np.mean([np.mean(hits) for hits in per_class.values()])}


def test_metrics_equal_a_literal_oracle(task, cpu):
    model, images, classes = task
    result = ZeroShot(templates=TEMPLATES).run(model, images, cpu)
    expected = oracle(model, images.labels, classes)
    assert result.metrics == pytest.approx(expected)
    assert expected["top1"] != pytest.approx(expected["mean_per_class"])  # the case tells them apart
    assert result.counts == {"pictures": 30, "classes": 6, "skipped": 0, "outside_classes": 0}
    assert result.chance == pytest.approx({"top1": 1 / 6, "top5": 5 / 6, "mean_per_class": 1 / 6})


def test_order_of_given_classes_does_not_matter(task, cpu):
    model, images, classes = task
    expected = ZeroShot(templates=TEMPLATES).run(model, images, cpu).metrics
    given = ZeroShot(classes=tuple(reversed(classes)), templates=TEMPLATES)
    assert given.run(model, images, cpu).metrics == pytest.approx(expected)


def test_captions_are_the_classes_where_labels_are_missing(table_model, image_set, cpu):
    texts = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
    images = image_set(["a", "b", "b"], labels=["x", None, "x"])
    result = ZeroShot(templates=("{}",)).run(table_model(torch.eye(2)[[0, 1, 1]], texts), images, cpu)
    assert result.metrics["top1"] == 1.0
    assert result.counts["classes"] == 2


@pytest.mark.parametrize(("captions", "labels", "classes", "warns"), [
    (["a", "b", "a"], None, None, True),
    (["a", "b", "a", "b"], None, None, False),  # two images a class
    (["a", "b", "a"], ["a", "b", "a"], None, False),
    (["a", "b", "a"], None, ("a", "b"), False),
])
def test_captions_that_are_nearly_as_many_as_images_are_no_classes(
    captions, labels, classes, warns, table_model, image_set, cpu, caplog
):
    texts = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
    model = table_model(torch.eye(2)[[captions.index(caption) for caption in captions]], texts)
    with caplog.at_level(logging.WARNING, logger="aclip"):
        ZeroShot(classes=classes, templates=("{}",)).run(model, image_set(captions, labels), cpu)
    assert ("zero_shot takes their captions as classes, 2 for 3 images" in caplog.text) == warns


def test_images_of_other_classes_are_left_out_and_counted(task, cpu, caplog):
    model, images, classes = task
    with caplog.at_level(logging.WARNING, logger="aclip"):
        result = ZeroShot(classes=tuple(classes[:2]), templates=TEMPLATES).run(model, images, cpu)
    of_two = sum(label in classes[:2] for label in images.labels)
    assert (result.counts["pictures"], result.counts["outside_classes"]) == (of_two, 30 - of_two)
    assert f"{30 - of_two} of 30 images" in caplog.text


def test_a_given_class_without_images_does_not_count_in_the_mean(table_model, image_set, cpu):
    texts = {"a": torch.tensor([1.0, 0.0]), "never": torch.tensor([0.0, 1.0])}
    evaluator = ZeroShot(classes=("never", "a"), templates=("{}",))
    result = evaluator.run(table_model(torch.eye(2)[:1], texts), image_set(["a"]), cpu)
    assert result.metrics["mean_per_class"] == 1.0


def test_collapsed_model_scores_nothing(task, cpu):
    model, images, _ = task
    model.images = torch.ones_like(model.images)
    model.texts = {name: torch.ones(8) for name in model.texts}
    metrics = ZeroShot(templates=TEMPLATES).run(model, images, cpu).metrics
    assert set(metrics.values()) == {0.0}


def test_embedding_averages_normalised_prompts(table_model, cpu):
    texts = {"ax": torch.tensor([3.0, 0.0]), "ya{b}": torch.tensor([0.0, 100.0])}
    model = table_model(torch.eye(2), texts)
    embedding = class_embeddings(TextEncoder(model, cpu), ["a"], ["{}x", "y{}{b}"])
    torch.testing.assert_close(embedding, torch.full((1, 2), 0.5**0.5))


@pytest.mark.parametrize(("options", "sentence"), [
    ({"templates": ("a image",)}, r"'a image' has no \{\}"),
    ({"templates": ()}, "no prompt template: write one"),
    ({"classes": ("cat", "dog", "Cat ")}, "class 'cat' is named twice"),
])
def test_senseless_settings_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ZeroShot(**options)


def test_classes_that_nothing_belongs_to_are_an_error(task, cpu):
    model, images, _ = task
    with pytest.raises(ConfigError, match=r"no image of the set .* for example: class 0"):
        ZeroShot(classes=("elephant", "mouse")).run(model, images, cpu)
