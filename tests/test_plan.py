"""Recipes resolved against models: tokens, arithmetic, and wiring errors that say what exists."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import aclip.recipes
from aclip.config import EmaMomentum, ObjectiveConfig, Pass, Recipe, TextPass, override
from aclip.errors import ConfigError
from aclip.masking import MASKING, UniformMasking
from aclip.objectives import OBJECTIVES
from aclip.plan import Plan, build_objective, image_macs, resolve, text_macs
from aclip.recipes import RECIPES
from tests_support import VIT_B_16

FLIP_75 = override(RECIPES["flip"], {"passes.masked.mask_ratio": 0.75})
CLIP, A_CLIP = RECIPES["clip"], RECIPES["a-clip"]


def resolved(recipe: str | Recipe, **shape: Any) -> Plan:
    return resolve(RECIPES[recipe] if isinstance(recipe, str) else recipe, replace(VIT_B_16, **shape))


def with_pass(recipe: Recipe, name: str, **changes: Any) -> Recipe:
    """Return the recipe with one of its passes changed, or with a new one."""
    changed = replace(recipe.passes[name], **changes) if name in recipe.passes else Pass(**changes)
    return replace(recipe, passes={**recipe.passes, name: changed})


@pytest.mark.parametrize(("patches", "gmacs"), [(196, 17.56), (98, 8.70), (49, 4.32)])
def test_image_arithmetic(patches: int, gmacs: float) -> None:
    # the reference embeds all patches
    assert image_macs(VIT_B_16, patches, patches + 1) == pytest.approx(gmacs * 1e9, rel=0.01)


@pytest.mark.parametrize(("tokens", "gmacs"), [(None, 2.98), (77, 2.98), (14, 0.53)])
def test_text_arithmetic(tokens: int | None, gmacs: float) -> None:
    assert text_macs(VIT_B_16, tokens) == pytest.approx(gmacs * 1e9, rel=0.01)
    assert text_macs(replace(VIT_B_16, text_cut=False), tokens) == text_macs(VIT_B_16)


@pytest.mark.parametrize(
    ("recipe", "padded", "cut"),
    [
        ("clip", 1.00, 1.00),
        ("flip", 0.57, 0.51),
        (FLIP_75, 0.36, 0.27),
        ("a-clip", 1.28, 1.32),
        ("a-clip-eff", 1.07, 1.07),
        ("a-clip-released", 1.28, 1.32),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_cost_relative_to_clip(recipe: str | Recipe, padded: float, cut: float) -> None:
    plan = resolved(recipe)
    assert plan.relative_cost() == pytest.approx(padded, rel=0.03)
    assert plan.relative_cost(text_tokens=77) == plan.relative_cost()
    assert plan.relative_cost(text_tokens=14) == pytest.approx(cut, rel=0.03)


def test_documented_costs() -> None:
    documented = {}
    for path in Path(aclip.recipes.__file__).parent.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        for cost in re.finditer(r'"""Cost (\d\.\d\d)', source):
            documented[re.findall(r'name="([\w-]+)"', source[: cost.start()])[-1]] = float(cost[1])
    assert documented.keys() >= {"clip", "flip", "slip", "a-clip", "a-clip-eff", "mae"}
    assert documented == pytest.approx({name: resolved(name).relative_cost() for name in documented}, rel=0.03)


