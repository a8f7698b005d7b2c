"""The methods as data: one recipe a file, one line each in `RECIPES`; the paper's ablations share a file.

To add one: a file that builds a `Recipe`, and a line in the table; the contract tests run over the table.
"""

from aclip.config import Recipe
from aclip.recipes.a_clip import A_CLIP
from aclip.recipes.a_clip_eff import A_CLIP_EFF
from aclip.recipes.a_clip_released import A_CLIP_RELEASED
from aclip.recipes.ablations import ABLATIONS
from aclip.recipes.byol import BYOL
from aclip.recipes.clip import CLIP
from aclip.recipes.clip_words import CLIP_WORDS
from aclip.recipes.flip import FLIP
from aclip.recipes.mae import MAE
from aclip.recipes.maskclip import MASKCLIP, MASKCLIP_TEXT
from aclip.recipes.siglip import SIGLIP
from aclip.recipes.simclr import SIMCLR
from aclip.recipes.simmim import SIMMIM
from aclip.recipes.slip import SLIP

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        CLIP, FLIP, SLIP, MASKCLIP, MASKCLIP_TEXT, A_CLIP, A_CLIP_EFF, A_CLIP_RELEASED, *ABLATIONS,
        MAE, SIMMIM, SIMCLR, BYOL, SIGLIP, CLIP_WORDS,
    )
}

__all__ = ["RECIPES"]
