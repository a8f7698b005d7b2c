"""What `make docs` adds to the pages: the table of recipes, and the example scripts in full."""

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with what is generated, and without links to files that are no part of the site."""
    if page.file.src_uri == "recipes.md":
        markdown += recipes()
    if page.file.src_uri == "extend.md":
        markdown += scripts()
    return re.sub(r"\[([^]]+)]\((?:\.\./)[^)]*\)", r"\1", markdown)


def recipes() -> str:
    """Return every recipe of `aclip.RECIPES`: title, cost at ViT-B/16, paper and what its docstring says."""
    from aclip import RECIPES
    from aclip.models import model_config, shape_of
    from aclip.plan import resolve

    shape = shape_of(model_config("ViT-B-16"))
    costs = {name: resolve(recipe, shape).relative_cost() for name, recipe in RECIPES.items()}
    lines = ["", "## All recipes", "", "| recipe | what it does | cost | paper |", "| --- | --- | --- | --- |"]
    lines += [f"| `{name}` | {recipe.title} | {costs[name]:.2f} | {recipe.paper} |" for name, recipe in RECIPES.items()]
    for module in sorted((ROOT / "src/aclip/recipes").glob("[!_]*.py")):
        tree = ast.parse(module.read_text(encoding="utf-8"))
        lines += ["", f"## {str(ast.get_docstring(tree)).partition(chr(10))[0].partition(':')[0]}"]
        for recipe, said in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(recipe, ast.Assign) and isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant):
                lines += ["", f"### {recipe.targets[0].id.lower().replace('_', '-')}", "",  # type: ignore[attr-defined]
                          str(said.value.value)]
    return "\n".join(lines) + "\n"


def scripts() -> str:
    """Return the scripts of docs/examples."""
    parts = [f"\n## {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
             for path in sorted((ROOT / "docs/examples").glob("*.py"))]
    return "".join(parts)
