"""Recipes resolved against models: tokens, arithmetic, and wiring errors that say what exists."""

import importlib
import re
from dataclasses import replace
from typing import Any

import pytest

from aclip.config import EmaMomentum, ObjectiveConfig, Pass, Recipe, TextPass, override
from aclip.errors import ConfigError
from aclip.masking import MASKING
from aclip.masking.uniform import UniformMasking
from aclip.objectives import OBJECTIVES
from aclip.plan import Plan, build_objective, image_macs, resolve, text_macs
from aclip.recipes import RECIPES
from aclip.structs import TowerShape

VIT_B_16 = TowerShape(
    image_size=(224, 224),
    patch_size=(16, 16),
    width=768,
    layers=12,
    heads=12,
    mlp_width=3072,
    joint_dim=512,
    num_prefix_tokens=1,
    text_width=512,
    text_layers=12,
    text_mlp_width=2048,
    context_length=77,
    vocab_size=49408,
    text_cut=True,
)
FLIP_75 = replace(RECIPES["flip"], passes=tuple(replace(p, mask_ratio=0.75) for p in RECIPES["flip"].passes))


def resolved(recipe: str | Recipe, **shape: Any) -> Plan:
    return resolve(RECIPES[recipe] if isinstance(recipe, str) else recipe, replace(VIT_B_16, **shape))


@pytest.mark.parametrize(("patches", "gmacs"), [(196, 17.56), (98, 8.70), (49, 4.32)])
def test_image_arithmetic(patches: int, gmacs: float) -> None:
    assert image_macs(VIT_B_16, patches, patches + 1) == pytest.approx(
        gmacs * 1e9, rel=0.01
    )  # there every patch is embedded


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
    ids=str,
)
def test_cost_relative_to_clip(recipe: str | Recipe, padded: float, cut: float) -> None:
    plan = resolved(recipe)
    assert plan.relative_cost() == pytest.approx(padded, rel=0.03)
    assert plan.relative_cost(text_tokens=77) == plan.relative_cost()
    assert plan.relative_cost(text_tokens=14) == pytest.approx(cut, rel=0.03)


@pytest.mark.parametrize("name", ["clip", "flip", "a-clip", "a-clip-eff"])
def test_docstrings_state_the_cost(name: str) -> None:
    module = importlib.import_module(f"aclip.recipes.{name.replace('-', '_')}")
    assert module.__doc__ is not None
    stated = re.search(r"[Cc]ost (\d\.\d\d)", module.__doc__)
    assert stated is not None
    assert resolved(name).relative_cost() == pytest.approx(float(stated[1]), rel=0.03)


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
    ids=str,
)
def test_tokens(recipe: str | Recipe, tokens: dict[str, int]) -> None:
    plan = resolved(recipe)
    assert {p.spec.name: p.num_tokens for p in plan.passes} == tokens
    assert all(p.num_tokens == p.num_keep + 1 for p in plan.passes)
    assert [p.gives_scores for p in plan.passes] == ([True, False] if len(tokens) == 2 else [False])
    assert plan.uses_text
    assert plan.notes == ()


def test_prefix_tokens_are_never_removed() -> None:
    assert [p.num_tokens for p in resolved("a-clip", num_prefix_tokens=5).passes] == [201, 105]


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
    image: tuple[int, int],
    patch: tuple[int, int],
    resolution: float,
    size: tuple[int, int],
    grid: tuple[int, int],
) -> None:
    recipe = replace(
        RECIPES["a-clip"],
        passes=tuple(
            replace(p, resolution=resolution) if p.encoder == "ema" else p for p in RECIPES["a-clip"].passes
        ),
    )
    plan = resolved(recipe, image_size=image, patch_size=patch)
    assert (plan.passes[0].image_size, plan.passes[0].grid_size) == (size, grid)
    assert plan.passes[0].num_patches == grid[0] * grid[1]
    assert plan.view_sizes == {"context": size, "a": image, "b": image}


def test_a_view_shared_between_sizes_is_delivered_in_the_larger() -> None:
    recipe = replace(
        RECIPES["clip"],
        ema_momentum=EmaMomentum(),
        passes=(Pass("small", ("a",), encoder="ema", resolution=0.5), *RECIPES["clip"].passes),
    )
    assert resolved(recipe).view_sizes == {"a": (224, 224)}


