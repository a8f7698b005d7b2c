"""A recipe resolved against a model: image sizes, grids, patches kept, tokens, arithmetic.

`Method` executes exactly this plan, and `aclip recipes show` prints it, so that what is declared is what is run.
"""

import inspect
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from aclip import models
from aclip.config import Pass, Recipe, RunConfig, TextPass, sentence, to_dict
from aclip.data.views import VIEWS, ViewPipeline
from aclip.errors import ConfigError, UnsupportedModelError, unknown_name
from aclip.masking import MASKING, TEXT_REDUCTIONS, MaskingStrategy, TextReduction, fitting_block_size
from aclip.objectives import OBJECTIVES, Objective
from aclip.objectives.base import block_macs
from aclip.structs import TowerShape


@dataclass(frozen=True)
class PassPlan:
    """One pass with every number it needs.

    Attributes:
        name, spec: the recipe's pass.
        shape: of its encoder.
        strategy: its masking strategy, built.
        image_size: (height, width) in pixels. grid_size: patches (down, across).
        num_keep: patches per view that go through the blocks (K).
        num_tokens: tokens of a view in the blocks: the prefix tokens and K, or N where the pass fills.
        gives_scores: whether a later pass reads this pass's attention scores.
        gives_patches, gives_pixels: whether an objective reads its patch tokens, its pixels.
        scores_only: whether nothing but its scores is read.
    """

    name: str
    spec: Pass
    shape: TowerShape
    strategy: MaskingStrategy
    image_size: tuple[int, int]
    grid_size: tuple[int, int]
    num_keep: int
    num_tokens: int
    gives_scores: bool
    gives_patches: bool
    gives_pixels: bool
    scores_only: bool

    @property
    def num_patches(self) -> int:
        """N, before anything is removed."""
        return math.prod(self.grid_size)

    @property
    def removes(self) -> bool:
        """Whether its mask removes any patch."""
        return self.num_keep < self.num_patches

    @property
    def trains(self) -> bool:
        """Whether a gradient flows through it."""
        return self.spec.encoder == "online" and not self.scores_only


