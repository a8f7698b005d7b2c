"""A recipe resolved against a model: image sizes, grids, patches kept, tokens, arithmetic.

`Method` executes exactly this plan, and `aclip recipes show` prints it, so that what is declared is what
is run.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aclip.config import ObjectiveConfig, Pass, Recipe
from aclip.data.views import VIEWS, ViewPipeline
from aclip.errors import ConfigError, unknown_name
from aclip.masking import MASKING, MaskingStrategy, fitting_block_size
from aclip.objectives import OBJECTIVES, Objective
from aclip.structs import TowerShape


@dataclass(frozen=True)
class PassPlan:
    """One pass with every number it needs.

    Attributes:
        spec: the recipe's pass.
        strategy: its masking strategy, built.
        image_size: (height, width) in pixels. grid_size: patches (down, across).
        num_keep: patches per view that go through the blocks (K).
        num_tokens: K plus the prefix tokens.
        gives_scores: whether a later pass reads this pass's attention scores.
    """

    spec: Pass
    strategy: MaskingStrategy
    image_size: tuple[int, int]
    grid_size: tuple[int, int]
    num_keep: int
    num_tokens: int
    gives_scores: bool

    @property
    def num_patches(self) -> int:
        """N, before anything is removed."""
        return self.grid_size[0] * self.grid_size[1]


@dataclass(frozen=True)
class Plan:
    """A recipe on a model.

    Attributes:
        recipe, shape: what was resolved.
        pipeline: the view pipeline, built.
        passes: in order.
        view_sizes: view name -> (height, width) in which the loader delivers it.
        uses_text: whether any objective reads text.
        notes: sentences about what was adapted, to be said aloud.
    """

    recipe: Recipe
    shape: TowerShape
    pipeline: ViewPipeline
    passes: tuple[PassPlan, ...]
    view_sizes: Mapping[str, tuple[int, int]]
    uses_text: bool
    notes: tuple[str, ...]

    def macs(self, text_tokens: float | None = None) -> float:
        """Return multiply-accumulates of the towers per pair and training step.

        A trained module costs three times its forward pass, the EMA encoder once; heads and losses are
        left out (under 1 % at ViT-B/16).

        Args:
            text_tokens: length of the text as encoded; None is the full context.
        """
        shape = self.shape
        total = 3.0 * text_macs(shape, text_tokens) if self.uses_text else 0.0
        for p in self.passes:
            passes = 3.0 if p.spec.encoder == "online" else 1.0
            total += passes * len(p.spec.views) * image_macs(shape, p.num_keep)
        return total

    def relative_cost(self, text_tokens: float | None = None) -> float:
        """Return `macs` over those of CLIP with one full view and the same text handling."""
        clip = 3.0 * (image_macs(self.shape, math.prod(self.shape.grid_size))
                      + text_macs(self.shape, text_tokens))
        return self.macs(text_tokens) / clip


def resolve(recipe: Recipe, shape: TowerShape) -> Plan:
    """Resolve `recipe` for a model of this shape.

    Raises:
        ConfigError: an unknown masking, view, objective or option, each with what exists instead.
    """
    pipeline = build_pipeline(recipe)
    notes: list[str] = []
    passes = []
    for p in recipe.passes:
        for view in p.views:
            if view not in pipeline.names:
                raise ConfigError(f"recipe '{recipe.name}', pass '{p.name}': "
                                  f"{unknown_name('view', view, pipeline.names)}")
        strategy = build_strategy(p)
        if strategy.needs_scores and p.scores_from is None:
            raise ConfigError(f"recipe '{recipe.name}', pass '{p.name}': masking '{p.masking}' ranks patches, "
                              "so the pass needs scores_from, the name of an earlier pass")
        image_size = tuple(
            max(1, math.floor(side * p.resolution / patch + 0.5)) * patch
            for side, patch in zip(shape.image_size, shape.patch_size, strict=True)
        )
        grid = image_size[0] // shape.patch_size[0], image_size[1] // shape.patch_size[1]
        if fitting_block_size(strategy.block_size, grid) != strategy.block_size:
            notes.append(f"pass '{p.name}': blocks of {strategy.block_size} x {strategy.block_size} do not tile "
                         f"the {grid[0]} x {grid[1]} grid, single patches are chosen")
        keep = strategy.num_keep(grid)
        passes.append(PassPlan(
            spec=p, strategy=strategy, image_size=(image_size[0], image_size[1]), grid_size=grid,
            num_keep=keep, num_tokens=keep + shape.num_prefix_tokens,
            gives_scores=any(other.scores_from == p.name for other in recipe.passes),
        ))
    _check_score_sources(recipe, passes)
    uses_text = any(objective_class(o).needs_text for o in recipe.objectives)
    if uses_text and not shape.text_cut:
        notes.append("text runs at full length: this tower is not causal and EOT-pooled")
    return Plan(recipe, shape, pipeline, tuple(passes), _view_sizes(passes), uses_text, tuple(notes))


def build_pipeline(recipe: Recipe) -> ViewPipeline:
    """Return the recipe's view pipeline."""
    if recipe.views not in VIEWS:
        raise ConfigError(f"recipe '{recipe.name}': {unknown_name('view pipeline', recipe.views, VIEWS)}")
    pipeline: ViewPipeline = _build(VIEWS[recipe.views], {}, recipe.view_options, f"views '{recipe.views}'")
    return pipeline


