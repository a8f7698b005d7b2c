"""A recipe resolved against a model: image sizes, grids, patches kept, tokens, arithmetic.

`Method` executes exactly this plan, and `aclip recipes show` prints it, so that what is declared is what
is run.
"""

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from aclip.config import ObjectiveConfig, Pass, Recipe, TextPass
from aclip.data.views import VIEWS, TwoCropsInContext, ViewPipeline
from aclip.errors import ConfigError, UnsupportedModelError, unknown_name
from aclip.masking import MASKING, MaskingStrategy, fitting_block_size
from aclip.masking.text_reduction import TEXT_REDUCTIONS, TextReduction
from aclip.models.vision import NOBODY_ASKS
from aclip.objectives import OBJECTIVES, Objective
from aclip.objectives.base import block_macs
from aclip.structs import TowerShape


@dataclass(frozen=True)
class PassPlan:
    """One pass with every number it needs.

    Attributes:
        spec: the recipe's pass.
        strategy: its masking strategy, built.
        image_size: (height, width) in pixels. grid_size: patches (down, across).
        num_keep: patches per view that go through the blocks (K).
        num_tokens: tokens of a view in the blocks: the prefix tokens and K, or N where the pass fills.
        gives_scores: whether a later pass reads this pass's attention scores.
        gives_patches, gives_pixels: whether an objective reads its patch tokens, its pixels.
        scores_only: whether nothing but its scores is read.
    """

    spec: Pass
    strategy: MaskingStrategy
    image_size: tuple[int, int]
    grid_size: tuple[int, int]
    num_keep: int
    num_tokens: int
    gives_scores: bool
    gives_patches: bool
    gives_pixels: bool
    scores_only: bool = False

    @property
    def num_patches(self) -> int:
        """N, before anything is removed."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def removes(self) -> bool:
        """Whether its mask hides any patch."""
        return self.num_keep < self.num_patches

    @property
    def learns(self) -> bool:
        """Whether a gradient goes through it."""
        return self.spec.encoder == "online" and not self.scores_only

    @property
    def stops_early(self) -> bool:
        """Whether its encoder stops where the scores are known."""
        return self.scores_only and self.spec.score_layers is not None


@dataclass(frozen=True)
class TextPlan:
    """One text pass with what its readers want of it.

    Attributes:
        spec: the recipe's text pass.
        reduction: its strategy, built, or None for whole captions.
        encoded: whether any reader wants more than the tokens themselves.
    """

    spec: TextPass
    reduction: TextReduction | None
    encoded: bool

    def length(self, text_tokens: float | None) -> float | None:
        """Return how many of `text_tokens` tokens are encoded (None: the full context), SOT and EOT included."""
        if self.reduction is None:
            return text_tokens
        kept = self.reduction.num_keep + 2.0
        return kept if text_tokens is None else min(kept, text_tokens)


@dataclass(frozen=True)
class Plan:
    """A recipe on a model.

    Attributes:
        recipe, shape: what was resolved.
        pipeline: the view pipeline, built.
        passes: in order. texts: the text passes that an objective reads, in order.
        view_sizes: view name -> (height, width) in which the loader delivers it.
        uses_text: whether captions are encoded.
        notes: sentences about what was adapted, to be said aloud.
    """

    recipe: Recipe
    shape: TowerShape
    pipeline: ViewPipeline
    passes: tuple[PassPlan, ...]
    texts: tuple[TextPlan, ...]
    view_sizes: Mapping[str, tuple[int, int]]
    uses_text: bool
    notes: tuple[str, ...]

    def runs(self, p: PassPlan, masked: bool = True) -> bool:
        """Return whether steps run a pass: not where nothing but its scores is read, and nothing is chosen by them.

        Args:
            p: one of `passes`.
            masked: whether anything is masked in these steps.
        """
        chooses = any(o.spec.scores_from == p.spec.name and o.removes for o in self.passes)
        return (masked and chooses) or not p.scores_only

    def unmasked(self) -> "Plan":
        """Return the plan of steps in which nothing is masked (unmasked tuning)."""
        passes = (replace(p, num_keep=p.num_patches, num_tokens=p.num_patches + self.shape.num_prefix_tokens)
                  for p in self.passes)
        return replace(self, passes=tuple(passes), texts=tuple(replace(text, reduction=None) for text in self.texts))

    @property
    def scoring_share(self) -> float:
        """Share of the steps in which scores are computed: an n-th where they serve for n epochs."""
        return 1.0 / min((p.spec.refresh for p in self.passes if p.spec.refresh > 1 and self.runs(p)), default=1)

    def macs(self, text_tokens: float | None = None) -> float:
        """Return multiply-accumulates of the towers per pair and training step.

        A trained module costs three times its forward pass, one without gradient once; a pass whose scores serve for
        n epochs costs an n-th (what is scored later, because it was left out or replaced before, is not counted).
        Decoders count, other heads and losses are left out (under 1 % at ViT-B/16).

        Args:
            text_tokens: length of the text as encoded; None is the full context.
        """
        shape = self.shape
        total = 0.0
        for text in self.texts:
            if text.encoded:
                total += 3.0 * text_macs(shape, text.length(text_tokens))
        for p in filter(self.runs, self.passes):
            passes = (3.0 if p.learns else 1.0) / p.spec.refresh
            layers = (p.spec.score_layers or shape.layers) - 1 if p.stops_early else None
            total += passes * len(p.spec.views) * image_macs(shape, p.num_keep, p.num_tokens, layers)
        for config in self.recipe.objectives:
            with torch.device("meta"):
                objective = build_objective(config, self)
            lengths = [text.length(text_tokens) for text in self.texts if text.spec.name in config.reads]
            length = shape.context_length if not lengths or lengths[0] is None else lengths[0]
            total += 3.0 * objective.decoder_macs(self.images_of(config), length)
        return total

    def images_of(self, objective: ObjectiveConfig) -> list[tuple[int, int, int]]:
        """Return views, patches and kept patches of each image pass that an objective reads (`decoder_macs`)."""
        return [(len(p.spec.views), p.num_patches, p.num_keep) for p in self.passes if p.spec.name in objective.reads]

    def relative_cost(self, text_tokens: float | None = None) -> float:
        """Return `macs` over those of CLIP with one full view and the same text handling."""
        patches = math.prod(self.shape.grid_size)
        clip = 3.0 * (image_macs(self.shape, patches, patches + self.shape.num_prefix_tokens)
                      + text_macs(self.shape, text_tokens))
        return self.macs(text_tokens) / clip


def resolve(recipe: Recipe, shape: TowerShape, resolution: float = 1.0) -> Plan:
    """Resolve `recipe` for a model of this shape.

    Args:
        recipe: what to resolve.
        shape: of the model.
        resolution: image side of all passes relative to the recipe's own, rounded to whole patches; a pass whose scores
            serve for several epochs keeps its size, for other steps are to use them.

    Raises:
        ConfigError: an unknown masking, view, objective or option, each with what exists instead; an objective that
            asks for nothing but what its pass hides, which hides nothing.
        UnsupportedModelError: scores are read from a model in which no token asks for the patches.
    """
    pipeline = build_pipeline(recipe)
    notes: list[str] = []
    passes = []
    for p in recipe.passes:
        for view in p.views:
            if view not in pipeline.names:
                raise ConfigError(f"recipe '{recipe.name}', pass '{p.name}': "
                                  f"{unknown_name('view', view, pipeline.names)}")
        readers = [objective_class(o) for o in recipe.objectives if p.name in o.reads]
        strategy = build_strategy(p)
        if strategy.needs_scores and p.scores_from is None:
            raise ConfigError(f"recipe '{recipe.name}', pass '{p.name}': masking '{p.masking}' ranks patches, "
                              "so the pass needs scores_from, the name of an earlier pass")
        relative = p.resolution * (resolution if p.refresh == 1 else 1.0)
        image_size = tuple(
            max(1, math.floor(side * relative / patch + 0.5)) * patch
            for side, patch in zip(shape.image_size, shape.patch_size, strict=True)
        )
        grid = image_size[0] // shape.patch_size[0], image_size[1] // shape.patch_size[1]
        if fitting_block_size(strategy.block_size, grid) != strategy.block_size:
            notes.append(f"pass '{p.name}': blocks of {strategy.block_size} x {strategy.block_size} do not tile "
                         f"the {grid[0]} x {grid[1]} grid, single patches are chosen")
        keep = strategy.num_keep(grid)
        gives_scores = any(other.scores_from == p.name for other in recipe.passes)
        passes.append(PassPlan(
            spec=p, strategy=strategy, image_size=(image_size[0], image_size[1]), grid_size=grid,
            num_keep=keep, num_tokens=(math.prod(grid) if p.fill else keep) + shape.num_prefix_tokens,
            gives_scores=gives_scores,
            gives_patches=any(reader.needs_patches for reader in readers),
            gives_pixels=any(reader.needs_pixels for reader in readers),
            scores_only=gives_scores and not readers,
        ))
        _check_score_layers(recipe, p, shape)
        if p.mask_ratio > 0 and not passes[-1].removes:
            notes.append(f"pass '{p.name}': mask_ratio {p.mask_ratio:g} removes nothing of the {grid[0]} x {grid[1]} "
                         f"grid{_in_blocks(strategy, grid)}")
        if p.refresh > 1:
            notes.append(f"pass '{p.name}': scores serve for {p.refresh} epochs, so that view '{p.views[0]}' is the "
                         "whole picture")
    _check_score_sources(recipe, passes, shape)
    _check_asks(recipe, passes)
    texts = _text_plans(recipe, shape)
    uses_text = any(text.encoded for text in texts)
    if uses_text and not shape.text_cut:
        notes.append("text runs at full length: this tower is not causal and EOT-pooled")
    return Plan(recipe, shape, pipeline, tuple(passes), texts, _view_sizes(passes), uses_text, tuple(notes))


def build_pipeline(recipe: Recipe) -> ViewPipeline:
    """Return the recipe's view pipeline, its context the whole picture where scores serve for several epochs."""
    if recipe.views not in VIEWS:
        raise ConfigError(f"recipe '{recipe.name}': {unknown_name('view pipeline', recipe.views, VIEWS)}")
    for p in recipe.passes:
        _check_refresh(recipe, p)
    whole = {"context": "whole"} if any(p.refresh > 1 for p in recipe.passes) else {}
    pipeline: ViewPipeline = _build(VIEWS[recipe.views], {}, {**recipe.view_options, **whole},
                                    f"views '{recipe.views}'")
    return pipeline


