"""The methods as data, each a `Recipe` of a few lines, and the configuration of a run from a recipe's name.

To add one: build a `Recipe` and add it to the table, here or from a script (`aclip.RECIPES["mine"] = ...`).
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from aclip.config import Recipe, RunConfig, override
from aclip.errors import ConfigError, unknown_name
from aclip.recipes.a_clip import A_CLIP_RECIPES
from aclip.recipes.clip import CLIP_RECIPES
from aclip.recipes.frozen import FROZEN_RECIPES
from aclip.recipes.images import IMAGE_RECIPES

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (*CLIP_RECIPES, *FROZEN_RECIPES, *A_CLIP_RECIPES, *IMAGE_RECIPES)}
"""Recipes by name; add your own.

Example:
    >>> aclip.RECIPES["flip"].passes["masked"].mask_ratio
    0.5
"""


def default_recipe(model: str) -> str:
    """Return the recipe's name for a model, by its name alone: finetune if it has weights, else a-clip-muon."""
    return "finetune" if ":" in model or Path(model).exists() else "a-clip-muon"


def find_recipe(recipe: str | Recipe, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe by its name in `RECIPES`, or a `Recipe` as it is, with `changes`: path -> value.

    Raises:
        ConfigError: no recipe has this name, or no field this path.
    """
    if isinstance(recipe, str) and recipe not in RECIPES:
        raise ConfigError(unknown_name("recipe", recipe, RECIPES))
    found = RECIPES[recipe] if isinstance(recipe, str) else recipe
    return override(found, {path.removeprefix("recipe."): value for path, value in (changes or {}).items()})


def configure(
    *,
    base: RunConfig | None = None,
    recipe: str | Recipe | None = None,
    model: str | None = None,
    output: str | None = None,
    optimizer: str | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    grad_clip: float | None = None,
    layer_decay: float | None = None,
    mask_ratio: float | None = None,
    freeze: Sequence[str] | str = (),
    changes: Mapping[str, Any] | None = None,
    **settings: Any,
) -> RunConfig:
    """Return the configuration of a run.

    Args:
        base: what is not given keeps its value from here; None: the defaults of `RunConfig`.
        recipe: the method, by name or as a `Recipe` (default: a-clip-muon, or finetune if the model has weights).
        model: see `RunConfig` (default: vit-tiny).
        output: the run's folder (default: runs/RECIPE-MODEL).
        optimizer, lr, weight_decay, grad_clip, layer_decay: replace those of the recipe's optimization.
        mask_ratio: replaces the fraction of patches removed in every masked pass.
        freeze: parameters that are not trained, besides the recipe's.
        changes: path -> value, any other field, e.g. `{"recipe.passes.masked.mask_ratio": 0.75}`.
        settings: further fields of `RunConfig`; `data` is required.

    Raises:
        ConfigError: a field that does not exist, or a wrong value.

    Example:
        >>> config = aclip.configure(recipe="flip", model="vit-micro", data="pairs.csv", mask_ratio=0.6)
        >>> config.recipe.passes["masked"].mask_ratio
        0.6
        >>> run = aclip.train(config, output="runs/sixty", epochs=1)
    """
    known = [*inspect.signature(configure).parameters, *(field.name for field in fields(RunConfig))]
    for name in settings:
        if name not in known:
            raise ConfigError(unknown_name("setting", name, {*known} - {"base", "settings"}))
    if base is not None and recipe in (None, base.recipe.name):
        recipe = base.recipe  # with its changes
    model = model or (base.model if base else "vit-tiny")
    chosen = find_recipe(recipe or default_recipe(model))
    given = {"optimizer": optimizer, "lr": lr, "weight_decay": weight_decay, "grad_clip": grad_clip,
             "layer_decay": layer_decay}
    optimization: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    freeze = (freeze,) if isinstance(freeze, str) else freeze
    passes = chosen.passes
    if mask_ratio is not None:
        if all(p.masking == "none" for p in passes.values()):
            raise ConfigError(f"mask_ratio has no effect: recipe '{chosen.name}' masks nothing")
        passes = {name: p if p.masking == "none" else replace(p, mask_ratio=mask_ratio) for name, p in passes.items()}
    chosen = replace(chosen, passes=passes, optimization=replace(chosen.optimization, **optimization),
                     freeze=tuple(dict.fromkeys((*chosen.freeze, *freeze))))
    if base is not None:
        return override(replace(base, recipe=chosen, model=model, output=output or base.output, **settings),
                        changes or {})
    if not settings.get("data"):
        raise ConfigError("data is missing: name a source of image-text pairs, or get one with `aclip data fetch "
                          "emoji` and use emoji:train")
    folder = output or f"runs/{chosen.name}-{model.replace('/', '-')}".replace(":", "-")
    return override(RunConfig(recipe=chosen, model=model, output=folder, **settings), changes or {})


__all__ = ["RECIPES", "configure", "default_recipe", "find_recipe"]
