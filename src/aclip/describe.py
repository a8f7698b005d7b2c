"""Recipes in words: the list of all, the resolved dataflow of one, what a step costs."""

import io
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from aclip import dist
from aclip.config import ImageSize
from aclip.errors import ConfigError
from aclip.recipes import RECIPES, find_recipe

if TYPE_CHECKING:
    from torch import nn

    from aclip.plan import Plan, TextPlan
    from aclip.structs import TowerShape
    from aclip.trainer import Trainer
    from aclip.training.optim import ParameterGroup


def list_recipes() -> dict[str, str]:
    """List the training methods; return what each does, by name."""
    table = Table("recipe", "what it does", "paper", box=None, pad_edge=False)
    for name, recipe in RECIPES.items():
        table.add_row(f"[bold]{name}", recipe.title, recipe.paper)
    Console().print(table)
    return {name: recipe.title for name, recipe in RECIPES.items()}


def show_recipe(
    recipe: str,
    *,
    model: str = "ViT-B-16",
    teacher: str | None = None,
    image_size: int | str | None = None,
    text_tokens: float = 14.0,
    changes: Mapping[str, Any] | None = None,
) -> "Plan":
    """Show the resolved dataflow of a recipe on a model: views, passes, patches kept, objectives, cost.

    Args:
        recipe: a name from `aclip recipes`.
        model: open_clip name or preset.
        teacher: the same, of the frozen encoder (default: the model).
        image_size: side of the input in pixels, or HEIGHTxWIDTH (default: the model's own).
        text_tokens: mean caption length in tokens, where text is cut.
        changes: path -> value, fields of the recipe to change.
    """
    from aclip import plan

    changed = find_recipe(recipe, changes)
    resolved = plan.resolve(changed, _shape(model, image_size, text_tokens), frozen_shape=_frozen_shape(teacher))
    Console().print(dataflow_table(resolved, model, text_tokens))
    return resolved


def recipe_costs(
    recipes: Sequence[str] = (),
    *,
    model: str = "ViT-B-16",
    teacher: str | None = None,
    image_size: int | str | None = None,
    text_tokens: float = 14.0,
    changes: Mapping[str, Any] | None = None,
) -> list["Plan"]:
    """Show what a training step of each recipe costs: multiply-accumulates a pair, and relative to CLIP.

    Args:
        recipes: names from `aclip recipes` (default: all).
        model: open_clip name or preset.
        teacher: the same, of the frozen encoder (default: the model).
        image_size: side of the input in pixels, or HEIGHTxWIDTH (default: the model's own).
        text_tokens: mean caption length in tokens, where text is cut.
        changes: path -> value, fields of every recipe to change.
    """
    from aclip import plan

    shape, frozen_shape = _shape(model, image_size, text_tokens), _frozen_shape(teacher)
    plans = []
    for name in recipes or RECIPES:
        try:
            plans.append(plan.resolve(find_recipe(name, changes), shape, frozen_shape=frozen_shape))
        except ConfigError as error:
            raise ConfigError(f"recipe '{name}': {error}") from error
    console = Console(highlight=False)
    console.print(cost_table(plans, model, text_tokens))
    console.print("A trained module counts three times its forward pass, one without gradient once. / clip: CLIP with "
                  "one full view and the same text; \\[*] its text padded.")
    return plans


def _shape(model: str, image_size: int | str | None, text_tokens: float) -> "TowerShape":
    from aclip import models

    try:
        size = TypeAdapter(ImageSize).validate_python(image_size)
    except ValidationError:
        raise ConfigError(f"image_size is a side in pixels, or HEIGHTxWIDTH, not '{image_size}'") from None
    shape = models.shape_of(models.model_config(model, image_size=size))
    if not 1 <= text_tokens <= shape.context_length:
        raise ConfigError(f"text_tokens is between 1 and {shape.context_length} for {model}, not {text_tokens:g}")
    return shape


def _frozen_shape(teacher: str | None) -> "TowerShape | None":
    from aclip import models

    return None if teacher is None else models.shape_of(models.model_config(teacher))