def build_strategy(p: Pass) -> MaskingStrategy:
    """Return the pass's masking strategy."""
    if p.masking not in MASKING:
        raise ConfigError(f"pass '{p.name}': {unknown_name('masking', p.masking, MASKING)}")
    cls, given = MASKING[p.masking], {"mask_ratio": p.mask_ratio}
    try:
        strategy: MaskingStrategy = _build(cls, given, p.masking_options, f"masking '{p.masking}'")
    except ConfigError as error:
        taken = {name: p.masking_options[name] for name in _options_of(cls, given) if name in p.masking_options}
        if len(taken) == len(p.masking_options):
            raise
        raise ConfigError(f"pass '{p.name}': {error}; to have others than it has now, set all of them at once, e.g. "
                          f"--set 'recipe.passes.{p.name}.masking_options={json.dumps(taken)}'") from error
    return strategy


def objective_class(config: ObjectiveConfig) -> type[Objective]:
    """Return the class of an objective."""
    if config.name not in OBJECTIVES:
        raise ConfigError(unknown_name("objective", config.name, OBJECTIVES))
    return OBJECTIVES[config.name]


def asks_only_of_masked(recipe: Recipe) -> bool:
    """Return whether a recipe asks for nothing but what its mask hides, so that an unmasked step teaches nothing."""
    return all(objective_class(o).needs_masking for o in recipe.objectives)


