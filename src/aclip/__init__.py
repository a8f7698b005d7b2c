"""attentive-clip: train CLIP models that look only at what matters.

    import aclip
    run = aclip.train(recipe="a-clip", model="ViT-B-16", data="pairs.csv", validation="held-out.csv",
                      epochs=10, output="runs/first")
    run.evaluate(data="held-out.csv")
    model = aclip.load("runs/first")

Everything public is imported on first use, so that `import aclip` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from aclip.version import VERSION

if TYPE_CHECKING:
    from aclip.comparison import compare
    from aclip.config import EmaMomentum, ObjectiveConfig, Optimization, Pass, Recipe, RunConfig, TextPass
    from aclip.data import SETS, SOURCES
    from aclip.evaluation import EVALUATORS, evaluate
    from aclip.explanation import Explanation, explain
    from aclip.exporters import EXPORTERS, export
    from aclip.masking import MASKING
    from aclip.merging import merge
    from aclip.models import load
    from aclip.objectives import OBJECTIVES
    from aclip.objectives import functional as losses
    from aclip.recipes import RECIPES, configure
    from aclip.runs import Run, train
    from aclip.search.commands import index, serve
    from aclip.search.store import Index

__version__ = VERSION

_HOMES = {
    **dict.fromkeys(("train", "Run"), "aclip.runs"),
    **dict.fromkeys(("evaluate", "EVALUATORS"), "aclip.evaluation"),
    **dict.fromkeys(("export", "EXPORTERS"), "aclip.exporters"),
    **dict.fromkeys(("configure", "RECIPES"), "aclip.recipes"),
    **dict.fromkeys(("Recipe", "Pass", "TextPass", "ObjectiveConfig", "EmaMomentum", "Optimization", "RunConfig"),
                    "aclip.config"),
    **dict.fromkeys(("SETS", "SOURCES"), "aclip.data"),
    **dict.fromkeys(("explain", "Explanation"), "aclip.explanation"),
    **dict.fromkeys(("index", "serve"), "aclip.search.commands"),
    "Index": "aclip.search.store",
    "compare": "aclip.comparison",
    "load": "aclip.models",
    "merge": "aclip.merging",
    "MASKING": "aclip.masking",
    "OBJECTIVES": "aclip.objectives",
}
__all__ = [
    "EVALUATORS", "EXPORTERS", "MASKING", "OBJECTIVES", "RECIPES", "SETS", "SOURCES", "EmaMomentum", "Explanation",
    "Index", "ObjectiveConfig", "Optimization", "Pass", "Recipe", "Run", "RunConfig", "TextPass", "compare",
    "configure", "evaluate", "explain", "export", "index", "load", "losses", "merge", "serve", "train",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("aclip.objectives.functional")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'aclip' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
