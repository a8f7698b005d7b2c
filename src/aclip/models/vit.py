"""The parts of an image tower under one set of names, and the sizes of its images and patches."""

import re
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from aclip.errors import ConfigError


class Vit:
    """The parts of an image tower under one set of names: open_clip's `VisionTransformer` here, timm's in `TimmVit`.

    Holds no state of its own.

    Attributes:
        visual: the image tower itself.
        stack: the module that holds the transformer blocks, for `run_blocks`.
        grid_size: patches (down, across) at the tower's own image size.
        patch_embedding: the convolution that embeds patches; its stride is its kernel size.
        num_prefix_tokens: P, class token and registers; never counted as patches and never removed.
        scored_by: the source of attention scores, None if there is none. A class token that is not pooled is no
            source: no loss reaches its last query, and nothing teaches the earlier ones to look for content.
        reads_first: whether only the first token is read after the blocks.
    """

    scored_by: Literal["class token", "pool"] | None

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.stack = visual.transformer
        self.grid_size: tuple[int, int] = tuple(visual.grid_size)
        self.patch_embedding: nn.Conv2d = visual.conv1
        self.num_prefix_tokens = 1
        self.reads_first: bool = visual.pool_type == "tok"
        self.scored_by = "class token" if self.reads_first else None

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        height, width = self.patch_embedding.kernel_size
        return int(height), int(width)

    def patch_positions(self) -> Float[Tensor, "N C"]:
        """Return the position embeddings of the patches on the tower's own grid, row by row."""
        return cast(Tensor, self.visual.positional_embedding[1:])

    def prefix(self) -> Float[Tensor, "P C"]:
        """Return class token and registers, their positions added."""
        return cast(Tensor, self.visual.class_embedding + self.visual.positional_embedding[0])[None]

    def before_blocks(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        """Apply the norm before the blocks, if there is one."""
        return cast(Tensor, self.visual.ln_pre(x))

    def pool(
        self, x: Float[Tensor, "B L C"], with_scores: bool
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"] | None]:
        """Return the pooled token after the final norm, and the pool's scores if asked for and `scored_by` is "pool".

        If `reads_first`, `x` may hold the first token alone.
        """
        if self.reads_first:
            return self.visual.ln_post(x[:, 0]), None
        if self.visual.final_ln_after_pool:
            return self.visual.ln_post(x[:, 1:].mean(dim=1)), None
        return self.visual.ln_post(x)[:, 1:].mean(dim=1), None

    def project(self, pooled: Float[Tensor, "B C"]) -> Float[Tensor, "B D"]:
        """Map the pooled token into the joint space."""
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    def norm_patches(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B M C"]:
        """Apply the final norm to patch tokens."""
        return cast(Tensor, self.visual.ln_post(x))

    def drop_projection(self) -> None:
        """Remove the projection into the joint space; features are the pooled token from then on."""
        self.visual.proj = None

    def resize(self, image_size: tuple[int, int], positions: Float[Tensor, "N C"]) -> None:
        """Change the tower's own image size and the positions of its patches, in place."""
        visual = self.visual
        whole = torch.cat([visual.positional_embedding[:1].detach(), positions])
        visual.positional_embedding = nn.Parameter(whole, visual.positional_embedding.requires_grad)
        visual.image_size = image_size
        visual.grid_size = grid_of(image_size, self.patch_size)
        visual.preprocess_cfg = {**visual.preprocess_cfg, "size": image_size}


def grid_of(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Return the patch grid (down, across) of an image; both sizes are (height, width) in pixels.

    Raises:
        ConfigError: not a whole number of patches.
    """
    (height, width), (patch_height, patch_width) = image_size, patch_size
    if height < 1 or width < 1 or height % patch_height or width % patch_width:
        raise ConfigError(f"images of {height} x {width} pixels cannot be cut into patches of "
                          f"{patch_height} x {patch_width}: both sides must be positive multiples")
    return height // patch_height, width // patch_width


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) from one integer or two.

    Raises:
        ConfigError: anything else.
    """
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise ConfigError(f"an image size is a whole number of pixels, or two of them (height, width), not {size!r}")
    height, width = sides
    return height, width


def parse_image_size(text: str) -> int | tuple[int, int]:
    """Return an image size in pixels from how it is typed: "224", or height and width as in "192x256".

    Raises:
        ConfigError: anything else.
    """
    sides = re.fullmatch(r"\s*(\d+)\s*(?:x\s*(\d+)\s*)?", text, re.IGNORECASE)
    if not sides or not all(int(side) for side in sides.groups() if side):
        raise ConfigError(f"an image size is one side in pixels, such as 224, or HEIGHTxWIDTH, such as 192x256, not "
                          f"'{text}'")
    return int(sides[1]) if sides[2] is None else (int(sides[1]), int(sides[2]))


def resample_positions(
    positions: Float[Tensor, "N C"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "M C"]:
    """Interpolate position embeddings between grids (down, across): bicubic, antialiased, corners not aligned."""
    image = positions.unflatten(0, old).permute(2, 0, 1)[None].float()
    resized = F.interpolate(image, new, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].flatten(1).T.to(positions.dtype)
