"""What every recipe of the table must hold: what is declared is what is trained."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from aclip import models, plan
from aclip.config import Pass, Recipe, from_dict, to_dict
from aclip.data.views import VIEWS
from aclip.method import Method
from aclip.recipes import RECIPES
from aclip.structs import Batch, StepOutput
from aclip.training.optim import parameter_groups
from tests_support import build, random_batch


def step(recipe: Recipe, seed: int = 0) -> tuple[Method, Batch, StepOutput]:
    method = build(recipe)
    batch = random_batch(method.plan, batch_size=4, seed=seed)
    return method, batch, method(batch)


@pytest.fixture(scope="module", params=RECIPES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stepped(name: str) -> tuple[Method, Batch, StepOutput]:
    method, batch, output = step(RECIPES[name])
    output.loss.backward()
    return method, batch, output


def test_is_listed_under_its_own_name(name: str) -> None:
    assert RECIPES[name].name == name


def test_survives_json(name: str) -> None:
    assert from_dict(Recipe, to_dict(RECIPES[name])) == RECIPES[name]


def test_loss_is_finite_and_the_weighted_sum_of_its_parts(stepped: tuple[Method, Batch, StepOutput]) -> None:
    method, _, output = stepped
    weights = {key: o.weight for key, o in method.plan.recipe.objectives.items()}
    assert torch.isfinite(output.loss)
    assert set(output.parts) == set(weights)
    expected = sum(weights[key] * part for key, part in output.parts.items())
    torch.testing.assert_close(output.loss.detach(), expected)


def test_every_trainable_parameter_gets_a_gradient(stepped: tuple[Method, Batch, StepOutput]) -> None:
    method, _, _ = stepped
    trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
    without = [n for n, p in trainable.items() if p.grad is None or not torch.isfinite(p.grad).all()]
    # NT-Xent of a view with itself has no gradient through the positive pair but has one through negatives
    zero = [n for n, p in trainable.items() if p.grad is not None and not p.grad.any()]
    assert not without
    # A bias before a BatchNorm is centred away, and a key's bias shifts all logits of a row alike: their gradients
    # vanish in exact arithmetic.
    assert all(n.endswith("bias") or "bias" in n for n in zero), zero
    grouped = {n for group in parameter_groups(method, 0.1) for n in group.parameters}
    assert grouped == set(trainable)


def test_every_trainable_parameter_has_a_gradient_in_an_unmasked_step_too(name: str) -> None:
    """It may be 0, never None: the optimizer's state must not depend on when a phase begins."""
    method = build(RECIPES[name])
    method(random_batch(method.plan, batch_size=4), masked=False).loss.backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_averages_and_frozen_parameters_get_none(stepped: tuple[Method, Batch, StepOutput]) -> None:
    method, _, _ = stepped
    averaged = [p for n, p in method.named_parameters() if n.startswith("ema_visual") or "ema_projector" in n]
    frozen = [p for n, p in method.named_parameters() if n.startswith("model.visual.conv1")]
    assert all(p.grad is None and not p.requires_grad for p in averaged)
    assert bool(averaged) == method.plan.recipe.uses_ema
    assert all(p.grad is None for p in frozen) == bool(method.plan.recipe.freeze)


def test_encodes_exactly_the_declared_tokens(stepped: tuple[Method, Batch, StepOutput]) -> None:
    method, batch, output = stepped
    for key, p in method.plan.passes.items():
        encoded = output.passes[key]
        assert encoded.num_tokens == p.num_tokens
        assert encoded.features.shape[:2] == (len(p.spec.views), batch.size)
        if p.num_keep < p.num_patches:
            assert encoded.keep_indices is not None
            assert encoded.keep_indices.shape == (len(p.spec.views), batch.size, p.num_keep)
            assert (encoded.keep_indices.diff(dim=-1) > 0).all()
        else:
            assert encoded.keep_indices is None


def unmasked(passes: Mapping[str, Pass]) -> dict[str, Pass]:
    return {key: replace(p, masking="none", mask_ratio=0.0, masking_options={}) for key, p in passes.items()}


@pytest.fixture
def _allow_losses_of_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept objectives of masked patches where nothing is masked."""
    monkeypatch.setattr(plan, "_check_masked_objectives", lambda *_: None)


@pytest.mark.usefixtures("_allow_losses_of_0")
def test_ratio_0_equals_no_masking(name: str) -> None:
    recipe, at_zero = RECIPES[name], {}
    for key, p in recipe.passes.items():
        options = {k: v for k, v in p.masking_options.items() if k != "rounding"}  # "released" keeps one block more
        at_zero[key] = replace(p, mask_ratio=0.0, masking_options=options)
    if all(p.masking == "none" for p in recipe.passes.values()):
        pytest.skip("masks nothing")
    losses = [step(replace(recipe, passes=passes))[2].loss for passes in (at_zero, unmasked(recipe.passes))]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


@pytest.mark.usefixtures("_allow_losses_of_0")
def test_an_unmasked_step_equals_ratio_0(name: str) -> None:
    recipe = RECIPES[name]
    method, whole = build(recipe), build(replace(recipe, passes=unmasked(recipe.passes)))
    batch = random_batch(method.plan, batch_size=4)
    hides_words = any(text.mask_ratio > 0 for text in recipe.texts.values())  # no recipe can do that at ratio 0
    expected = whole(batch, masked=not hides_words).loss
    torch.testing.assert_close(method(batch, masked=False).loss, expected, rtol=0, atol=0)


def test_masks_do_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    method = build(RECIPES[name])
    whole = random_batch(method.plan, batch_size=6, seed=1)
    with torch.no_grad():
        together = method.run_passes(whole)
        alone = method.run_passes(whole.rows(slice(2, 5)))
    for key, encoded in together.items():
        if encoded.keep_indices is not None:
            assert torch.equal(encoded.keep_indices[:, 2:5], alone[key].keep_indices)
        torch.testing.assert_close(encoded.features[:, 2:5], alone[key].features, rtol=0, atol=1e-5)


def test_views_exist_in_its_pipeline(name: str) -> None:
    recipe = RECIPES[name]
    used = {view for p in recipe.passes.values() for view in p.views}
    assert used <= set(VIEWS[recipe.views].names)


def test_average_follows_the_optimizer_step(name: str) -> None:
    method, _, output = step(RECIPES[name])
    average = method.ema()
    output.loss.backward()
    pairs = [pair for o in method.objectives.values() for pair in o.ema_pairs()]
    if method.ema_visual is not None:
        pairs.append((models.visual_of(method.model), method.ema_visual))
    before = [[t.clone() for t in average_of.parameters()] for _, average_of in pairs]
    with torch.no_grad():
        for p in method.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    average.update(0.9)
    for (online, average_of), old in zip(pairs, before, strict=True):
        for new, source, start in zip(average_of.parameters(), online.parameters(), old, strict=True):
            torch.testing.assert_close(new, 0.9 * start + 0.1 * source)
