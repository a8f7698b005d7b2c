"""Captions as classes: loops over captions and words, and the counts behind the weights."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic_passes import CAPTIONS, EOT, SHAPE, SOT, B, masked, step_context
from torch import Tensor

from aclip import models, plan
from aclip.config import ObjectiveConfig, Pass, Recipe
from aclip.data import augment
from aclip.errors import ConfigError
from aclip.method import Method
from aclip.objectives import BagOfWords, functional
from aclip.objectives.bag_of_words import distinct_words
from aclip.structs import EncodedText, StepContext
from over_ranks import in_double
from tests_support import random_batch

LENGTH = 9
# words repeat within a caption (7) and across captions (3); 0 is both a word and padding; one caption is empty
BATCHES = (
    ((3, 4, 5), (3,), (7, 7, 8, 7), (), (0, 3, 0)),
    ((3, 4), (3, 9, 10, 11, 12, 13, 14), (0,), (5, 6), (3, 3, 3)),
    ((21,), (22,), (3,), (3, 4), (15, 0, 15)),
)
WORDS = st.lists(st.lists(st.integers(0, SOT - 1), max_size=LENGTH - 2), min_size=1, max_size=6)


def tokens_of(captions: tuple[tuple[int, ...], ...] | list[list[int]], length: int = LENGTH) -> Tensor:
    tokens = torch.zeros(len(captions), length, dtype=torch.int64)
    for row, words in enumerate(captions):
        tokens[row, : len(words) + 2] = torch.tensor([SOT, *words, EOT])
    return tokens


def build(views: tuple[str, ...] = ("a", "b")) -> BagOfWords:
    torch.manual_seed(0)
    return BagOfWords({**masked(views), **CAPTIONS}, SHAPE).train()


def context_of(captions: tuple[tuple[int, ...], ...], views: tuple[str, ...] = ("a", "b")) -> StepContext:
    return replace(step_context(masked(views)), texts={"captions": EncodedText(tokens_of(captions))})


class LiteralCounts:
    """N and n_c, caption by caption."""

    def __init__(self) -> None:
        self.seen, self.with_word = 0, Counter[int]()

    def add(self, captions: tuple[tuple[int, ...], ...]) -> None:
        for words in captions:
            self.seen += 1
            self.with_word.update(set(words))

    def targets(self, words: tuple[int, ...]) -> dict[int, float]:
        """Equation 2; equal weights where none is positive."""
        weights = {c: max(0.0, math.log(self.seen / (1 + self.with_word[c]))) for c in set(words)}
        if sum(weights.values()) == 0:
            weights = dict.fromkeys(weights, 1.0)
        return {c: w / sum(weights.values()) for c, w in weights.items()}


def literal_loss(
    objective: BagOfWords, context: StepContext, captions: tuple[tuple[int, ...], ...], counts: LiteralCounts
) -> float:
    patches = context.passes["masked"].patches
    total = 0.0
    for view in patches:
        for b, words in enumerate(captions):
            mean = torch.stack(list(view[b])).mean(dim=0)
            logits = (objective.head.weight @ mean + objective.head.bias).tolist()
            normaliser = math.log(sum(math.exp(x) for x in logits))
            total -= sum(y * (logits[c] - normaliser) for c, y in counts.targets(words).items())
    return total / (len(patches) * len(captions))


@pytest.mark.parametrize("views", [("a",), ("a", "b")])
def test_is_the_loop_over_captions_and_words(views: tuple[str, ...]) -> None:
    objective, counts = build(views), LiteralCounts()
    for captions in BATCHES:
        context = context_of(captions, views)
        counts.add(captions)
        loss = objective(context)
        assert loss.item() == pytest.approx(literal_loss(objective, context, captions, counts), rel=1e-5)
        assert objective.captions_seen.item() == counts.seen
        assert objective.captions_with.tolist() == [counts.with_word[c] for c in range(SHAPE.vocab_size)]


def test_common_words_weigh_less_and_ubiquitous_ones_0() -> None:
    objective = build()
    objective.captions_seen.fill_(100)
    objective.captions_with[torch.tensor([3, 4, 5])] = torch.tensor([100, 9, 0])
    tokens = tokens_of([[3, 4, 5]])
    weights = objective.targets(tokens, distinct_words(tokens))[0]
    assert weights[1] == 0.0  # log(100 / 101) < 0
    assert weights[2].item() == pytest.approx(1 / 3, rel=1e-6)  # log 10 of log 10 + log 100
    assert weights[3].item() == pytest.approx(2 / 3, rel=1e-6)


def test_words_of_weight_0_weigh_equally() -> None:
    objective = build()
    tokens = tokens_of([[3, 4, 3], [5]])
    for seen in (0, 1):  # nothing counted yet, and log(1 / 1)
        objective.captions_seen.fill_(seen)
        weights = objective.targets(tokens, distinct_words(tokens))
        assert weights.tolist() == [[0, 0.5, 0.5, *[0] * 6], [0, 1, *[0] * 7]]


@given(captions=WORDS, length=st.integers(LENGTH, 20), data=st.data())
def test_targets_are_a_distribution_over_the_words_of_a_caption(
    captions: list[list[int]], length: int, data: st.DataObject
) -> None:
    objective = build()
    seen = data.draw(st.integers(0, 1000))
    objective.captions_seen.fill_(seen)
    counts = data.draw(st.lists(st.integers(0, seen), min_size=SHAPE.vocab_size, max_size=SHAPE.vocab_size))
    objective.captions_with.copy_(torch.tensor(counts))
    tokens = tokens_of(captions, length)
    words = distinct_words(tokens)
    targets = objective.targets(tokens, words)
    for row, caption in enumerate(captions):
        assert sorted(tokens[row, words[row]].tolist()) == sorted(set(caption))
        assert targets[row].sum().item() == pytest.approx(1.0 if caption else 0.0, abs=1e-6)
        assert (targets[row] >= 0).all()
        assert not targets[row, ~words[row]].any()


def test_evaluation_counts_nothing() -> None:
    objective = build()
    objective(context_of(BATCHES[0]))
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    objective.eval()(context_of(BATCHES[1]))
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())


def test_counts_are_part_of_the_state() -> None:
    objective, resumed = build(), build()
    objective(context_of(BATCHES[0]))
    resumed.load_state_dict({key: value.clone() for key, value in objective.state_dict().items()})
    torch.testing.assert_close(
        objective(context_of(BATCHES[1])), resumed(context_of(BATCHES[1])), rtol=0, atol=0
    )
    assert resumed.captions_seen.item() == 2 * B


def test_counts_survive_half_precision() -> None:
    objective = build()
    objective.captions_seen.fill_(2**24 + 1)
    assert objective.half().captions_seen.item() == 2**24 + 1


def test_longer_padding_changes_nothing() -> None:
    losses = []
    for length in (LENGTH, 16):
        context = context_of(BATCHES[1])
        text = EncodedText(tokens_of(BATCHES[1], length))
        losses.append(build()(replace(context, texts={"captions": text})))
    torch.testing.assert_close(*losses)


def test_the_gradient_is_softmax_minus_target() -> None:
    objective = build(("a",))
    context = context_of(BATCHES[1], ("a",))
    objective(context).backward()
    counts = LiteralCounts()
    counts.add(BATCHES[1])
    means = context.passes["masked"].patches[0].mean(dim=1)
    expected = torch.zeros(SHAPE.vocab_size)
    for b, words in enumerate(BATCHES[1]):
        target = counts.targets(words)
        probabilities = objective.head(means[b]).softmax(dim=0)
        expected += (probabilities - torch.tensor([target.get(c, 0.0) for c in range(SHAPE.vocab_size)])) / B
    torch.testing.assert_close(objective.head.bias.grad, expected, rtol=0, atol=1e-6)


def test_logits_in_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for at_once in (functional.LOGITS_AT_ONCE, 3 * SHAPE.vocab_size):
        monkeypatch.setattr(functional, "LOGITS_AT_ONCE", at_once)
        objective = build()
        with in_double(objective):
            context = context_of(BATCHES[0])
            loss = objective(context)
            read = (*objective.parameters(), context.passes["masked"].patches)
            found.append([loss.detach(), *torch.autograd.grad(loss, read)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_computes_in_float32_under_autocast() -> None:
    context = context_of(BATCHES[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss = build()(context)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(build()(context).item(), rel=2**-7)


def test_needs_no_text_tower_but_the_words() -> None:
    recipe = Recipe(
        name="superclass", title="", paper="", views="one_crop",
        passes={"masked": Pass(views=("a",), masking="uniform", mask_ratio=0.5)},
        objectives={"bag_of_words": ObjectiveConfig(reads=("masked", "captions"))},
    )
    torch.manual_seed(0)
    resolved = plan.resolve(recipe, models.shape_of(models.model_config("vit-tiny")))
    assert not resolved.uses_text
    method = Method(models.create_model("vit-tiny", with_text=False), resolved, (0.5,) * 3, (0.25,) * 3).train()
    batch = random_batch(resolved, batch_size=4)
    output = method(batch)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)
    assert method.state_dict()["objectives.bag_of_words.captions_seen"].item() == 4

    seen = output.passes["masked"]
    pixels = augment.apply(batch.views["a"], method.mean, method.std)
    patches = models.encode_image(
        models.visual_of(method.model), pixels, seen.keep_indices[0], return_patches=True
    ).patches
    counts, total = LiteralCounts(), 0.0
    captions = tuple(tuple(row[1:-1]) for row in batch.tokens.tolist())
    counts.add(captions)
    for b, words in enumerate(captions):
        scores = method.objectives["bag_of_words"].head(patches[b].mean(dim=0)).log_softmax(dim=0)
        total -= sum(y * scores[c].item() for c, y in counts.targets(words).items())
    assert patches.shape[1] == resolved.passes["masked"].num_keep == 32
    assert output.loss.item() == pytest.approx(total / 4, rel=1e-5)


def test_refuses_a_text_tower_without_an_end() -> None:
    with pytest.raises(ConfigError, match="finds the end of a caption by its EOT"):
        BagOfWords({**masked(), **CAPTIONS}, replace(SHAPE, text_cut=False))
