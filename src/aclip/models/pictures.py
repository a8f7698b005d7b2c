"""Pictures as people have them: paths, Pillow images, arrays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from aclip.data.decode import as_rgb, decode_image
from aclip.errors import BadSampleError, DataError

Picture = str | Path | Image.Image | np.ndarray
"""A path; a Pillow image of any mode; or an array: (h, w, 3) RGB, (h, w, 4) with alpha or (h, w) grey, uint8."""

BadPictures = Literal["raise", "nan"]
"""What becomes of a picture that cannot be used: an error, or a row of NaN in its place."""


def open_picture(picture: Picture) -> Image.Image:
    """Return a picture upright, in RGB, transparency on white: as training and evaluation see it.

    Raises:
        BadSampleError: it cannot be used.
    """
    if isinstance(picture, str | Path):
        try:
            data = Path(picture).read_bytes()
        except OSError as error:
            raise BadSampleError(error.strerror or str(error)) from error
        return decode_image(data)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))):
            raise BadSampleError(f"an array of {picture.dtype} and shape {picture.shape}: pictures are uint8, "
                                 "(h, w, 3) RGB, (h, w, 4) with alpha or (h, w) grey")
        picture = Image.fromarray(picture)
    return as_rgb(picture)


class PreparePictures:
    """What a reading process does: (number, picture) pairs to a batch of pixels, bad pictures as NaN or an error."""

    def __init__(self, preprocess: Callable[[Any], Tensor], bad: BadPictures, shape: tuple[int, int, int]) -> None:
        self._preprocess, self._bad, self._shape = preprocess, bad, shape

    def __call__(self, pictures: list[tuple[int, Picture]]) -> Float[Tensor, "B 3 h w"]:
        """Return the pixels.

        Raises:
            DataError: a picture that cannot be used, named.
        """
        return torch.stack([self._prepare(number, picture) for number, picture in pictures])

    def _prepare(self, number: int, picture: Picture) -> Float[Tensor, "3 h w"]:
        try:
            return self._preprocess(open_picture(picture))
        except BadSampleError as error:
            if self._bad == "nan":
                return torch.full(self._shape, float("nan"))
            name = picture if isinstance(picture, str | Path) else f"picture {number}"
            raise DataError(f"{name} cannot be used: {error.reason} (bad='nan' puts NaN in its place)") from error