def build_objective(config: ObjectiveConfig, plan: Plan) -> Objective:
    """Return an objective with fresh heads for this plan."""
    every: tuple[Pass | TextPass, ...] = (*plan.recipe.passes, *plan.recipe.texts)
    specs = {p.name: p for p in every}
    given = {"reads": [specs[name] for name in config.reads], "shape": plan.shape}
    objective: Objective = _build(objective_class(config), given, config.options, f"objective '{config.name}'")
    return objective


def image_macs(shape: TowerShape, patches: int, tokens: int, layers: int | None = None) -> float:
    """Return multiply-accumulates of one image's forward pass.

    A block on L tokens of width d with an MLP of width m: L (4 d^2 + 2 d m) + 2 L^2 d. A pool that attends to N
    patches: N (2 d^2 + 2 d) for keys, values and attention, 2 d^2 + 2 d m for its one query and the MLP behind it.

    Args:
        shape: of the tower.
        patches: how many are embedded.
        tokens: how many go through the blocks (L).
        layers: blocks that they go through whole, before one whose CLS attention alone is computed; None for a tower
            that is run to its end.
    """
    pixels = 3 * shape.patch_size[0] * shape.patch_size[1]
    embedding = patches * pixels * shape.width
    if layers is not None:
        keys_and_row = tokens * (shape.width**2 + shape.width)
        return embedding + layers * block_macs(tokens, shape.width, shape.mlp_width) + keys_and_row
    pool = 0.0
    if shape.pool_mlp_width:
        seen = tokens - shape.num_prefix_tokens
        query = 2.0 * shape.width**2 + 2.0 * shape.width * shape.pool_mlp_width
        pool = query + seen * (2.0 * shape.width**2 + 2.0 * shape.width)
    return embedding + shape.layers * block_macs(tokens, shape.width, shape.mlp_width) + pool


