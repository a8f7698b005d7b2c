"""Recipes and runs as data: what is refused, JSON, changes by path, options of strategies and objectives."""

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from aclip.config import (
    EmaMomentum,
    ObjectiveConfig,
    Optimization,
    Pass,
    Recipe,
    ResolutionPhase,
    RunConfig,
    from_dict,
    override,
    to_dict,
)
from aclip.errors import ConfigError, unknown_name
from aclip.plan import build
from aclip.recipes import RECIPES, configure

A_CLIP = RECIPES["a-clip"]


def recipe(**changes: Any) -> Recipe:
    settings = {"name": "mine", "title": "", "paper": "", "views": "one_crop", "passes": {"full": Pass(("a",))},
                "objectives": {"contrastive": ObjectiveConfig(("full", "captions"))}}
    return Recipe(**(settings | changes))


def run(**changes: Any) -> RunConfig:
    return RunConfig(**({"recipe": A_CLIP, "model": "vit-tiny", "data": "pairs.csv", "output": "runs/first"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio should be less than 1, not 1.0"),
        ({"mask_ratio": -0.1}, "mask_ratio should be greater than or equal to 0"),
        ({"mask_ratio": float("nan")}, "mask_ratio should be a finite number, not nan"),
        ({"views": ()}, "views .* at least 1 item"),
        ({"resolution": 0.0}, "resolution should be greater than 0"),
        ({"encoder": "emma"}, "encoder should be 'online', 'ema' or 'frozen', not 'emma'"),
    ],
)
def test_pass_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(Pass(("a",)), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": {"full": Pass(("a",), scores_from="later"), "later": Pass(("a",))}},
         "scores_from must name an earlier pass; unknown pass 'later'; there are: none"),
        ({"passes": {"full": Pass(("a",), scores_from="full")}}, "unknown pass 'full'"),
        ({"passes": {"full": Pass(("a",), encoder="ema")}}, "needs an ema_momentum"),
        ({"passes": {"captions": Pass(("a",))}}, "a pass and a text pass are both called 'captions'"),
        ({"objectives": {}}, "objectives .* at least 1 item"),
        ({"objectives": {"contrastive": ObjectiveConfig(("ful", "captions"))}},
         "unknown pass 'ful': did you mean 'full'. There are: captions, full"),
        ({"freze": ()}, "unknown field of Recipe 'freze': did you mean 'freeze'"),
    ],
)
def test_recipe_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_every": 0}, "log_every should be greater than or equal to 1, not 0"),
        ({"batch_size": 1}, "batch_size should be greater than or equal to 2, not 1"),
        ({"workers": -1}, "workers should be greater than or equal to 0, not -1"),
        ({"epochs": float("inf")}, "epochs should be a finite number"),
        ({"unmasked_tuning": 1.5}, "unmasked_tuning should be less than or equal to 1"),
        ({"unmasked_lr": 0.1}, "unmasked_lr has no effect without unmasked_tuning"),
        ({"resolution_schedule": ("0.6:0.5",) * 2}, "add up to at most 1, not 1.2"),
        ({"resolution_schedule": ("0.6",)}, "resolution_schedule.0.resolution should be a valid number"),
        ({"data": ()}, "data is missing"),
        ({"image_size": "19ax256"}, "image_size should be a valid integer"),
    ],
)
def test_run_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**changes)


def test_words_of_the_command_line_become_values() -> None:
    config = run(data="a.csv", image_size="192x256", resolution_schedule=("0.5:0.25",))
    assert config.data == ("a.csv",)
    assert config.image_size == (192, 256)
    assert config.resolution_schedule == (ResolutionPhase(0.5, 0.25),)
    assert run(image_size="224").image_size == 224


def test_uses_ema() -> None:
    assert A_CLIP.uses_ema
    assert not recipe(ema_momentum=EmaMomentum()).uses_ema


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(RECIPES[name])))) == RECIPES[name]


def test_a_run_survives_json() -> None:
    config = run(image_size=(192, 256), resolution_schedule=("0.5:0.5",), validation=("a.csv", "val=b.csv"))
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1.0}, "unknown field of Optimization 'learning_rate'"),
        ({"lrr": 1.0}, "did you mean 'lr'"),
        ({"lr": "fast"}, "lr should be a valid number, .*not 'fast'"),
        ({"betas": [0.9]}, "betas.1 is missing"),
        ({"betas": [0.9, "x"]}, r"betas\.1 should be a valid number"),
    ],
)
def test_from_dict_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Optimization, values)


