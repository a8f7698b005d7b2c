"""The text tower as evaluators ask it: in order, and once."""

import pytest
import torch

from aclip.evaluation import TextEncoder
from aclip.evaluation import features as module
from aclip.evaluation.zero_shot import class_embeddings


@pytest.fixture
def model(table_model):
    generator = torch.Generator().manual_seed(1)
    return table_model(torch.eye(6), {f"t{i}": torch.randn(6, generator=generator) for i in range(9)})


@pytest.fixture
def asked(model, monkeypatch):
    """The number of texts of every call of the tower."""
    sizes = []
    encode_text = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda tokens, normalize: (
        sizes.append(len(tokens)), encode_text(tokens, normalize=normalize))[1])
    return sizes


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_texts_are_encoded_in_order_for_any_batch_size(model, cpu, batch_size, monkeypatch):
    monkeypatch.setattr(module, "TEXT_BATCH_SIZE", batch_size)
    expected = torch.stack([t / t.norm() for t in model.texts.values()])
    torch.testing.assert_close(TextEncoder(model, cpu)(model.names), expected)


def test_cached_texts_are_not_encoded_again(model, asked, cpu):
    texts = TextEncoder(model, cpu)
    first = texts.cached("all", lambda: texts(model.names))
    assert torch.equal(texts.cached("two", lambda: texts(model.names[:2])), first[:2])
    assert torch.equal(texts.cached("all", lambda: texts(model.names)), first)
    assert asked == [9, 2]


def test_the_cache_is_bounded_and_evicts_the_least_recently_used(model, asked, cpu, monkeypatch):
    monkeypatch.setattr(module, "CACHED_ELEMENTS", 4 * 6)
    texts = TextEncoder(model, cpu)
    for names in (("t0", "t1"), ("t2", "t3"), ("t0", "t1"), ("t4",), ("t0", "t1"), ("t2", "t3")):
        expected = torch.stack([model.texts[n] / model.texts[n].norm() for n in names])
        torch.testing.assert_close(texts.cached(names, lambda names=names: texts(names)), expected)
    assert asked == [2, 2, 1, 2]
    for _ in range(2):
        texts.cached("more than fits", lambda: texts(model.names))
    assert asked[4:] == [9, 9]


def test_classes_are_cached_not_their_prompts(table_model, cpu, monkeypatch):
    """Of a thousand classes with eighty prompts each the prompts would not fit."""
    model = table_model(torch.eye(6), {f"{c}{n}": torch.randn(6) for c in "ab" for n in range(9)})
    monkeypatch.setattr(module, "CACHED_ELEMENTS", 2 * 6)
    texts, calls, encode_text = TextEncoder(model, cpu), [], model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda tokens, normalize: (
        calls.append(len(tokens)), encode_text(tokens, normalize=normalize))[1])
    templates = [f"{{}}{n}" for n in range(9)]
    first = class_embeddings(texts, ["a", "b"], templates)
    assert torch.equal(class_embeddings(texts, ["a", "b"], templates), first)
    assert calls == [18]