@dataclass(frozen=True)
class TextPlan:
    """One text pass, resolved.

    Attributes:
        name, spec: the recipe's text pass.
        shape: of its encoder.
        reduction: its strategy, built, or None for whole captions.
        encoded: whether any objective reads more than the tokens themselves.
    """

    name: str
    spec: TextPass
    shape: TowerShape
    reduction: TextReduction | None
    encoded: bool

    @property
    def trains(self) -> bool:
        """Whether a gradient flows through it."""
        return self.spec.encoder == "online"

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
        frozen_shape: of the frozen encoder's model.
        pipeline: the view pipeline, built.
        passes: name -> pass, in order. texts: name -> text pass, those that an objective reads.
        view_sizes: view name -> (height, width) in which the loader delivers it.
        uses_text: whether captions are encoded.
        notes: sentences about what was adapted, for the user.
    """

    recipe: Recipe
    shape: TowerShape
    frozen_shape: TowerShape
    pipeline: ViewPipeline
    passes: Mapping[str, PassPlan]
    texts: Mapping[str, TextPlan]
    view_sizes: Mapping[str, tuple[int, int]]
    uses_text: bool
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the recipe, what its passes see, and its cost with padded text, relative to CLIP's."""
        return {"recipe": to_dict(self.recipe), "cost": self.relative_cost(), "macs": self.macs(), "passes": {
            name: {"patches": p.num_patches, "kept": p.num_keep, "tokens": p.num_tokens, "image_size": p.image_size}
            for name, p in self.passes.items()}, "notes": self.notes}

    def runs(self, p: PassPlan, masked: bool = True) -> bool:
        """Return whether a step runs the pass; one that only scores is skipped where no patch is chosen by its scores.
        """
        chooses = any(other.spec.scores_from == p.name and other.removes for other in self.passes.values())
        return (masked and chooses) or not p.scores_only

    def frozen_inputs(self) -> dict[str, Any]:
        """Return what the features of the frozen passes depend on, besides the samples, the seed and the weights.

        Raises:
            ConfigError: more is read of a frozen pass than features of whole images and captions.
        """
        alone = self.frozen_alone()
        for name, p in alone.passes.items():
            readers = [objective_class(key) for key, o in self.recipe.objectives.items() if name in o.reads]
            if p.removes or p.gives_scores or not all(reader.needs_text for reader in readers):
                raise ConfigError(f"recipe '{self.recipe.name}' needs more of its frozen pass '{name}' than features "
                                  "of whole images, which alone can be stored: leave out --teacher-features")
        for name, text in alone.texts.items():
            if text.reduction is not None:
                raise ConfigError(f"recipe '{self.recipe.name}' reduces the captions of its frozen pass '{name}', and "
                                  "features of whole ones alone can be stored: leave out --teacher-features")
        both: dict[str, PassPlan | TextPlan] = {**alone.passes, **alone.texts}
        specs = {name: to_dict(one.spec) for name, one in both.items()}
        return {"views": self.recipe.views, "view_options": self.recipe.view_options, "sizes": self.view_sizes,
                "context_length": self.shape.context_length, "passes": specs}

    def frozen_alone(self) -> "Plan":
        """Return the plan of the frozen passes, without those that are trained."""
        return replace(self, passes={name: p for name, p in self.passes.items() if p.spec.encoder == "frozen"},
                       texts={name: text for name, text in self.texts.items() if text.spec.encoder == "frozen"})

    def unmasked(self) -> "Plan":
        """Return the plan of steps in which nothing is masked (unmasked tuning)."""
        passes = {name: replace(p, num_keep=p.num_patches, num_tokens=p.num_patches + p.shape.num_prefix_tokens)
                  for name, p in self.passes.items()}
        texts = {name: replace(text, reduction=None) for name, text in self.texts.items()}
        return replace(self, passes=passes, texts=texts)

    def macs(self, text_tokens: float | None = None) -> float:
        """Return multiply-accumulates of the towers per pair and training step.

        A trained module costs three times its forward pass, one without gradient once. Decoders count; other heads and
        losses are left out (under 1 % at ViT-B/16).

        Args:
            text_tokens: length of the text as encoded; None is the full context.
        """
        total, trained = 0.0, 1.0 if "towers" in self.recipe.freeze else 3.0
        for text in self.texts.values():
            if text.encoded:
                total += (trained if text.trains else 1.0) * text_macs(text.shape, text.length(text_tokens))
        for p in filter(self.runs, self.passes.values()):
            passes = trained if p.trains else 1.0
            total += passes * len(p.spec.views) * image_macs(p.shape, p.num_keep, p.num_tokens)
        for name, config in self.recipe.objectives.items():
            with torch.device("meta"):
                objective = build_objective(name, self)
            images = [(len(p.spec.views), p.num_patches, p.num_keep) for p in self.passes.values()
                      if p.name in config.reads]
            length = next((text.length(text_tokens) for text in self.texts.values() if text.name in config.reads), None)
            total += 3.0 * objective.decoder_macs(images, length or self.shape.context_length)
        return total

    def relative_cost(self, text_tokens: float | None = None) -> float:
        """Return `macs` over those of CLIP with one full view and the same text handling."""
        patches = math.prod(self.shape.grid_size)
        clip = 3.0 * (image_macs(self.shape, patches, patches + self.shape.num_prefix_tokens)
                      + text_macs(self.shape, text_tokens))
        return self.macs(text_tokens) / clip


