"""Where an image answers a text: patches in the joint space."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aclip.models.vision import encode_image, vit_of


class _EachToItself(TorchFunctionMode):
    """Lets the last attention of a forward pass attend from each token to itself alone: its output is its values."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.left -= 1
            if self.left == 0:
                return args[2]
        return function(*args, **kwargs or {})


@torch.no_grad()
def text_maps(
    visual: nn.Module, pixels: Float[Tensor, "B 3 h w"], text_features: Float[Tensor, "T D"]
) -> Float[Tensor, "B T N"]:
    """Return the cosine similarity of each patch, in the joint space, to each text.

    Args:
        visual: an image tower, as `encode_image` takes it.
        pixels: (B, 3, h, w) float32, normalised.
        text_features: (T, D), L2-normalised.
    """
    vit = vit_of(visual)
    with _EachToItself(len(vit.stack.resblocks if hasattr(vit.stack, "resblocks") else vit.stack.blocks)):
        patches = encode_image(visual, pixels, return_patches=True).patches
    assert patches is not None
    return text_features @ F.normalize(vit.project(patches), dim=-1).mT
