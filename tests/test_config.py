"""Recipes as data: what is refused, the way through JSON, and assignments from the command line."""

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest

from aclip.config import (
    EmaMomentum,
    ObjectiveConfig,
    Optimization,
    Pass,
    Recipe,
    from_dict,
    override,
    to_dict,
)
from aclip.errors import ConfigError, unknown_name
from aclip.recipes import RECIPES

A_CLIP = RECIPES["a-clip"]


def recipe(**changes: Any) -> Recipe:
    fields = {
        "name": "mine",
        "title": "",
        "paper": "",
        "views": "one_crop",
        "passes": (Pass("full", ("a",)),),
        "objectives": (ObjectiveConfig("contrastive", ("full", "captions")),),
    }
    return Recipe(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 1.0}, "0 <= ratio < 1, not 1.0"),
        ({"mask_ratio": -0.1}, "0 <= ratio < 1, not -0.1"),
        ({"views": ()}, "encodes no view"),
        ({"resolution": 0.0}, "resolution must be positive"),
    ],
)
def test_pass_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(Pass("full", ("a",)), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": (Pass("full", ("a",)), Pass("full", ("a",)))}, "two passes are called 'full'"),
        (
            {"passes": (Pass("full", ("a",), scores_from="later"), Pass("later", ("a",)))},
            "an earlier pass; unknown pass 'later': There are: none",
        ),
        ({"passes": (Pass("full", ("a",), scores_from="full"),)}, "unknown pass 'full'"),
        ({"passes": (Pass("full", ("a",), encoder="ema"),)}, "needs an ema_momentum"),
        ({"objectives": ()}, "has no objective"),
        (
            {"objectives": (ObjectiveConfig("contrastive", ("full", "captions")),) * 2},
            "two objectives are called 'contrastive'",
        ),
        (
            {"objectives": (ObjectiveConfig("contrastive", ("ful", "captions")),)},
            "unknown pass 'ful': did you mean 'full'. There are: captions, full",
        ),
    ],
)
def test_recipe_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**changes)


def test_uses_ema() -> None:
    assert A_CLIP.uses_ema
    assert not recipe(ema_momentum=EmaMomentum()).uses_ema


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    text = json.dumps(to_dict(RECIPES[name]))
    assert from_dict(Recipe, json.loads(text)) == RECIPES[name]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1.0}, "unknown field 'learning_rate'"),
        ({"lrr": 1.0}, "did you mean 'lr'"),
        ({"lr": "fast"}, r"Optimization\.lr takes float, not 'fast'"),
        ({"lr": True}, r"Optimization\.lr takes float, not True"),
        ({"betas": [0.9]}, r"Optimization\.betas takes 2 values, not 1"),
        ({"betas": [0.9, "x"]}, r"Optimization\.betas takes float"),
    ],
)
def test_from_dict_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Optimization, values)


def test_from_dict_names_a_missing_field_and_the_path_to_a_wrong_one() -> None:
    with pytest.raises(ConfigError, match="missing 1 required positional argument: 'views'"):
        from_dict(Pass, {"name": "full"})
    values = to_dict(A_CLIP)
    values["passes"][0]["encoder"] = "emma"
    with pytest.raises(ConfigError, match=r"Recipe\.passes\.encoder 'emma': did you mean 'ema'"):
        from_dict(Recipe, values)


def test_integers_become_floats_and_lists_tuples() -> None:
    built = from_dict(Optimization, {"lr": 1, "betas": [0, 0.5]})
    assert built == Optimization(lr=1.0, betas=(0.0, 0.5))
    assert isinstance(built.lr, float)
    assert from_dict(
        Pass, {"name": "p", "views": ["a"], "masking_options": {"pair": [0, 1]}}
    ).masking_options == {"pair": (0, 1)}


@pytest.mark.parametrize(
    ("assignment", "read", "expected"),
    [
        ("optimization.lr=0.001", lambda r: r.optimization.lr, 0.001),
        ("optimization.lr=1", lambda r: r.optimization.lr, 1.0),
        ("optimization.betas=[0.9, 0.95]", lambda r: r.optimization.betas, (0.9, 0.95)),
        ("passes.masked.mask_ratio=0.75", lambda r: r.passes[1].mask_ratio, 0.75),
        ('passes.masked.views=["a"]', lambda r: r.passes[1].views, ("a",)),
        (
            "passes.masked.masking_options.keep=lowest",
            lambda r: r.passes[1].masking_options["keep"],
            "lowest",
        ),
        (
            "passes.masked.masking_options.new=[1, 2]",
            lambda r: r.passes[1].masking_options.get("new"),
            (1, 2),
        ),
        ("objectives.byol.weight=0.5", lambda r: r.objectives[2].weight, 0.5),
        ("ema_momentum.end=0.996", lambda r: r.ema_momentum.end, 0.996),
        ("title=a = b", lambda r: r.title, "a = b"),
    ],
)
def test_override_reaches(assignment: str, read: Any, expected: Any) -> None:
    changed = override(A_CLIP, [assignment])
    assert read(changed) == expected
    assert read(A_CLIP) != expected
    assert override(changed, [assignment]) == changed


def test_override_changes_one_thing_and_the_last_assignment_wins() -> None:
    changed = override(A_CLIP, ["passes.masked.mask_ratio=0.7", "passes.masked.mask_ratio=0.9"])
    assert changed == replace(A_CLIP, passes=(A_CLIP.passes[0], replace(A_CLIP.passes[1], mask_ratio=0.9)))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimization.lr", "write FIELD=VALUE"),
        ("optimisation.lr=1", "unknown field 'optimisation': did you mean 'optimization'"),
        (
            "passes.maskd.mask_ratio=0.5",
            "unknown name 'maskd': did you mean 'masked'. There are: context, masked",
        ),
        ("passes.masked=1", "name one of its fields"),
        ("passes.masked.mask_ratio=1.5", "0 <= ratio < 1"),
        ("passes.masked.mask_ratio=half", r"takes float, not 'half'"),
        ("passes.masked.masking_options.keep.x=1", "one level deep"),
        ("optimization.lr.x=1", "nothing below 'float' to reach 'x'"),
        ("passes.masked.scores_from=nothing", "unknown pass 'nothing'"),
        ("passes.masked.encoder=teacher", "There are: ema, online"),
    ],
)
def test_override_refuses(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(A_CLIP, [assignment])


@dataclass(frozen=True)
class Choices:
    size: int | None = None
    count: int = 1


def test_optional_values_take_null_and_integers_no_fractions() -> None:
    assert override(Choices(size=3), ["size=null"]) == Choices()
    for assignment in ("size=1.5", "count=1.5", "count=true", "count=null"):
        with pytest.raises(ConfigError, match="takes int"):
            override(Choices(), [assignment])


def test_unknown_name_says_what_there_is() -> None:
    assert unknown_name("recipe", "aclip", ["clip", "a-clip"]) == (
        "unknown recipe 'aclip': did you mean 'a-clip'? There are: a-clip, clip"
    )
    assert unknown_name("recipe", "zzz", []) == "unknown recipe 'zzz': There are: none"
