"""attentive-clip: train CLIP models that look only at what matters.

Everything public is imported on first use, so that `import aclip` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aclip.evaluation import EVALUATORS
    from aclip.masking import MASKING
    from aclip.models import load
    from aclip.objectives import OBJECTIVES
    from aclip.recipes import RECIPES

__version__ = "0.1.0"
__all__ = ["EVALUATORS", "MASKING", "OBJECTIVES", "RECIPES", "__version__", "load"]

_HOMES = {
    "EVALUATORS": "aclip.evaluation",
    "MASKING": "aclip.masking",
    "OBJECTIVES": "aclip.objectives",
    "RECIPES": "aclip.recipes",
    "load": "aclip.models",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'aclip' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
