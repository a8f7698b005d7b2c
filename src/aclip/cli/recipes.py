"""`aclip recipes`: list the methods, and show what one of them does on a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from aclip.plan import Plan

EXAMPLES = """\
examples:
  aclip recipes
  aclip recipes show a-clip --model ViT-B-16
  aclip recipes show a-clip --model vit-tiny --set passes.masked.mask_ratio=0.75
"""


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "recipes", help="list the methods, show one's dataflow and cost", epilog=EXAMPLES,
        description="List the training methods, or show the resolved dataflow of one: views -> passes -> "
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
    show.add_argument("--model", default="ViT-B-16", help="open_clip name or preset (default: %(default)s)")
    show.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the input (default: the model's own)")
    show.add_argument("--text-tokens", type=float, default=14, metavar="MEAN",
                      help="mean caption length for the second cost figure (default: %(default)s tokens)")
    show.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="assignments",
                      help="change a field of the recipe, e.g. passes.masked.mask_ratio=0.75")
    show.set_defaults(run=run_show)


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

    from aclip import config, plan, towers
    from aclip.errors import ConfigError, unknown_name
    from aclip.recipes import RECIPES

    if args.name not in RECIPES:
        raise ConfigError(unknown_name("recipe", args.name, RECIPES))
    recipe = config.override(RECIPES[args.name], args.assignments)
    shape = towers.shape_of(towers.model_config(args.model, image_size=args.image_size))
    console = Console()
    console.print(dataflow_table(plan.resolve(recipe, shape), args.model, args.text_tokens))


def dataflow_table(resolved: Plan, model: str, text_tokens: float) -> Table:
    """Return a recipe's steps as a table, in the order in which they run."""
    from rich.table import Table

    recipe = resolved.recipe
    table = Table(title=f"[bold]{recipe.name}[/bold] on {model}: {recipe.title} ({recipe.paper})",
                  title_justify="left", show_header=False, box=None, pad_edge=False)
    options = ", ".join(f"{k}={v}" for k, v in recipe.view_options.items())
    table.add_row("views", f"{recipe.views}({options}) -> {', '.join(resolved.pipeline.names)}")
    if resolved.uses_text:
        cut = "cut after the longest caption of the batch" if resolved.shape.text_cut else "full length"
        table.add_row("text", f"{cut}, at most {resolved.shape.context_length} tokens")
    for p in resolved.passes:
        spec = p.spec
        masking = f"{spec.masking} masking, " if spec.masking != "none" else ""
        if spec.scores_from:
            masking += f"scores from '{spec.scores_from}', "
        table.add_row(
            f"pass '{spec.name}'",
            f"{' + '.join(spec.views)} at {p.image_size[0]} x {p.image_size[1]} -> {masking}"
            f"{p.num_keep} of {p.num_patches} patches kept, {p.num_tokens} tokens -> {spec.encoder} encoder",
        )
    for o in recipe.objectives:
        settings = "".join(f", {k} {v}" for k, v in o.options.items())
        table.add_row(f"objective '{o.name}'", f"weight {o.weight:g}, reads {' -> '.join(o.reads)}{settings}")
    if recipe.ema_momentum:
        table.add_row("EMA", f"momentum {recipe.ema_momentum.start} -> {recipe.ema_momentum.end}, "
                             "after each optimizer step")
    if recipe.freeze:
        table.add_row("frozen", ", ".join(recipe.freeze))
    table.add_row(
        "cost",
        f"{resolved.relative_cost():.2f} of CLIP with text padded to {resolved.shape.context_length}, "
        f"{resolved.relative_cost(text_tokens):.2f} with text cut to {text_tokens:g} "
        f"({resolved.macs(text_tokens) / 1e9:.2f} GMAC a pair; towers alone)",
    )
    for note in resolved.notes:
        table.add_row("note", note)
    return table