def test_notes_say_what_was_adapted() -> None:
    odd = resolved("a-clip", image_size=(112, 112))
    assert odd.passes[1].num_keep == 25
    assert any("2 x 2 do not tile the 7 x 7 grid, single patches" in note for note in odd.notes)
    assert any("text runs at full length" in note for note in resolved("clip", text_cut=False).notes)


def test_a_mask_that_removes_nothing_is_noted() -> None:
    (note,) = resolve(RECIPES["a-clip"], VIT_B_16, 1 / 7).notes
    assert note == "pass 'masked': mask_ratio 0.5 removes nothing of the 2 x 2 grid in blocks of 2 x 2"
    (note,) = resolved(override(RECIPES["flip"], ["passes.masked.mask_ratio=0.001"])).notes
    assert note == "pass 'masked': mask_ratio 0.001 removes nothing of the 14 x 14 grid"
    assert resolved(override(RECIPES["flip"], ["passes.masked.mask_ratio=0"])).notes == ()  # as asked


@pytest.mark.parametrize(("name", "objective"), [
    ("mae", "reconstruction"), ("simmim", "reconstruction"), ("maskclip", "masked_distillation")])
def test_an_objective_that_asks_for_what_is_hidden_needs_something_hidden(name: str, objective: str) -> None:
    for ratio in (0, 0.001):
        with pytest.raises(ConfigError, match=f"objective '{objective}' asks for nothing but removed patches"):
            resolved(override(RECIPES[name], [f"passes.masked.mask_ratio={ratio}"]))
    with pytest.raises(ConfigError, match="pass 'masked' removes none of its 1 x 1 grid at mask_ratio 0"):
        resolve(RECIPES[name], VIT_B_16, 1 / 14)


def test_unmasked_steps_cost_what_a_ratio_of_0_does() -> None:
    for name in ("a-clip", "flip", "attentive-1x50"):
        assert resolved(name).unmasked().macs(14) == resolved(
            override(RECIPES[name], ["passes.masked.mask_ratio=0"])).macs(14)


def changed_pass(recipe: str, index: int, **changes: Any) -> Recipe:
    passes = list(RECIPES[recipe].passes)
    passes[index] = replace(passes[index], **changes)
    return replace(RECIPES[recipe], passes=tuple(passes))


