"""The contrasts with the captions, averaged over the views of a pass."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from synthetic_passes import CAPTIONS, SHAPE, B, masked, step_context

from aclip import models, plan
from aclip.config import ObjectiveConfig, Pass, Recipe, TextPass, override
from aclip.data import augment
from aclip.errors import ConfigError
from aclip.method import Method
from aclip.objectives import Contrastive, Sigmoid
from aclip.objectives.functional import clip_loss, sigmoid_loss
from aclip.recipes import RECIPES
from tests_support import random_batch


def sigmoid(**options: float | None) -> Sigmoid:
    return Sigmoid({**masked(), **CAPTIONS}, SHAPE, **options)


@pytest.mark.parametrize("views", [("a",), ("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("caption_ids", [(0, 1, 2, 3, 4), (0, 0, 2, 2, 4)])
def test_is_the_mean_over_views(views: tuple[str, ...], caption_ids: tuple[int, ...]) -> None:
    reads = {**masked(views), **CAPTIONS}
    context = step_context(reads, caption_ids)
    images, text, ids = context.passes["masked"].features, context.texts["captions"].features, context.caption_ids
    contrastive = sum(clip_loss(view, text, 12.0, ids) for view in images) / len(views)
    pairwise = sum(sigmoid_loss(view, text, 12.0, -10.0, ids) for view in images) / len(views)
    torch.testing.assert_close(Contrastive(reads, SHAPE)(context), contrastive)
    torch.testing.assert_close(Sigmoid(reads, SHAPE)(context), pairwise)


def test_shared_captions_are_excluded() -> None:
    reads = {**masked(), **CAPTIONS}
    for objective in (Contrastive(reads, SHAPE), sigmoid(init_bias=0.0)):
        assert objective(step_context(reads, caption_ids=(0, 0, 2, 3, 4))) < objective(step_context(reads))


GUIDE = {"guide": TextPass(encoder="frozen")}


@pytest.mark.parametrize(("kind", "loss"), [(Contrastive, clip_loss), (Sigmoid, partial(sigmoid_loss, logit_bias=-10))])
def test_a_frozen_text_pass_says_which_captions_are_nearly_the_same(kind: type[Contrastive], loss: Any) -> None:
    reads = {**masked(), **CAPTIONS, **GUIDE}
    context = step_context(reads)
    guide = F.normalize(torch.randn(B, 3, generator=torch.Generator().manual_seed(5)), dim=1)
    context = replace(context, texts={**context.texts, "guide": replace(context.texts["guide"], features=guide)})
    text, options = context.texts["captions"].features, {"guide": guide, "false_negatives": 0.4}
    expected = sum(loss(view, text, 12.0, caption_ids=context.caption_ids, **options)
                   for view in context.passes["masked"].features) / 2
    found = kind(reads, SHAPE, false_negatives=0.4)(context)
    torch.testing.assert_close(found, expected)
    assert found < kind({**masked(), **CAPTIONS}, SHAPE)(context)


@pytest.mark.parametrize(("further", "option"), [
    ({}, 0.9), (GUIDE, None), ({"guide": TextPass()}, 0.9), ({"guide": TextPass()}, None)])
def test_false_negatives_need_a_frozen_text_pass(further: dict[str, TextPass], option: float | None) -> None:
    with pytest.raises(ConfigError, match="give it both the option false_negatives and, as third of its reads"):
        Contrastive({**masked(), **CAPTIONS, **further}, SHAPE, false_negatives=option)


def test_no_fourth_pass_is_read() -> None:
    with pytest.raises(ConfigError, match="reads an image pass, then a text pass"):
        Contrastive({**masked(), **CAPTIONS, **GUIDE, "other": TextPass()}, SHAPE, false_negatives=0.9)


def test_finetune_takes_it_by_its_paths() -> None:
    recipe = override(RECIPES["finetune"], {
        "objectives.contrastive.reads": '["full", "captions", "frozen-captions"]',
        "objectives.contrastive.options.false-negatives": "0.9"})
    torch.manual_seed(0)
    model = models.create_model("vit-micro")
    resolved = plan.resolve(recipe, models.shape_of(models.model_config("vit-micro")))
    method = Method(model, resolved, (0.5,) * 3, (0.25,) * 3).train()
    batch = random_batch(resolved, batch_size=4)
    tokens = batch.tokens.clone()
    tokens[1] = tokens[0]  # the same words under another id
    twice = method(replace(batch, tokens=tokens)).parts["contrastive"]
    same = method(replace(batch, tokens=tokens, caption_ids=torch.tensor([0, 0, 2, 3]))).parts["contrastive"]
    assert torch.equal(twice, same)
    recipe = override(recipe, {"objectives.contrastive.options.false_negatives": 2})
    with pytest.raises(ConfigError, match="false_negatives should be less than or equal to 1"):
        plan.build_objective("contrastive", plan.resolve(recipe, resolved.shape))


def test_contrastive_reads_its_own_pass_and_has_no_parameters() -> None:
    passes = {"first": Pass(views=("a",)), "second": Pass(views=("a",))}
    context = step_context({**passes, **CAPTIONS})
    first, second = (Contrastive({name: p, **CAPTIONS}, SHAPE) for name, p in passes.items())
    assert first(context) != second(context)
    assert not list(first.parameters())


def test_the_bias_is_the_only_parameter_of_the_sigmoid_loss() -> None:
    objective = sigmoid(init_bias=-3)
    assert dict(objective.named_parameters()).keys() == {"logit_bias"}
    assert objective.logit_bias.item() == -3.0
    assert sigmoid().logit_bias.item() == -10.0
    context = step_context({**masked(), **CAPTIONS})
    objective(context).backward()
    text, slopes = context.texts["captions"].features, []
    for view in context.passes["masked"].features:
        probabilities = (12.0 * view @ text.T - 3.0).sigmoid()
        slopes.append((probabilities - torch.eye(B)).sum() / B)
    torch.testing.assert_close(objective.logit_bias.grad, sum(slopes) / 2)


@pytest.mark.parametrize(("option", "expected"), [(None, -13.0), (-4.0, -4.0)])
def test_the_bias_of_a_model_is_adopted(option: float | None, expected: float) -> None:
    of_model = torch.nn.Parameter(torch.tensor(-13.0))
    objective = sigmoid(init_bias=option)
    assert objective.adopt_bias(of_model)
    assert not list(objective.parameters())
    assert of_model.item() == expected
    assert not Contrastive({**masked(), **CAPTIONS}, SHAPE).adopt_bias(of_model)


def test_a_step_trains_both_towers_scale_and_bias() -> None:
    recipe = Recipe(
        name="siglip", title="", paper="", views="one_crop", passes={"full": Pass(views=("a",))},
        objectives={"sigmoid": ObjectiveConfig(reads=("full", "captions"))},
    )
    torch.manual_seed(0)
    resolved = plan.resolve(recipe, models.shape_of(models.model_config("vit-tiny")))
    assert resolved.uses_text
    method = Method(models.create_model("vit-tiny"), resolved, (0.5,) * 3, (0.25,) * 3).train()
    batch = random_batch(resolved, batch_size=4)
    output = method(batch)
    output.loss.backward()
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert {"objectives.sigmoid.logit_bias", "model.logit_scale"} <= trained.keys()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())

    with torch.no_grad():
        pixels = augment.apply(batch.views["a"], method.mean, method.std)
        image = models.encode_image(models.visual_of(method.model), pixels).features
        text = models.encode_text(method.model, batch.tokens)
        image, text = (x / x.norm(dim=1, keepdim=True) for x in (image, text))
        logits = (method.model.logit_scale.exp() * image @ text.T - 10.0).tolist()
    total = sum(math.log1p(math.exp(-logits[i][j] if i == j else logits[i][j])) for i in range(4) for j in range(4))
    assert output.loss.item() == pytest.approx(total / 4, rel=1e-5)