def build_strategy(p: Pass) -> MaskingStrategy:
    """Return the pass's masking strategy."""
    if p.masking not in MASKING:
        raise ConfigError(f"pass '{p.name}': {unknown_name('masking', p.masking, MASKING)}")
    strategy: MaskingStrategy = _build(
        MASKING[p.masking], {"mask_ratio": p.mask_ratio}, p.masking_options, f"masking '{p.masking}'")
    return strategy


def objective_class(config: ObjectiveConfig) -> type[Objective]:
    """Return the class of an objective."""
    if config.name not in OBJECTIVES:
        raise ConfigError(unknown_name("objective", config.name, OBJECTIVES))
    return OBJECTIVES[config.name]


def build_objective(config: ObjectiveConfig, plan: Plan) -> Objective:
    """Return an objective with fresh heads for this plan."""
    specs = {p.spec.name: p.spec for p in plan.passes}
    given = {"reads": [specs[name] for name in config.reads], "shape": plan.shape}
    objective: Objective = _build(objective_class(config), given, config.options, f"objective '{config.name}'")
    return objective


def image_macs(shape: TowerShape, patches: int) -> float:
    """Return multiply-accumulates of one image's forward pass with this many patches kept.

    A block on L tokens of width d with an MLP of width m: L (4 d^2 + 2 d m) + 2 L^2 d.
    """
    pixels = 3 * shape.patch_size[0] * shape.patch_size[1]
    tokens = patches + shape.num_prefix_tokens
    return patches * pixels * shape.width + shape.layers * _block_macs(tokens, shape.width, shape.mlp_width)


def text_macs(shape: TowerShape, tokens: float | None = None) -> float:
    """Return multiply-accumulates of one caption's forward pass; None is the full context."""
    length = shape.context_length if tokens is None or not shape.text_cut else tokens
    return shape.text_layers * _block_macs(length, shape.text_width, shape.text_mlp_width)


def _block_macs(tokens: float, width: int, mlp_width: int) -> float:
    return tokens * (4.0 * width**2 + 2.0 * width * mlp_width) + 2.0 * tokens**2 * width


def _build(cls: Any, given: Mapping[str, Any], options: Mapping[str, Any], what: str) -> Any:
    """Return `cls(**given, **options)`; `options` are the user's, and mistakes in them are explained."""
    known = [name for name in inspect.signature(cls).parameters if name not in given]
    for name in options:
        if name not in known:
            raise ConfigError(f"{what} does not take these options: {unknown_name('option', name, known)}")
    try:
        return cls(**given, **options)
    except TypeError as error:
        raise ConfigError(f"{what} does not take these options: {str(error).split('__init__() ')[-1]}") from error


def _view_sizes(passes: list[PassPlan]) -> dict[str, tuple[int, int]]:
    sizes: dict[str, tuple[int, int]] = {}
    for p in passes:
        for view in p.spec.views:
            sizes[view] = max(sizes.get(view, p.image_size), p.image_size)
    return sizes


def _check_score_sources(recipe: Recipe, passes: list[PassPlan]) -> None:
    """A view takes its scores from the same view of a whole source pass, or from that pass's only view."""
    for plan in passes:
        if plan.gives_scores and plan.num_keep < plan.num_patches:
            raise ConfigError(f"recipe '{recipe.name}', pass '{plan.spec.name}': others take scores from it, so it "
                              "must see every patch: leave its masking at 'none'")
    sources = {p.name: p for p in recipe.passes}
    for p in recipe.passes:
        if p.scores_from is not None:
            source = sources[p.scores_from]
            for view in p.views:
                if view not in source.views and len(source.views) != 1:
                    raise ConfigError(f"recipe '{recipe.name}', pass '{p.name}': view '{view}' cannot take scores "
                                      f"from '{source.name}', which has several other views: "
                                      f"{', '.join(source.views)}")