def two_scored_views(**changes: Any) -> Recipe:
    """Return a recipe whose scores come from the full views a and b."""
    scored = Pass("scored", ("a", "b"), encoder="ema")
    masked = replace(RECIPES["a-clip"].passes[1], scores_from="scored", **changes)
    return replace(
        RECIPES["a-clip"], passes=(scored, masked), objectives=(ObjectiveConfig("contrastive", ("masked", "captions")),)
    )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            replace(RECIPES["clip"], views="one_crops"),
            "unknown view pipeline 'one_crops': did you mean 'one_crop'",
        ),
        (
            replace(RECIPES["clip"], view_options={"scal": 1}),
            "views 'one_crop' does not take these options: .*'scal'",
        ),
        (changed_pass("clip", 0, views=("b",)), "pass 'full': unknown view 'b': There are: a"),
        (
            changed_pass("a-clip", 1, views=("a", "contex")),
            "did you mean 'context'. There are: a, b, context",
        ),
        (
            changed_pass("flip", 0, masking="unifrom"),
            f"unknown masking 'unifrom': did you mean 'uniform'. There are: {', '.join(sorted(MASKING))}",
        ),
        (
            changed_pass("flip", 0, masking_options={"size": 2}),
            "masking 'uniform' does not take these options: .*'size'",
        ),
        (changed_pass("flip", 0, masking="none"), "mask_ratio must be 0, not 0.5"),
        (
            changed_pass("flip", 0, masking="attentive"),
            "so the pass needs scores_from, the name of an earlier pass",
        ),
        (
            two_scored_views(views=("a", "context")),
            "view 'context' cannot take scores from 'scored', which has several other views: a, b",
        ),
        (
            replace(RECIPES["clip"], objectives=(ObjectiveConfig("contrast", ("full",)),)),
            f"unknown objective 'contrast': did you mean 'contrastive'. There are: {', '.join(sorted(OBJECTIVES))}",
        ),
    ],
    ids=lambda value: None if isinstance(value, Recipe) else value[:30],
)
def test_wiring_errors_say_what_exists(recipe: Recipe, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(recipe)


def test_another_masking_with_the_options_of_the_first_is_refused_with_the_way_out() -> None:
    masking = "passes.masked.masking=uniform"
    with pytest.raises(ConfigError, match="unknown option 'keep'") as refused:
        resolved(override(RECIPES["a-clip"], [masking]))
    way_out = re.search(r"--set 'recipe\.(.*)'", str(refused.value))
    assert way_out is not None
    for assignments in ([masking, way_out[1]], [way_out[1], masking]):
        strategy = resolved(override(RECIPES["a-clip"], assignments)).passes[1].strategy
        assert (type(strategy), strategy.block_size) == (UniformMasking, 2)


def test_scores_come_from_the_same_view_where_there_is_one() -> None:
    assert resolved(two_scored_views()).passes[0].gives_scores


def test_objective_options_are_checked() -> None:
    plan = resolved("a-clip")
    config = ObjectiveConfig("contrastive", ("masked", "captions"), options={"temperatur": 0.1})
    with pytest.raises(
        ConfigError, match=r"objective 'contrastive' does not take these options: .*'temperatur'"
    ):
        build_objective(config, plan)


def test_no_text_without_an_objective_that_reads_it() -> None:
    recipe = replace(RECIPES["a-clip"], objectives=RECIPES["a-clip"].objectives[1:])
    plan = resolved(recipe)
    assert not plan.uses_text
    assert plan.macs() == resolved("a-clip").macs() - 3 * text_macs(VIT_B_16)


def test_scores_cannot_come_from_a_masked_pass() -> None:
    recipe = replace(RECIPES["a-clip"], passes=(
        Pass("context", ("context",), encoder="ema", masking="uniform", mask_ratio=0.5), RECIPES["a-clip"].passes[1]))
    with pytest.raises(ConfigError, match="context"):
        resolved(recipe)


def test_an_unknown_option_of_a_strategy_is_met_with_what_exists() -> None:
    masked = replace(RECIPES["a-clip"].passes[1], masking_options={"blocksize": 2})
    with pytest.raises(ConfigError, match="did you mean 'block_size'"):
        resolved(replace(RECIPES["a-clip"], passes=(RECIPES["a-clip"].passes[0], masked)))


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        (TextPass(reduction_options={"num_keep": 3}), {}, "reduction 'none' takes no options, not num_keep"),
        (TextPass(reduction="blok", reduction_options={"num_keep": 3}), {}, "did you mean 'block'"),
        (TextPass(reduction="block", reduction_options={"kept": 3}), {}, "does not take these options: .*'kept'"),
        (TextPass(reduction="block", reduction_options={"num_keep": 3}), {"text_cut": False}, "causal, EOT-pooled"),
        (TextPass(mask_ratio=0.2), {"text_cut": False}, "causal, EOT-pooled"),
    ],
)
def test_text_passes_that_cannot_be_are_refused(text: TextPass, shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(replace(RECIPES["clip"], texts=(text,)), **shape)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_no_contrast_with_captions_whose_words_are_hidden(name: str) -> None:
    plan = resolved(replace(RECIPES[name], texts=(TextPass(mask_ratio=0.2),)))
    with pytest.raises(ConfigError, match="no feature of the caption"):
        build_objective(plan.recipe.objectives[0], plan)


def test_reduced_text_costs_less() -> None:
    reduced = TextPass(reduction="truncate", reduction_options={"num_keep": 6})
    plan = resolved(replace(RECIPES["clip"], texts=(reduced,)))
    assert plan.macs() == pytest.approx(resolved("clip").macs() - 3 * (text_macs(VIT_B_16) - text_macs(VIT_B_16, 8)))
    assert plan.macs(5.0) == pytest.approx(resolved("clip").macs(5.0))
    masked = replace(RECIPES["maskclip-text"], texts=(TextPass(), replace(reduced, name="hidden", mask_ratio=0.2)))
    assert resolved(masked).macs() < resolved("maskclip-text").macs() - 3 * text_macs(VIT_B_16) * 0.8


def test_only_what_is_read_is_kept() -> None:
    for name, pixels, patches in (("clip", False, False), ("mae", True, True), ("maskclip", False, True)):
        plan = resolved(name)
        assert any(p.gives_pixels for p in plan.passes) == pixels
        assert any(p.gives_patches for p in plan.passes) == patches


def with_score_layers(name: str, layers: int) -> Recipe:
    return override(RECIPES[name], [f"passes.context.score_layers={layers}"])


def test_a_pass_stops_after_the_layers_that_its_scores_come_from_if_nothing_else_is_read() -> None:
    whole, plan = resolved("attentive-1x50"), resolved(with_score_layers("attentive-1x50", 3))
    assert plan.passes[0].scores_only
    saved = whole.macs() - plan.macs()
    # 12 blocks at 197 tokens become 2, and keys and one query row of a third
    expected = 10 * (image_macs(VIT_B_16, 0, 197) / 12) - 197 * (768**2 + 768)
    assert saved == pytest.approx(expected, rel=1e-6)
    # BYOL reads what a-clip's context pass is encoded to
    assert not resolved(with_score_layers("a-clip", 3)).passes[0].scores_only
    assert resolved(with_score_layers("a-clip", 3)).macs() == resolved("a-clip").macs()


def test_score_layers_have_to_be_there_and_asked_for() -> None:
    with pytest.raises(ConfigError, match="13 layers of a tower that has 12"):
        resolved(with_score_layers("a-clip", 13))
    with pytest.raises(ConfigError, match="no pass takes scores from it"):
        resolved(override(RECIPES["clip"], ["passes.full.score_layers=1"]))
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        with_score_layers("a-clip", 0)


def with_refresh(name: str, epochs: int, *changes: str) -> Recipe:
    return override(RECIPES[name], [f"passes.context.refresh={epochs}", *changes])


@pytest.mark.parametrize("encoder", ["ema", "online"])
def test_a_pass_that_only_scores_costs_its_forward_pass_over_the_epochs_that_it_serves(encoder: str) -> None:
    change = f"passes.context.encoder={encoder}"
    rest = resolved("attentive-1x50").macs() - image_macs(VIT_B_16, 196, 197)
    for epochs in (1, 4):
        plan = resolved(with_refresh("attentive-1x50", epochs, change))
        assert plan.macs() - rest == pytest.approx(image_macs(VIT_B_16, 196, 197) / epochs)
        assert [p.learns for p in plan.passes] == [False, True]
        assert plan.recipe.uses_ema == (encoder == "ema")
    unmasked = with_refresh("attentive-1x50", 4, change, "passes.masked.mask_ratio=0")
    assert resolved(unmasked).macs() == pytest.approx(resolved("clip-augmented").macs())
    assert not resolved(unmasked).runs(resolved(unmasked).passes[0])
    assert resolved(override(RECIPES["a-clip"], ["passes.masked.mask_ratio=0"])).macs() > 2 * resolved("clip").macs()


def test_scores_that_serve_for_epochs_are_those_of_whole_pictures_in_every_phase() -> None:
    recipe = with_refresh("attentive-3x33", 3, "view_options.context=released")
    for resolution in (1.0, 0.5):
        plan = resolve(recipe, VIT_B_16, resolution)
        assert [p.grid_size[0] for p in plan.passes] == [14, 14 * resolution]
        assert plan.pipeline.boxes(300, 500, seed=0, epoch=1, sample=2)["context"] == (0, 0, 300, 500)
        assert "scores serve for 3 epochs, so that view 'context' is the whole picture" in plan.notes[0]
    assert resolved("attentive-3x33").pipeline.boxes(300, 500, seed=0, epoch=1, sample=2)["context"] != (0, 0, 300, 500)


@pytest.mark.parametrize(("recipe", "message"), [
    (with_refresh("a-clip", 4), "refresh would save nothing, for it is run in every step for objective 'byol'"),
    (override(RECIPES["clip"], ["passes.full.refresh=2"]), "no pass takes scores from it"),
    (override(two_scored_views(), ["passes.scored.refresh=2"]), "need a view of the whole picture, which is 'context'"),
])
def test_scores_that_cannot_be_kept_are_refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(recipe)


def test_scores_serve_for_at_least_one_epoch() -> None:
    with pytest.raises(ConfigError, match="refresh counts the epochs for which scores serve, at least 1, not 0"):
        with_refresh("attentive-1x50", 0)
