"""The methods as data: one recipe a file, one line each in `RECIPES`.

To add one: a file that builds a `Recipe`, and a line in the table; the contract tests run over the table.
"""

from aclip.config import Recipe
from aclip.recipes.a_clip import A_CLIP
from aclip.recipes.a_clip_eff import A_CLIP_EFF
from aclip.recipes.a_clip_released import A_CLIP_RELEASED
from aclip.recipes.clip import CLIP
from aclip.recipes.flip import FLIP

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (CLIP, FLIP, A_CLIP, A_CLIP_EFF, A_CLIP_RELEASED)
}

__all__ = ["RECIPES"]