def resolve(
    recipe: Recipe, shape: TowerShape, resolution: float = 1.0, *, frozen_shape: TowerShape | None = None
) -> Plan:
    """Resolve `recipe` for a model of this shape.

    Args:
        recipe, shape: what to resolve, and of the model.
        resolution: image side of all passes relative to the recipe's own, rounded to whole patches.
        frozen_shape: of the frozen encoder's model; None: as the model.

    Raises:
        ConfigError: an unknown masking, view, objective or option, each with what exists instead; an objective that
            is computed on removed patches alone, on a pass that removes none.
        UnsupportedModelError: scores are read from a model without attention scores.
    """
    if recipe.views not in VIEWS:
        raise ConfigError(f"recipe '{recipe.name}': {unknown_name('view pipeline', recipe.views, VIEWS)}")
    pipeline: ViewPipeline = build(VIEWS[recipe.views], {}, recipe.view_options, f"views '{recipe.views}'")
    frozen_shape = frozen_shape or shape
    passes = {name: _resolve_pass(recipe, name, frozen_shape if p.encoder == "frozen" else shape, pipeline, resolution)
              for name, p in recipe.passes.items()}
    notes = [note for p in passes.values() for note in _notes(p)]
    _check_score_sources(recipe, passes)
    _check_masked_objectives(recipe, passes)
    texts = _resolve_texts(recipe, shape, frozen_shape)
    uses_text = any(text.encoded for text in texts.values())
    if uses_text and not shape.text_cut:
        notes.append("text runs at full length: this tower is not causal and EOT-pooled")
    sizes: dict[str, tuple[int, int]] = {}
    for p in passes.values():
        for view in p.spec.views:
            sizes[view] = max(sizes.get(view, p.image_size), p.image_size)
    return Plan(recipe, shape, frozen_shape, pipeline, passes, texts, sizes, uses_text, tuple(notes))


def resolve_run(config: RunConfig) -> Plan:
    """Resolve a run's recipe for its model and its teacher, if it names one; no weights are read.

    Raises:
        ConfigError, UnsupportedModelError: as `resolve`; a teacher that reads captions in other tokens.
    """
    own = models.model_config(config.model, image_size=config.image_size)
    shape = models.shape_of(own)
    if config.teacher is None:
        return resolve(config.recipe, shape)
    theirs = models.model_config(config.teacher)
    plan = resolve(config.recipe, shape, frozen_shape=models.shape_of(theirs))
    if any(text.spec.encoder == "frozen" for text in plan.texts.values()):
        _check_same_tokens(config, own["text_cfg"], theirs["text_cfg"], plan)
    return plan