def cost_table(plans: Sequence["Plan"], model: str, text_tokens: float) -> Table:
    """Return what a step of each recipe costs, by arithmetic: GMAC a pair, and relative to CLIP."""
    table = Table(title=f"a training step on {model}, text padded to {plans[0].shape.context_length} or cut to "
                        f"{text_tokens:g} tokens", title_justify="left", box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("image tokens", no_wrap=True)
    for title in ("GMAC, padded", "GMAC, cut", "/ clip, padded", "/ clip, cut", "/ clip, cut \\[*]"):
        table.add_column(title, justify="right")
    for one in plans:
        tokens = ", ".join(f"{f'{len(p.spec.views)}x' if len(p.spec.views) > 1 else ''}{p.num_tokens}"
                           + ("" if p.trains else {"ema": " EMA", "frozen": " frozen"}.get(p.spec.encoder, " scored"))
                           for p in one.passes.values())
        gmacs = (f"{macs / 1e9:.3g}" for macs in (one.macs(), one.macs(text_tokens)))
        ratios = one.relative_cost(), one.relative_cost(text_tokens), relative_to_padded(one, text_tokens)
        table.add_row(f"[bold]{one.recipe.name}", tokens, *gmacs, *(f"{ratio:.2f}" for ratio in ratios))
    return table


def relative_to_padded(one: "Plan", text_tokens: float) -> float:
    """Return the cost with text cut to `text_tokens`, over that of CLIP with padded text."""
    return one.macs(text_tokens) / (one.macs() / one.relative_cost())


def dataflow_table(resolved: "Plan", model: str, text_tokens: float) -> Table:
    """Return a recipe's steps as a table, in the order in which they run."""
    recipe = resolved.recipe
    table = Table(title=f"[bold]{recipe.name}[/bold] on {model}: {recipe.title} ({recipe.paper})",
                  title_justify="left", show_header=False, box=None, pad_edge=False)
    options = ", ".join(f"{k}={v}" for k, v in recipe.view_options.items())
    table.add_row("views", f"{recipe.views}({options}) -> {', '.join(resolved.pipeline.names)}")
    for name, text in resolved.texts.items():
        table.add_row(f"text '{name}'", _describe_text(text))
    for name, p in resolved.passes.items():
        masking = f"{p.spec.masking} masking, " if p.spec.masking != "none" else ""
        if p.spec.scores_from:
            masking += f"scores from '{p.spec.scores_from}', "
        table.add_row(
            f"pass '{name}'",
            f"{' + '.join(p.spec.views)} at {p.image_size[0]} x {p.image_size[1]} -> {masking}"
            f"{p.num_keep} of {p.num_patches} patches {'seen, mask tokens for the others' if p.spec.fill else 'kept'}, "
            f"{p.num_tokens} tokens -> {p.spec.encoder} encoder"
            + (", without gradient" if p.spec.encoder == "online" and not p.trains else ""))
    for name, o in recipe.objectives.items():
        settings = "".join(f", {k} {v}" for k, v in o.options.items())
        table.add_row(f"objective '{name}'", f"weight {o.weight:g}, reads {' -> '.join(o.reads)}{settings}")
    if recipe.ema_momentum and recipe.uses_ema:
        momentum = recipe.ema_momentum
        warmup = f", before that (1 + t) / ({momentum.warmup:g} + t) in step t" if momentum.warmup else ""
        table.add_row("EMA", f"momentum {momentum.start} -> {momentum.end}{warmup}, after each optimizer step")
    if recipe.freeze:
        table.add_row("frozen", ", ".join(recipe.freeze))
    table.add_row(
        "cost",
        f"{resolved.relative_cost():.2f} of CLIP with text padded to {resolved.shape.context_length}, "
        f"{resolved.relative_cost(text_tokens):.2f} with text cut to {text_tokens:g} "
        f"({resolved.macs(text_tokens) / 1e9:.2f} GMAC a pair; towers and decoders)")
    for note in resolved.notes:
        table.add_row("note", note)
    return table


def _describe_text(text: "TextPlan") -> str:
    cut = "cut after the longest caption of the batch" if text.shape.text_cut else "full length"
    words = f"{cut}, at most {text.shape.context_length} tokens"
    if text.reduction is not None:
        words += f", reduced to {text.reduction.num_keep} by '{text.spec.reduction}'"
    if text.spec.mask_ratio > 0:
        words += f", {text.spec.mask_ratio:.0%} of the words hidden"
    return words + ("" if text.trains else ", frozen encoder") + ("" if text.encoded else ", not encoded")


def parameter_table(groups: Sequence["ParameterGroup"], model: "nn.Module") -> Table:
    """Return how each parameter group is trained, and how much is frozen."""
    table = Table("parameters", "tensors", "millions", "weight decay", "learning rate", box=None, pad_edge=False)

    def add(title: str, members: "Collection[nn.Parameter]", *settings: str) -> None:
        table.add_row(title, str(len(members)), f"{sum(p.numel() for p in members) / 1e6:.2f}", *settings)

    for group in groups:
        add(group.title, group.parameters.values(), f"{group.weight_decay:g}", f"x {group.lr_factor:.3g}")
    if frozen := [p for p in model.parameters() if not p.requires_grad]:
        add("frozen", frozen)
    return table


def describe_run(console: Console, trainer: "Trainer", flow: Table, num_pairs: int) -> None:
    """Print what a run is about to do; `flow` is its `dataflow_table`."""
    config, table = trainer.config, trainer.timetable
    console.print(flow)
    for resolution in {size for _, size in table.resolutions}:
        for note in trainer.method.plan_at(resolution).notes:
            if note not in trainer.method.plan.notes:  # those are in the table above
                console.print(f"at resolution {resolution:g}: {note}", markup=False, soft_wrap=True)
    console.print(parameter_table(trainer.groups, trainer.method.model))
    ranks = f", {dist.world_size()} processes ({config.parallel})" if dist.world_size() > 1 else ""
    parts = f", {trainer.micro_batch} pairs at a time" if trainer.in_parts else ""
    console.print(f"{config.precision} on {trainer.device}{ranks}{parts}", soft_wrap=True)
    console.print(f"{num_pairs:,} pairs, batch {config.batch_size}, {table.total_steps:,} steps "
                  f"({table.total_steps / table.steps_per_epoch:.1f} epochs), warm-up {table.warmup_steps}"
                  + (f", unmasked after step {table.masked_steps:,}" if table.masked_steps < table.total_steps else "")
                  + (f", from step {trainer.step:,}" if trainer.step else ""), soft_wrap=True)


def plain_text(table: Table) -> str:
    """Return a rich table as text."""
    console = Console(width=140, file=io.StringIO(), no_color=True, force_jupyter=False)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
