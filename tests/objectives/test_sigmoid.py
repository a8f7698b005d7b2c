"""The sigmoid loss with the captions, averaged over the views of a pass."""

import math

import pytest
import torch
from made_passes import CAPTIONS, SHAPE, B, made_pass, step_context

from aclip import models, plan
from aclip.config import ObjectiveConfig, Pass, Recipe
from aclip.data import augment
from aclip.method import Method
from aclip.objectives import Sigmoid
from aclip.objectives.functional import sigmoid_loss
from tests_support import random_batch


def build(p: Pass, **options: float | None) -> Sigmoid:
    return Sigmoid([p, CAPTIONS], SHAPE, **options)


@pytest.mark.parametrize("views", [("a",), ("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("caption_ids", [(0, 1, 2, 3, 4), (0, 0, 2, 2, 4)])
def test_is_the_mean_over_views(views: tuple[str, ...], caption_ids: tuple[int, ...]) -> None:
    p = made_pass("masked", views)
    context = step_context(p, caption_ids=caption_ids)
    text = context.texts["captions"].features
    per_view = [
        sigmoid_loss(context.passes["masked"].features[v], text, 12.0, -10.0, context.caption_ids)
        for v in range(len(views))
    ]
    torch.testing.assert_close(build(p)(context), sum(per_view) / len(views))


def test_the_bias_is_its_only_parameter() -> None:
    p = made_pass("masked", ("a", "b"))
    objective = build(p, init_bias=-3)
    assert dict(objective.named_parameters()).keys() == {"logit_bias"}
    assert objective.logit_bias.item() == -3.0
    assert build(p).logit_bias.item() == -10.0

    own = torch.nn.Parameter(torch.tensor(-13.0))
    for option, first in ((None, -13.0), (-4.0, -4.0)):
        adopting = build(p, init_bias=option)
        assert adopting.adopt_bias(own)
        assert not list(adopting.parameters())
        assert own.item() == first

    context = step_context(p)
    objective(context).backward()
    text, slopes = context.texts["captions"].features, []
    for view in context.passes["masked"].features:
        probabilities = (12.0 * view @ text.T - 3.0).sigmoid()
        slopes.append((probabilities - torch.eye(B)).sum() / B)
    torch.testing.assert_close(objective.logit_bias.grad, sum(slopes) / 2)


def test_a_step_trains_both_towers_scale_and_bias() -> None:
    recipe = Recipe(
        name="siglip", title="", paper="", views="one_crop",
        passes=(Pass("full", views=("a",)),), objectives=(ObjectiveConfig("sigmoid", reads=("full", "captions")),),
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