def test_from_dict_names_the_file_and_the_path_to_a_wrong_field() -> None:
    values = to_dict(A_CLIP)
    values["passes"]["context"]["encoder"] = "emma"
    with pytest.raises(ConfigError, match=r"passes\.context\.encoder should be 'online', 'ema' or 'frozen'"):
        from_dict(Recipe, values, "config.json")
    values = to_dict(A_CLIP)
    values["passes"]["context"]["encodr"] = "ema"
    with pytest.raises(ConfigError, match=r"unknown field of Pass 'encodr': did you mean 'encoder'"):
        from_dict(Recipe, values)
    with pytest.raises(ConfigError, match="views is missing"):
        from_dict(Pass, {})


@pytest.mark.parametrize(
    ("path", "value", "read", "expected"),
    [
        ("optimization.lr", "0.001", lambda r: r.optimization.lr, 0.001),
        ("optimization.betas", "[0.9, 0.95]", lambda r: r.optimization.betas, (0.9, 0.95)),
        ("passes.masked.mask-ratio", "0.75", lambda r: r.passes["masked"].mask_ratio, 0.75),
        ("passes.masked.views", '["a"]', lambda r: r.passes["masked"].views, ("a",)),
        ("passes.masked.masking_options.keep", "lowest", lambda r: r.passes["masked"].masking_options["keep"],
         "lowest"),
        ("passes.masked.masking-options.new", "[1, 2]", lambda r: r.passes["masked"].masking_options.get("new"),
         (1, 2)),
        ("objectives.byol.weight", 0.5, lambda r: r.objectives["byol"].weight, 0.5),
        ("ema_momentum.end", "0.996", lambda r: r.ema_momentum.end, 0.996),
        ("title", "a = b", lambda r: r.title, "a = b"),
    ],
)
def test_override_reaches(path: str, value: Any, read: Any, expected: Any) -> None:
    changed = override(A_CLIP, {path: value})
    assert read(changed) == expected
    assert read(A_CLIP) != expected


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("passes.masked.mask_rato", 0.5, "cannot set 'passes.masked.mask_rato': unknown field .*did you mean 'mask_ra"),
        ("passes.mask.mask_ratio", 0.5, "did you mean 'masked'"),
        ("passes.masked.mask_ratio", "half", r"passes\.masked\.mask_ratio should be a valid number"),
        ("title.x", 1, "nothing lies below 'title'"),
    ],
)
def test_override_refuses(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(A_CLIP, {path: value})


@dataclass
class Part:
    """Takes one argument that is not the user's, and three that are."""

    given: str
    sides: tuple[int, int]
    temperature: float = 0.1
    kind: Literal["l1", "l2"] = "l1"


def test_options_are_validated_against_the_signature() -> None:
    part = build(Part, {"given": "x"}, {"sides": [1, 2], "temperature": "0.5"}, "part 'p'")
    assert part == Part("x", (1, 2), 0.5)
    for options, message in (
        ({"sides": (1, 2), "temprature": 1}, "part 'p': unknown option 'temprature': did you mean 'temperature'"),
        ({"sides": (1, 2), "temperature": "abc"}, "part 'p': temperature should be a valid number"),
        ({"sides": (1, 2), "temperature": float("nan")}, "temperature should be a finite number"),
        ({"sides": (1.5, 2)}, "part 'p': sides"),
        ({"sides": (1, 2), "kind": "l3"}, "kind should be 'l1' or 'l2'"),
        ({}, "part 'p' needs the option 'sides'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(Part, {"given": "x"}, options, "part 'p'")


def test_configure_folds_shorthands_into_the_recipe() -> None:
    config = configure(recipe="a-clip", data="a.csv", lr=1e-3, mask_ratio=0.75, freeze=("visual.*",), epochs=3)
    assert config.recipe.optimization.lr == 1e-3
    assert config.recipe.passes["masked"].mask_ratio == 0.75
    assert config.recipe.passes["context"].mask_ratio == 0.0
    assert config.recipe.freeze == ("patch_embedding", "visual.*")
    assert (config.output, config.epochs) == ("runs/a-clip-vit-tiny", 3)
    again = configure(base=config, freeze=("visual.*",), epochs=4)
    assert again.recipe == config.recipe
    assert again.epochs == 4
    for settings, message in (
        ({"recipe": "aclip", "data": "x"}, "unknown recipe 'aclip': did you mean 'a-clip'"),
        ({"recipe": "clip", "data": "x", "mask_ratio": 0.5}, "recipe 'clip' masks nothing"),
        ({"data": "x", "epoch": 1}, "unknown setting 'epoch': did you mean 'epochs'"),
        ({}, "data is missing: name a source of image-text pairs, or get one with `aclip data fetch emoji`"),
    ):
        with pytest.raises(ConfigError, match=message):
            configure(**settings)


def test_unknown_names_are_met_with_the_closest() -> None:
    assert unknown_name("recipe", "zzz", ["clip"]) == "unknown recipe 'zzz'; there are: clip"
    assert unknown_name("recipe", "clp", ["clip"]) == "unknown recipe 'clp': did you mean 'clip'? There are: clip"
