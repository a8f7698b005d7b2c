"""`aclip recipes`: list the methods, and show what one of them does on a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from aclip.plan import Plan, TextPlan
    from aclip.structs import TowerShape

EXAMPLES = """\
examples:
  aclip recipes
  aclip recipes show a-clip --model ViT-B-16
  aclip recipes show a-clip --model vit-tiny --set passes.masked.mask_ratio=0.75
  aclip recipes cost --model ViT-B-16
  aclip recipes cost flip a-clip --set passes.masked.mask_ratio=0.75
"""


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "recipes", help="list the methods, show one's dataflow and cost", epilog=EXAMPLES,
        description="List the training methods, or show the resolved dataflow of one: views -> passes ->\n"
                    "patches kept -> objectives -> weights -> cost relative to CLIP.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run_list)
    actions = parser.add_subparsers(metavar="ACTION")
    show = actions.add_parser(
        "show", help="the resolved dataflow of one recipe", epilog=EXAMPLES,
        description="Show what a recipe does on a model, and what it costs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("name", metavar="RECIPE", help="a name from `aclip recipes`")
    _add_model_options(show)
    show.set_defaults(run=run_show)
    cost = actions.add_parser(
        "cost", help="tokens and arithmetic of several recipes", epilog=EXAMPLES,
        description="Show what a training step of each recipe costs: multiply-accumulates a pair, and how many times\n"
                    "those of CLIP, by arithmetic. `aclip compare` measures it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cost.add_argument("names", nargs="*", metavar="RECIPE", help="names from `aclip recipes` (default: all)")
    _add_model_options(cost)
    cost.set_defaults(run=run_cost)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what a recipe is resolved for."""
    parser.add_argument("--model", default="ViT-B-16", help="open_clip name or preset (default: %(default)s)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the input (default: the model's own)")
    parser.add_argument("--text-tokens", type=float, default=14, metavar="MEAN",
                        help="mean caption length where text is cut (default: %(default)s tokens)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="assignments",
                        help="change a field of the recipe, e.g. passes.masked.mask_ratio=0.75")


def run_list(args: argparse.Namespace) -> None:
    """Print all recipes."""
    from rich.console import Console
    from rich.table import Table

    from aclip.recipes import RECIPES

    table = Table("recipe", "what it does", "paper", box=None, pad_edge=False)
    for recipe in RECIPES.values():
        table.add_row(f"[bold]{recipe.name}", recipe.title, recipe.paper)
    Console().print(table)


def run_show(args: argparse.Namespace) -> None:
    """Print one recipe, resolved for a model."""
    from rich.console import Console

    from aclip import config, models, plan
    from aclip.errors import ConfigError, unknown_name
    from aclip.recipes import RECIPES

    if args.name not in RECIPES:
        raise ConfigError(unknown_name("recipe", args.name, RECIPES))
    recipe = config.override(RECIPES[args.name], args.assignments)
    shape = models.shape_of(models.model_config(args.model, image_size=args.image_size))
    check_text_tokens(args.text_tokens, shape)
    console = Console()
    console.print(dataflow_table(plan.resolve(recipe, shape), args.model, args.text_tokens))


def run_cost(args: argparse.Namespace) -> None:
    """Print tokens and arithmetic of several recipes."""
    from rich.console import Console

    from aclip import config, models, plan
    from aclip.errors import ConfigError, unknown_name
    from aclip.recipes import RECIPES

    for name in args.names:
        if name not in RECIPES:
            raise ConfigError(unknown_name("recipe", name, RECIPES))
    shape = models.shape_of(models.model_config(args.model, image_size=args.image_size))
    check_text_tokens(args.text_tokens, shape)
    plans = []
    for name in args.names or RECIPES:
        try:
            plans.append(plan.resolve(config.override(RECIPES[name], args.assignments), shape))
        except ConfigError as error:
            raise ConfigError(f"recipe '{name}': {error}") from error
    console = Console(highlight=False)
    console.print(cost_table(plans, args.model, args.text_tokens))
    console.print("A trained module counts three times its forward pass, one without gradient (EMA, scored) once, "
                  "divided by the epochs for which scores serve. / clip: CLIP with one full view and the same text; "
                  "\\[*] its text padded.")