def text_macs(shape: TowerShape, tokens: float | None = None) -> float:
    """Return multiply-accumulates of one caption's forward pass; None is the full context."""
    length = shape.context_length if tokens is None or not shape.text_cut else tokens
    return shape.text_layers * block_macs(length, shape.text_width, shape.text_mlp_width)


def _options_of(cls: Any, given: Mapping[str, Any]) -> list[str]:
    """Return the arguments that `cls` takes besides those `given`."""
    return [name for name in inspect.signature(cls).parameters if name not in given]


def _build(cls: Any, given: Mapping[str, Any], options: Mapping[str, Any], what: str) -> Any:
    """Return `cls(**given, **options)`; `options` are the user's, and mistakes in them are explained."""
    known = _options_of(cls, given)
    for name in options:
        if name not in known:
            raise ConfigError(f"{what} does not take these options: {unknown_name('option', name, known)}")
    try:
        return cls(**given, **options)
    except TypeError as error:
        raise ConfigError(f"{what} does not take these options: {str(error).split('__init__() ')[-1]}") from error


def _text_plans(recipe: Recipe, shape: TowerShape) -> tuple[TextPlan, ...]:
    plans = []
    for text in recipe.texts:
        readers = [o for o in recipe.objectives if text.name in o.reads]
        if not readers:
            continue
        if not shape.text_cut and (text.reduction != "none" or text.mask_ratio > 0):
            raise ConfigError(f"text pass '{text.name}': tokens can be left out or hidden in causal, EOT-pooled text "
                              "towers only, and this model's is none: choose another model, such as ViT-B-16")
        reduction = None
        if text.reduction == "none" and text.reduction_options:
            raise ConfigError(f"text pass '{text.name}': reduction 'none' takes no options, not "
                              f"{', '.join(text.reduction_options)}: choose one of {', '.join(TEXT_REDUCTIONS)}")
        if text.reduction != "none":
            if text.reduction not in TEXT_REDUCTIONS:
                raise ConfigError(f"text pass '{text.name}': "
                                  f"{unknown_name('text reduction', text.reduction, ['none', *TEXT_REDUCTIONS])}")
            reduction = _build(TEXT_REDUCTIONS[text.reduction], {}, text.reduction_options,
                               f"text reduction '{text.reduction}'")
        plans.append(TextPlan(text, reduction, any(objective_class(o).needs_text for o in readers)))
    return tuple(plans)


