"""`aclip.explain`: what a model looks at in an image, what training would keep, and where the image answers a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

if TYPE_CHECKING:
    from aclip.models import LoadedModel
    from aclip.models.loaded import ImageLike

SHOWN = 448  # pixels: the shorter side of the displayed image, at least


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a model sees in one image, on its grid of H_p x W_p patches.

    Attributes:
        image: the part of the image that the model sees, RGB, large enough to look at.
        texts: T texts.
        attention: (H_p, W_p) in [0, 1], of the class token (or the attention pool) to each patch.
        kept: (H_p, W_p), the patches that attentive masking would keep.
        maps: (T, H_p, W_p), where the image answers each text; comparable between texts.
        similarity: (T,) cosine similarity of the image to each text, in [-1, 1].
    """

    image: Image.Image
    texts: tuple[str, ...]
    attention: Float[np.ndarray, "H_p W_p"]
    kept: Bool[np.ndarray, "H_p W_p"]
    maps: Float[np.ndarray, "T H_p W_p"]
    similarity: Float[np.ndarray, " T"]


def explain(
    model: LoadedModel, images: Iterable[ImageLike], texts: Iterable[str] = (), keep: float = 0.5
) -> list[Explanation]:
    """Show where a model looks in images, which patches training would keep, and where images answer texts.

    Args:
        model: see `aclip.load`.
        images: paths, Pillow images or uint8 arrays.
        texts: texts to look for in every image.
        keep: fraction of the patches that is kept, in (0, 1].

    Raises:
        ConfigError: a fraction out of range.
        DataError: an image that cannot be used.
        UnsupportedModelError: a tower without attention scores, or texts for a model without a text tower.
    """
    import torch

    from aclip.data.evaluation_set import limit_aspect
    from aclip.errors import BadSampleError, ConfigError, DataError
    from aclip.models import visual_of, vit_of
    from aclip.models.loaded import open_image
    from aclip.models.maps import text_maps
    from aclip.models.vision import grid_of

    texts = tuple(texts)
    if not 0 < keep <= 1:
        raise ConfigError(f"keep is the fraction of patches that is kept, above 0 and at most 1, not {keep:g}")
    visual, enlarged = visual_of(model.model), model.display_transform(SHOWN)
    text_features = model.encode_texts(texts).to(model.device) if texts else None
    explanations = []
    for number, given in enumerate(images):
        try:
            image = limit_aspect(open_image(given))
        except BadSampleError as error:
            name = f"image {number}" if isinstance(given, Image.Image | np.ndarray) else given
            raise DataError(f"{name} cannot be used: {error.reason}") from error
        pixels = model.preprocess(image)[None].to(model.device)
        grid = grid_of((pixels.shape[-2], pixels.shape[-1]), vit_of(visual).patch_size)
        maps, similarity = torch.zeros(0, *grid), torch.zeros(0)
        if text_features is not None:
            maps = text_maps(visual, pixels, text_features)[0].unflatten(1, grid)
            with torch.no_grad():
                similarity = text_features @ model.encode_image(pixels)[0]
        attention, kept = model.attention_scores(pixels), model.keep_mask(pixels, 1 - keep)
        explanations.append(Explanation(
            enlarged(image), texts, attention.view(grid).cpu().numpy(), kept.view(grid).cpu().numpy(),
            maps.cpu().numpy(), similarity.cpu().numpy()))
    return explanations