def check_text_tokens(number: float, shape: TowerShape) -> None:
    """Refuse a mean length that no captions of this model have."""
    from aclip.errors import ConfigError

    if not 1 <= number <= shape.context_length:
        raise ConfigError(f"--text-tokens {number:g}: captions have between 1 and {shape.context_length} tokens here")


def cost_table(plans: Sequence[Plan], model: str, text_tokens: float) -> Table:
    """Return what a step of each recipe costs, by arithmetic: GMAC a pair, and in relation to CLIP."""
    from rich.table import Table

    table = Table(title=f"a training step on {model}, text padded to {plans[0].shape.context_length} or cut to "
                        f"{text_tokens:g} tokens", title_justify="left", box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("image tokens", no_wrap=True)
    for title in ("GMAC, padded", "GMAC, cut", "/ clip, padded", "/ clip, cut", "/ clip, cut \\[*]"):
        table.add_column(title, justify="right")
    for one in plans:
        tokens = ", ".join(f"{f'{len(p.spec.views)}x' if len(p.spec.views) > 1 else ''}{p.num_tokens}"
                           + ("" if p.learns else " EMA" if p.spec.encoder == "ema" else " scored")
                           + (f" / {p.spec.refresh}" if p.spec.refresh > 1 else "") for p in one.passes)
        gmacs = (f"{macs / 1e9:.3g}" for macs in (one.macs(), one.macs(text_tokens)))
        ratios = one.relative_cost(), one.relative_cost(text_tokens), relative_to_padded(one, text_tokens)
        table.add_row(f"[bold]{one.recipe.name}", tokens, *gmacs, *(f"{ratio:.2f}" for ratio in ratios))
    return table


def relative_to_padded(one: Plan, text_tokens: float) -> float:
    """Return the cost with text cut to `text_tokens`, over that of CLIP with text at full length."""
    return one.macs(text_tokens) / (one.macs() / one.relative_cost())


def dataflow_table(resolved: Plan, model: str, text_tokens: float) -> Table:
    """Return a recipe's steps as a table, in the order in which they run."""
    from rich.table import Table

    recipe = resolved.recipe
    table = Table(title=f"[bold]{recipe.name}[/bold] on {model}: {recipe.title} ({recipe.paper})",
                  title_justify="left", show_header=False, box=None, pad_edge=False)
    options = ", ".join(f"{k}={v}" for k, v in recipe.view_options.items())
    table.add_row("views", f"{recipe.views}({options}) -> {', '.join(resolved.pipeline.names)}")
    for text in resolved.texts:
        table.add_row(f"text '{text.spec.name}'", describe_text(text, resolved.shape))
    for p in resolved.passes:
        spec = p.spec
        masking = f"{spec.masking} masking, " if spec.masking != "none" else ""
        if spec.scores_from:
            masking += f"scores from '{spec.scores_from}', "
        table.add_row(
            f"pass '{spec.name}'",
            f"{' + '.join(spec.views)} at {p.image_size[0]} x {p.image_size[1]} -> {masking}"
            f"{p.num_keep} of {p.num_patches} patches {'seen, mask tokens for the others' if spec.fill else 'kept'}, "
            f"{p.num_tokens} tokens -> {spec.encoder} encoder"
            + (", without gradient" if spec.encoder == "online" and not p.learns else "")
            + (f", scores serve for {spec.refresh} epochs" if spec.refresh > 1 else ""),
        )
    for o in recipe.objectives:
        settings = "".join(f", {k} {v}" for k, v in o.options.items())
        table.add_row(f"objective '{o.name}'", f"weight {o.weight:g}, reads {' -> '.join(o.reads)}{settings}")
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
        f"({resolved.macs(text_tokens) / 1e9:.2f} GMAC a pair; towers and decoders)",
    )
    for note in resolved.notes:
        table.add_row("note", note)
    return table


def describe_text(text: TextPlan, shape: TowerShape) -> str:
    """Return what a text pass encodes, in words."""
    cut = "cut after the longest caption of the batch" if shape.text_cut else "full length"
    words = f"{cut}, at most {shape.context_length} tokens"
    if text.reduction is not None:
        words += f", reduced to {text.reduction.num_keep} by '{text.spec.reduction}'"
    if text.spec.mask_ratio > 0:
        words += f", {text.spec.mask_ratio:.0%} of the words hidden"
    return words + ("" if text.encoded else ", not encoded")