def _view_sizes(passes: list[PassPlan]) -> dict[str, tuple[int, int]]:
    sizes: dict[str, tuple[int, int]] = {}
    for p in passes:
        for view in p.spec.views:
            sizes[view] = max(sizes.get(view, p.image_size), p.image_size)
    return sizes


def _in_blocks(strategy: MaskingStrategy, grid: tuple[int, int]) -> str:
    """Return in what a grid is masked, in words that follow it."""
    block = fitting_block_size(strategy.block_size, grid)
    return f" in blocks of {block} x {block}" if block > 1 else ""


def _check_asks(recipe: Recipe, passes: list[PassPlan]) -> None:
    """Refuse an objective that asks for nothing but hidden patches where none are hidden: its loss would be 0."""
    for o in recipe.objectives:
        read = [p for p in passes if p.spec.name in o.reads]
        if objective_class(o).needs_masking and read and not any(p.removes for p in read):
            p = read[0]
            grid = f"{p.grid_size[0]} x {p.grid_size[1]} grid{_in_blocks(p.strategy, p.grid_size)}"
            raise ConfigError(f"recipe '{recipe.name}', objective '{o.name}' asks for nothing but removed patches, and "
                              f"pass '{p.spec.name}' removes none of its {grid} at mask_ratio {p.spec.mask_ratio:g}: "
                              "raise the ratio, or the resolution")


def _check_score_layers(recipe: Recipe, p: Pass, shape: TowerShape) -> None:
    """Refuse to count the layers of scores that nobody takes, or more layers than there are."""
    if p.score_layers is None:
        return
    if all(other.scores_from != p.name for other in recipe.passes):
        raise ConfigError(f"recipe '{recipe.name}', pass '{p.name}': score_layers has nothing to act on, for no pass "
                          "takes scores from it")
    if shape.pool_mlp_width:
        raise ConfigError(f"recipe '{recipe.name}', pass '{p.name}': score_layers has nothing to act on, for in this "
                          "tower the pool behind the last layer scores the patches")
    if p.score_layers > shape.layers:
        raise ConfigError(f"recipe '{recipe.name}', pass '{p.name}': scores cannot come from {p.score_layers} layers "
                          f"of a tower that has {shape.layers}")


def _check_refresh(recipe: Recipe, p: Pass) -> None:
    """Refuse to keep scores that nobody takes, of a pass that is run for others as well, or of crops."""
    if p.refresh == 1:
        return
    where = f"recipe '{recipe.name}', pass '{p.name}'"
    readers = ", ".join(f"'{o.name}'" for o in recipe.objectives if p.name in o.reads)
    if all(other.scores_from != p.name for other in recipe.passes):
        raise ConfigError(f"{where}: refresh has nothing to act on, for no pass takes scores from it")
    if readers:
        raise ConfigError(f"{where}: refresh would save nothing, for it is run in every step for objective {readers}: "
                          "leave it at 1")
    if p.views != ("context",) or not issubclass(VIEWS[recipe.views], TwoCropsInContext):
        raise ConfigError(f"{where}: scores that serve for {p.refresh} epochs need a view of the whole picture, which "
                          "is 'context' alone, of two_crops_in_context and three_crops_in_context")


def _check_score_sources(recipe: Recipe, passes: list[PassPlan], shape: TowerShape) -> None:
    """A view takes its scores from the same view of a whole source pass, or from that pass's only view."""
    for plan in passes:
        if plan.gives_scores and not shape.scored:
            raise UnsupportedModelError(f"recipe '{recipe.name}', pass '{plan.spec.name}': {NOBODY_ASKS}")
        if plan.gives_scores and plan.removes:
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