def _check_same_tokens(config: RunConfig, own: Mapping[str, Any], theirs: Mapping[str, Any], plan: Plan) -> None:
    """Refuse a teacher that reads other tokens than the model; a longer context is filled with open_clip's padding."""
    tokenizers = [[text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs"), shape.vocab_size]
                  for text, shape in ((own, plan.shape), (theirs, plan.frozen_shape))]
    length, longest = plan.shape.context_length, plan.frozen_shape.context_length
    if tokenizers[0] != tokenizers[1] or length > longest or (length < longest and own.get("hf_tokenizer_name")):
        raise ConfigError(f"the teacher '{config.teacher}' cannot read the tokens of '{config.model}': its tokenizer "
                          f"is another, or its context ({longest} beside {length}); choose a teacher with the same")


def _resolve_pass(
    recipe: Recipe, name: str, shape: TowerShape, pipeline: ViewPipeline, resolution: float
) -> PassPlan:
    spec = recipe.passes[name]
    where = f"recipe '{recipe.name}', pass '{name}'"
    for view in spec.views:
        if view not in pipeline.names:
            raise ConfigError(f"{where}: {unknown_name('view', view, pipeline.names)}")
    if spec.masking not in MASKING:
        raise ConfigError(f"{where}: {unknown_name('masking', spec.masking, MASKING)}")
    try:
        strategy: MaskingStrategy = build(MASKING[spec.masking], {"mask_ratio": spec.mask_ratio}, spec.masking_options,
                                          f"{where}, masking '{spec.masking}'")
    except ConfigError as error:
        if not spec.masking_options:
            raise
        raise ConfigError(f"{error}; the options of the pass are {json.dumps(spec.masking_options)}: replace all of "
                          f"them with --recipe.passes.{name}.masking-options '{{}}'") from None
    if strategy.needs_scores and spec.scores_from is None:
        raise ConfigError(f"{where}: masking '{spec.masking}' ranks patches by scores: set scores_from to the name of "
                          "an earlier pass")
    height, width = (
        max(1, math.floor(side * spec.resolution * resolution / patch + 0.5)) * patch
        for side, patch in zip(shape.image_size, shape.patch_size, strict=True)
    )
    grid = height // shape.patch_size[0], width // shape.patch_size[1]
    num_keep = strategy.num_keep(grid)
    readers = [objective_class(key) for key, objective in recipe.objectives.items() if name in objective.reads]
    gives_scores = any(other.scores_from == name for other in recipe.passes.values())
    return PassPlan(
        name=name, spec=spec, shape=shape, strategy=strategy, image_size=(height, width), grid_size=grid,
        num_keep=num_keep, num_tokens=(math.prod(grid) if spec.fill else num_keep) + shape.num_prefix_tokens,
        gives_scores=gives_scores,
        gives_patches=any(reader.needs_patches for reader in readers),
        gives_pixels=any(reader.needs_pixels for reader in readers),
        scores_only=gives_scores and not readers,
    )


def objective_class(name: str) -> type[Objective]:
    """Return the class of an objective."""
    if name not in OBJECTIVES:
        raise ConfigError(unknown_name("objective", name, OBJECTIVES))
    return OBJECTIVES[name]


def trains_only_masked(recipe: Recipe) -> bool:
    """Return whether all losses are computed on removed patches alone, so that an unmasked step teaches nothing."""
    return all(objective_class(name).needs_masking for name in recipe.objectives)


def build_objective(name: str, plan: Plan) -> Objective:
    """Return an objective of the plan's recipe with freshly initialised heads."""
    config = plan.recipe.objectives[name]
    every: dict[str, Pass | TextPass] = {**plan.recipe.passes, **plan.recipe.texts}
    given = {"reads": {read: every[read] for read in config.reads}, "shape": plan.shape}
    objective: Objective = build(objective_class(name), given, config.options, f"objective '{name}'")
    return objective


def build(cls: Any, given: Mapping[str, Any], options: Mapping[str, Any], what: str) -> Any:
    """Return `cls(**given, **options)` with the options validated against the annotations of its signature.

    Args:
        cls: a masking strategy, text reduction, view pipeline or objective.
        given, options: arguments that are not the user's, and those that are.
        what: for the error message, e.g. "masking 'attentive'".

    Raises:
        ConfigError: an option that does not exist, with the closest that does, or has a wrong value or type; a class
            that does not accept `given`.
    """
    accepted = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for name in given.keys() - accepted.keys():
            raise ConfigError(f"{what}: {cls.__name__}.__init__ does not take '{name}': add it, and pass it on to "
                              "super().__init__")
    parameters = {name: p for name, p in accepted.items() if name not in given}
    owner = cls if is_dataclass(cls) else cls.__init__
    try:
        hints = typing.get_type_hints(owner, include_extras=True)
    except NameError:  # an annotation that only a type checker can resolve
        hints = {}
    checked = {}
    for name, value in options.items():
        if name not in parameters:
            raise ConfigError(f"{what}: {unknown_name('option', name, parameters)}")
        try:
            adapter = TypeAdapter(hints.get(name, Any), config=ConfigDict(allow_inf_nan=False))
            checked[name] = adapter.validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"{what}: {name} {sentence(cls, error).partition(' ')[2]}") from None
    required = [name for name, p in parameters.items() if p.default is p.empty and name not in checked
                and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if required:
        raise ConfigError(f"{what} needs the option '{required[0]}'")
    return cls(**given, **checked)


def image_macs(shape: TowerShape, patches: int, tokens: int) -> float:
    """Return multiply-accumulates of one image's forward pass: `patches` are embedded, `tokens` go through the blocks.

    A pool that attends to N patches of width d, with an MLP of width m: N (2 d^2 + 2 d) for keys, values and attention,
    2 d^2 + 2 d m for its one query and the MLP behind it. A block is `block_macs`.
    """
    embedding = patches * 3 * math.prod(shape.patch_size) * shape.width
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


def _resolve_texts(recipe: Recipe, online: TowerShape, frozen: TowerShape) -> dict[str, TextPlan]:
    plans = {}
    for name, spec in recipe.texts.items():
        shape = frozen if spec.encoder == "frozen" else online
        readers = [key for key, objective in recipe.objectives.items() if name in objective.reads]
        if not readers:
            continue
        if not shape.text_cut and (spec.reduction != "none" or spec.mask_ratio > 0):
            raise ConfigError(f"text pass '{name}': only causal, EOT-pooled text towers can run on part of a caption, "
                              "and this model's is not: choose another model, such as ViT-B-16")
        reduction: TextReduction | None = None
        if spec.reduction != "none":
            if spec.reduction not in TEXT_REDUCTIONS:
                raise ConfigError(f"text pass '{name}': "
                                  f"{unknown_name('text reduction', spec.reduction, ['none', *TEXT_REDUCTIONS])}")
            reduction = build(TEXT_REDUCTIONS[spec.reduction], {}, spec.reduction_options,
                              f"text pass '{name}', reduction '{spec.reduction}'")
        elif spec.reduction_options:
            raise ConfigError(f"text pass '{name}': reduction 'none' takes no options; there are: "
                              f"{', '.join(TEXT_REDUCTIONS)}")
        plans[name] = TextPlan(name, spec, shape, reduction, any(objective_class(key).needs_text for key in readers))
    return plans


def _notes(p: PassPlan) -> list[str]:
    """Return what the user should know about how a pass is masked on its grid."""
    block = fitting_block_size(p.strategy.block_size, p.grid_size)
    grid = f"{p.grid_size[0]} x {p.grid_size[1]} grid"
    notes = []
    if block != p.strategy.block_size:
        notes.append(f"pass '{p.name}': blocks of {p.strategy.block_size} x {p.strategy.block_size} do not tile the "
                     f"{grid}, single patches are chosen")
    if p.spec.mask_ratio > 0 and not p.removes:
        blocks = f" in blocks of {block} x {block}" if block > 1 else ""
        notes.append(f"pass '{p.name}': mask_ratio {p.spec.mask_ratio:g} removes nothing of the {grid}{blocks}")
    return notes


def _check_masked_objectives(recipe: Recipe, passes: Mapping[str, PassPlan]) -> None:
    """Refuse a loss on removed patches alone where none are removed: it would be 0."""
    for name, objective in recipe.objectives.items():
        read = [passes[key] for key in objective.reads if key in passes]
        if objective_class(name).needs_masking and read and not any(p.removes for p in read):
            raise ConfigError(f"recipe '{recipe.name}', objective '{name}' is computed on removed patches alone, and "
                              f"pass '{read[0].name}' removes none of its {read[0].grid_size[0]} x "
                              f"{read[0].grid_size[1]} grid at mask_ratio {read[0].spec.mask_ratio:g}: raise the "
                              "ratio, or the resolution")


def _check_score_sources(recipe: Recipe, passes: Mapping[str, PassPlan]) -> None:
    """A view takes its scores from the same view of an unmasked source pass, or from that pass's only view."""
    for p in passes.values():
        where = f"recipe '{recipe.name}', pass '{p.name}'"
        if p.gives_scores and not p.shape.scored:
            raise UnsupportedModelError(f"{where}: {models.NO_ATTENTION_SCORES}")
        if p.gives_scores and p.removes:
            raise ConfigError(f"{where}: others take scores from it, so it must see every patch: leave its masking at "
                              "'none'")
        if p.spec.scores_from is None:
            continue
        source = passes[p.spec.scores_from]
        for view in p.spec.views:
            if view not in source.spec.views and len(source.spec.views) != 1:
                raise ConfigError(f"{where}: view '{view}' cannot take scores from '{source.name}', which has several "
                                  f"other views: {', '.join(source.spec.views)}")
