import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from aclip.errors import ConfigError
from aclip.evaluation import EVALUATORS
from aclip.evaluation.retrieval import PROTOCOLS, Retrieval, distinct


@pytest.fixture
def emoji(table_model, image_set):
    """40 images of 12 captions, spelled unevenly; features lean towards their caption's."""
    generator = torch.Generator().manual_seed(3)
    names = [f"thing {i}" for i in range(12)]
    texts = {name: torch.randn(8, generator=generator) for name in names}
    of_image = [i % 12 for i in range(40)]
    noise = 1.2 * torch.randn(40, 8, generator=generator)
    images = torch.stack([texts[names[i]] for i in of_image]) + noise
    captions = [names[i] if n < 12 else f" Thing  {i}" for n, i in enumerate(of_image)]
    return table_model(images, texts), image_set(captions, skipped=[("bad", "empty file")])


def oracle(model, captions):
    """Literal R@k and median ranks from the full matrix of cosines, by sorting."""
    names = sorted({" ".join(c.casefold().split()) for c in captions})
    own = [names.index(" ".join(c.casefold().split())) for c in captions]
    texts = np.stack([model.texts[n].numpy() for n in names]).astype(float)
    images = model.images.numpy().astype(float)
    cosine = (images / np.linalg.norm(images, axis=1, keepdims=True)) @ (
        texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    to_text = [1 + list(np.argsort(-row)).index(c) for row, c in zip(cosine, own, strict=True)]
    to_image = []
    for c, column in enumerate(cosine.T):
        order = [own[i] for i in np.argsort(-column)]
        to_image.append(1 + order.index(c))  # what precedes the first right image is all wrong
    return {"image_to_text": to_text, "text_to_image": to_image}


def test_metrics_equal_a_sorting_oracle(emoji, cpu):
    model, images = emoji
    result = Retrieval().run(model, images, cpu)
    for direction, rank in oracle(model, images.captions).items():
        for k in (1, 5, 10):
            assert result.metrics[f"{direction}_r{k}"] == pytest.approx(np.mean([r <= k for r in rank]))
        assert result.metrics[f"{direction}_median_rank"] == np.median(rank)
    assert 0.2 < result.metrics["image_to_text_r1"] < 1.0  # the oracle was not compared on a trivial case
    assert result.counts == {"pictures": 40, "captions": 12, "skipped": 1}


def test_metrics_do_not_depend_on_batches(emoji, image_set, cpu):
    model, images = emoji
    expected = Retrieval().run(model, images, cpu).metrics
    other = image_set(images.captions, batch_size=11)
    assert Retrieval().run(model, other, cpu).metrics == expected


def test_perfect_and_collapsed_models(table_model, image_set, cpu):
    texts = {f"c{i}": torch.eye(12)[i] for i in range(12)}
    images = image_set(list(texts))
    perfect = Retrieval().run(table_model(torch.eye(12), texts), images, cpu).metrics
    assert {perfect[f"{d}_r1"] for d in ("image_to_text", "text_to_image")} == {1.0}
    collapsed = {name: torch.ones(12) for name in texts}
    metrics = Retrieval().run(table_model(torch.ones(12, 12), collapsed), images, cpu).metrics
    assert {metrics[f"{d}_r{k}"] for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)} == {0.0}


def test_any_image_of_a_caption_is_right_for_it(table_model, image_set, cpu):
    texts = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
    images = torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.0, 1.0]])  # the second "a" looks like "b"
    result = Retrieval().run(table_model(images, texts), image_set(["a", "a", "b"]), cpu)
    assert result.metrics["text_to_image_r1"] == 1.0
    assert result.metrics["image_to_text_r1"] == pytest.approx(2 / 3)


@pytest.fixture
def five_captions(table_model, image_set):
    """23 images with five captions each, two of them with six and three."""
    generator = torch.Generator().manual_seed(11)
    counts = [5] * 23
    counts[4], counts[9] = 6, 3
    images = torch.randn(23, 8, generator=generator)
    captions = [[f"image {i} caption {n}" for n in range(count)] for i, count in enumerate(counts)]
    texts = {text: images[i] + 2.0 * torch.randn(8, generator=generator)
             for i, own in enumerate(captions) for text in own}
    return table_model(images, texts), image_set([own[0] for own in captions], others=[own[1:] for own in captions])


def literal_recalls(model, captions, k):
    """Karpathy's protocol, literally: sort everything, look for a right one among the first k."""
    texts = [(i, text) for i, own in enumerate(captions) for text in own]
    normed = [model.texts[text].double() / model.texts[text].double().norm() for _, text in texts]
    images = [image.double() / image.double().norm() for image in model.images[: len(captions)]]
    to_text, to_image = [], []
    for i, image in enumerate(images):
        order = sorted(range(len(texts)), key=lambda t: -float(image @ normed[t]))
        to_text.append(any(texts[t][0] == i for t in order[:k]))
    for t, (owner, _) in enumerate(texts):
        order = sorted(range(len(images)), key=lambda i: -float(images[i] @ normed[t]))
        to_image.append(owner in order[:k])
    return np.mean(to_text), np.mean(to_image)