@pytest.mark.parametrize(
    ("recipe", "tokens"),
    [
        ("clip", {"full": 197}),
        ("flip", {"masked": 99}),
        (FLIP_75, {"masked": 50}),
        ("a-clip", {"context": 197, "masked": 101}),  # 25 of 49 blocks of 4
        ("a-clip-eff", {"context": 50, "masked": 101}),
        ("a-clip-released", {"context": 197, "masked": 101}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_tokens(recipe: str | Recipe, tokens: dict[str, int]) -> None:
    plan = resolved(recipe)
    assert {name: p.num_tokens for name, p in plan.passes.items()} == tokens
    assert all(p.num_tokens == p.num_keep + 1 for p in plan.passes.values())
    assert [name for name, p in plan.passes.items() if p.gives_scores] == (["context"] if len(tokens) == 2 else [])
    assert plan.uses_text
    assert plan.notes == ()


def test_prefix_tokens_are_never_removed() -> None:
    assert [p.num_tokens for p in resolved("a-clip", num_prefix_tokens=5).passes.values()] == [201, 105]


@pytest.mark.parametrize(
    ("image", "patch", "resolution", "size", "grid"),
    [
        ((224, 224), (16, 16), 0.5, (112, 112), (7, 7)),
        ((224, 224), (32, 32), 0.5, (128, 128), (4, 4)),  # 3.5 patches round up
        ((240, 176), (16, 16), 0.5, (128, 96), (8, 6)),
        ((224, 224), (14, 14), 0.75, (168, 168), (12, 12)),
        ((32, 32), (16, 16), 0.1, (16, 16), (1, 1)),  # at least one patch
    ],
)
def test_resolution_is_rounded_to_whole_patches(
    image: tuple[int, int], patch: tuple[int, int], resolution: float, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    plan = resolved(with_pass(A_CLIP, "context", resolution=resolution), image_size=image, patch_size=patch)
    context = plan.passes["context"]
    assert (context.image_size, context.grid_size) == (size, grid)
    assert context.num_patches == grid[0] * grid[1]
    assert plan.view_sizes == {"context": size, "a": image, "b": image}


def test_a_view_shared_between_sizes_is_delivered_in_the_larger() -> None:
    recipe = with_pass(replace(CLIP, ema_momentum=EmaMomentum()), "small", views=("a",), encoder="ema", resolution=0.5)
    assert resolved(recipe).view_sizes == {"a": (224, 224)}


def test_notes_say_what_was_adapted() -> None:
    odd = resolved("a-clip", image_size=(112, 112))
    assert odd.passes["masked"].num_keep == 25
    assert any("2 x 2 do not tile the 7 x 7 grid, single patches" in note for note in odd.notes)
    assert any("text runs at full length" in note for note in resolved("clip", text_cut=False).notes)


def test_a_mask_that_removes_nothing_is_noted() -> None:
    (note,) = resolve(A_CLIP, VIT_B_16, 1 / 7).notes
    assert note == "pass 'masked': mask_ratio 0.5 removes nothing of the 2 x 2 grid in blocks of 2 x 2"
    (note,) = resolved(with_pass(RECIPES["flip"], "masked", mask_ratio=0.001)).notes
    assert note == "pass 'masked': mask_ratio 0.001 removes nothing of the 14 x 14 grid"
    assert resolved(with_pass(RECIPES["flip"], "masked", mask_ratio=0.0)).notes == ()


@pytest.mark.parametrize(("name", "objective"), [
    ("mae", "reconstruction"), ("simmim", "reconstruction"), ("maskclip", "masked_distillation")])
def test_an_objective_on_removed_patches_needs_some(name: str, objective: str) -> None:
    for ratio in (0.0, 0.001):
        with pytest.raises(ConfigError, match=f"objective '{objective}' is computed on removed patches alone"):
            resolved(with_pass(RECIPES[name], "masked", mask_ratio=ratio))
    with pytest.raises(ConfigError, match="pass 'masked' removes none of its 1 x 1 grid at mask_ratio 0"):
        resolve(RECIPES[name], VIT_B_16, 1 / 14)


@pytest.mark.parametrize("name", ["a-clip", "flip", "attentive-1x50"])
def test_unmasked_steps_cost_as_much_as_a_ratio_of_0(name: str) -> None:
    at_zero = resolved(with_pass(RECIPES[name], "masked", mask_ratio=0.0))
    assert resolved(name).unmasked().macs(14) == at_zero.macs(14)


@pytest.mark.parametrize("encoder", ["ema", "online"])
def test_a_pass_that_only_scores_costs_its_forward_pass_and_is_skipped_where_nothing_is_chosen(encoder: str) -> None:
    recipe = with_pass(RECIPES["attentive-1x50"], "context", encoder=encoder)
    plan = resolved(recipe)
    assert plan.recipe.uses_ema == (encoder == "ema")
    assert [p.trains for p in plan.passes.values()] == [False, True]
    assert plan.macs() == pytest.approx(
        image_macs(VIT_B_16, 196, 197) + 3 * image_macs(VIT_B_16, 100, 101) + 3 * text_macs(VIT_B_16))
    unmasked = resolved(with_pass(recipe, "masked", mask_ratio=0.0))
    assert not unmasked.runs(unmasked.passes["context"])
    assert unmasked.macs() == pytest.approx(resolved("clip-augmented").macs())
    assert resolved(with_pass(A_CLIP, "masked", mask_ratio=0.0)).macs() > 2 * resolved("clip").macs()  # BYOL reads it


def two_scored_views(**changes: Any) -> Recipe:
    """Return a recipe whose scores come from the full views a and b."""
    passes = {"scored": Pass(views=("a", "b"), encoder="ema"),
              "masked": replace(A_CLIP.passes["masked"], scores_from="scored", **changes)}
    return replace(A_CLIP, passes=passes, objectives={"contrastive": A_CLIP.objectives["contrastive"]})


def test_scores_come_from_the_same_view_where_there_is_one() -> None:
    assert resolved(two_scored_views()).passes["scored"].gives_scores


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (replace(CLIP, views="one_crops"), r"unknown view pipeline 'one_crops': did you mean 'one_crop'\?"),
        (replace(CLIP, view_options={"scal": 1}), "views 'one_crop': unknown option 'scal': did you mean 'scale'"),
        (with_pass(CLIP, "full", views=("b",)), "pass 'full': unknown view 'b'; there are: a"),
        (with_pass(A_CLIP, "masked", views=("a", "contex")), r"did you mean 'context'\? There are: a, b, context"),
        (with_pass(RECIPES["flip"], "masked", masking="unifrom"),
         rf"unknown masking 'unifrom': did you mean 'uniform'\? There are: {', '.join(sorted(MASKING))}"),
        (with_pass(RECIPES["flip"], "masked", masking_options={"size": 2}), "unknown option 'size'"),
        (with_pass(A_CLIP, "masked", masking_options={"blocksize": 2}), "did you mean 'block_size'"),
        (with_pass(A_CLIP, "masked", masking_options={"keep": "high"}), "keep should be 'highest', 'lowest'"),
        (with_pass(A_CLIP, "masked", masking_options={"block_size": 1.5}), "block_size should be a valid integer"),
        (with_pass(RECIPES["flip"], "masked", masking="none"), r"mask_ratio must be 0, not 0\.5"),
        (with_pass(RECIPES["flip"], "masked", masking="attentive"), "set scores_from to the name of an earlier pass"),
        (two_scored_views(views=("a", "context")),
         "view 'context' cannot take scores from 'scored', which has several other views: a, b"),
        (with_pass(A_CLIP, "context", masking="uniform", mask_ratio=0.5), "pass 'context': others take scores from it"),
        (replace(CLIP, objectives={"contrast": ObjectiveConfig(reads=("full",))}),
         rf"unknown objective 'contrast': did you mean 'contrastive'\? There are: {', '.join(sorted(OBJECTIVES))}"),
    ],
    ids=lambda value: None if isinstance(value, Recipe) else value[:30],
)
def test_wiring_errors_say_what_exists(recipe: Recipe, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(recipe)


def test_the_options_of_another_masking_are_refused() -> None:
    changes = {"passes.masked.masking": "uniform"}
    with pytest.raises(ConfigError, match="pass 'masked', masking 'uniform': unknown option 'keep'"):
        resolved(override(A_CLIP, changes))
    strategy = resolved(override(A_CLIP, {**changes, "passes.masked.masking_options": {"block_size": 2}})).passes[
        "masked"].strategy
    assert (type(strategy), strategy.block_size) == (UniformMasking, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperatur": 0.1}, "objective 'ntxent': unknown option 'temperatur': did you mean 'temperature'"),
     ({"temperature": "abc"}, "objective 'ntxent': temperature should be a valid number")],
)
def test_objective_options_are_checked(options: dict[str, Any], message: str) -> None:
    ntxent = ObjectiveConfig(reads=("masked",), options=options)
    plan = resolved(replace(A_CLIP, objectives={"ntxent": ntxent}))
    with pytest.raises(ConfigError, match=message):
        build_objective("ntxent", plan)


def test_no_text_without_an_objective_that_reads_it() -> None:
    objectives = {name: o for name, o in A_CLIP.objectives.items() if name != "contrastive"}
    plan = resolved(replace(A_CLIP, objectives=objectives))
    assert not plan.uses_text
    assert plan.macs() == resolved("a-clip").macs() - 3 * text_macs(VIT_B_16)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        (TextPass(reduction_options={"num_keep": 3}), {}, "reduction 'none' takes no options"),
        (TextPass(reduction="blok", reduction_options={"num_keep": 3}), {}, "did you mean 'block'"),
        (TextPass(reduction="block", reduction_options={"kept": 3}), {}, "reduction 'block': unknown option 'kept'"),
        (TextPass(reduction="block"), {}, "reduction 'block' needs the option 'num_keep'"),
        (TextPass(reduction="block", reduction_options={"num_keep": 3}), {"text_cut": False}, "causal, EOT-pooled"),
        (TextPass(mask_ratio=0.2), {"text_cut": False}, "causal, EOT-pooled"),
    ],
)
def test_refuses_text_passes_that_cannot_run(text: TextPass, shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(replace(CLIP, texts={"captions": text}), **shape)


@pytest.mark.parametrize(("name", "objective"), [("clip", "contrastive"), ("siglip", "sigmoid")])
def test_no_contrast_with_captions_whose_words_are_hidden(name: str, objective: str) -> None:
    plan = resolved(replace(RECIPES[name], texts={"captions": TextPass(mask_ratio=0.2)}))
    with pytest.raises(ConfigError, match="no feature of the caption"):
        build_objective(objective, plan)


def test_reduced_text_costs_less() -> None:
    reduced = TextPass(reduction="truncate", reduction_options={"num_keep": 6})
    plan = resolved(replace(CLIP, texts={"captions": reduced}))
    assert plan.macs() == pytest.approx(resolved("clip").macs() - 3 * (text_macs(VIT_B_16) - text_macs(VIT_B_16, 8)))
    assert plan.macs(5.0) == pytest.approx(resolved("clip").macs(5.0))
    texts = {"captions": TextPass(), "hidden": replace(reduced, mask_ratio=0.2)}
    assert resolved(replace(RECIPES["maskclip-text"], texts=texts)).macs() < (
        resolved("maskclip-text").macs() - 3 * text_macs(VIT_B_16) * 0.8)


@pytest.mark.parametrize(
    ("name", "pixels", "patches"), [("clip", False, False), ("mae", True, True), ("maskclip", False, True)]
)
def test_only_what_is_read_is_kept(name: str, pixels: bool, patches: bool) -> None:
    passes = resolved(name).passes.values()
    assert any(p.gives_pixels for p in passes) == pixels
    assert any(p.gives_patches for p in passes) == patches


@pytest.mark.usefixtures("without_type_checks")
def test_a_users_own_strategy_and_objective_are_resolved_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(UniformMasking):
        def __init__(self, mask_ratio: float = 0.5, block_size: int = 1, strength: float = 1.0) -> None:
            super().__init__(mask_ratio, block_size)
            self.strength = strength

    class Zero(OBJECTIVES["contrastive"]):  # type: ignore[misc]
        pass

    monkeypatch.setitem(MASKING, "mine", Mine)
    monkeypatch.setitem(OBJECTIVES, "zero", Zero)
    recipe = replace(with_pass(RECIPES["flip"], "masked", masking="mine", masking_options={"strength": 2}),
                     objectives={"zero": RECIPES["flip"].objectives["contrastive"]})
    plan = resolved(recipe)
    assert plan.passes["masked"].strategy.strength == 2.0
    assert isinstance(build_objective("zero", plan), Zero)
    with pytest.raises(ConfigError, match="strength should be a valid number"):
        resolved(override(recipe, {"passes.masked.masking_options.strength": "strong"}))
    monkeypatch.setattr(Mine, "__init__", lambda self, strength=1.0: None)
    with pytest.raises(ConfigError, match=r"Mine.__init__ does not take 'mask_ratio': add it, and pass it on to super"):
        resolved(recipe)