@pytest.mark.parametrize(("protocol", "each"), [("all", 6), ("karpathy", 5)])
def test_several_captions_equal_the_literal_protocol(five_captions, protocol, each, cpu):
    model, images = five_captions
    captions = [(first, *others)[:each] for first, others in zip(images.captions, images.others, strict=True)]
    result = Retrieval(protocol=protocol).run(model, images, cpu)
    for k in (1, 5, 10):
        to_text, to_image = literal_recalls(model, captions, k)
        assert result.metrics[f"image_to_text_r{k}"] == pytest.approx(to_text, abs=1e-12)
        assert result.metrics[f"text_to_image_r{k}"] == pytest.approx(to_image, abs=1e-12)
    assert 0.2 < result.metrics["text_to_image_r1"] < 0.9
    assert result.counts == {"pictures": 23, "captions": 114 if each == 6 else 113, "skipped": 0, "shared": 0}
    expected = np.mean([min(len(own), each) / result.counts["captions"] for own in captions])
    assert result.chance["image_to_text_r1"] == pytest.approx(expected)
    assert result.chance["text_to_image_r1"] == pytest.approx(1 / 23)
    assert all(example["rank"] >= 1 for example in result.examples)


def test_captions_that_several_images_share_are_counted(table_model, image_set, cpu):
    texts = {"a dog": torch.eye(3)[0], " A  dog": torch.eye(3)[0], "a cat": torch.eye(3)[1], "a boat": torch.eye(3)[2]}
    features = torch.eye(3)[[0, 0, 1]]
    images = image_set(["a dog", " A  dog", "a cat"], others=[["a dog"], [], ["a boat"]])
    result = Retrieval(protocol="all").run(table_model(features, texts), images, cpu)
    assert result.counts == {"pictures": 3, "captions": 5, "skipped": 0, "shared": 3}
    assert result.metrics["image_to_text_r1"] == pytest.approx(1 / 3)  # for a model that could do no better
    assert "shared" not in Retrieval().run(table_model(features, texts), images, cpu).counts


def test_folds_are_means_over_whole_folds(five_captions, cpu, monkeypatch):
    model, images = five_captions
    monkeypatch.setitem(PROTOCOLS, "karpathy-1k", (5, 10))
    result = Retrieval(protocol="karpathy-1k").run(model, images, cpu)
    captions = [(first, *others)[:5] for first, others in zip(images.captions, images.others, strict=True)]
    images, parts = model.images, []
    for start in (0, 10):
        model.images = images[start:]
        parts.append(literal_recalls(model, captions[start : start + 10], 1))
    assert result.metrics["image_to_text_r1"] == pytest.approx(np.mean([part[0] for part in parts]))
    assert result.metrics["text_to_image_r1"] == pytest.approx(np.mean([part[1] for part in parts]))
    assert (result.counts["pictures"], result.counts["folds"], result.counts["left_over"]) == (20, 2, 3)


def test_a_set_smaller_than_a_fold_is_an_error(five_captions, cpu):
    with pytest.raises(ConfigError, match="ranks 1,000 images at a time and the set has 23"):
        Retrieval(protocol="karpathy-1k").run(*five_captions, cpu)
    with pytest.raises(ConfigError, match="did you mean 'karpathy'"):
        Retrieval(protocol="karpaty")


def test_chance_levels(emoji, cpu):
    chance = Retrieval().run(*emoji, cpu).chance
    assert chance["image_to_text_r5"] == pytest.approx(5 / 12)
    # Captions 0-3 have four images, the others three.
    expected = (4 * (4 / 40) + 8 * (3 / 40)) / 12
    assert chance["text_to_image_r1"] == pytest.approx(expected)
    assert not any("median" in name for name in chance)


def test_distinct_ignores_case_and_spacing_and_keeps_the_first_spelling():
    assert distinct(["Red  heart", "cat", "red heart ", "CAT", "dog"]) == (["Red  heart", "cat", "dog"],
                                                                          [0, 1, 0, 1, 2])


def test_examples_show_the_widest_and_the_worst(emoji, cpu):
    model, images = emoji
    result = Retrieval(examples=3).run(model, images, cpu)
    rank = oracle(model, images.captions)["image_to_text"]
    best = [e for e in result.examples if e["kind"] == "best"]
    worst = [e for e in result.examples if e["kind"] == "worst"]
    assert len(best) == len(worst) == 3
    assert all(e["rank"] == 1 and distinct([e["caption"], e["top"][0]["caption"]])[1] == [0, 0] for e in best)
    assert worst[0]["rank"] == max(rank)
    for e in result.examples:
        assert e["rank"] == rank[int(e["key"].removeprefix("key"))]
        values = [one["similarity"] for one in e["top"]]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert Image.open(io.BytesIO(base64.b64decode(e["thumbnail"]))).size == (96, 48)
    assert len({e["caption"].casefold().strip() for e in worst}) == 3


def test_small_and_collapsed_sets_have_fewer_examples(table_model, image_set, cpu):
    model = table_model(torch.ones(2, 3), {"a": torch.ones(3), "b": torch.ones(3)})
    result = Retrieval().run(model, image_set(["a", "b"]), cpu)
    assert [e["kind"] for e in result.examples] == ["worst", "worst"]


def test_table_names_match():
    assert all(entry.name == name for name, entry in EVALUATORS.items())
    assert set(EVALUATORS) == {"retrieval", "zero_shot", "calibration", "linear_probe", "knn"}
