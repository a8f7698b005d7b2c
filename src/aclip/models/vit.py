"""What encoding pictures needs to know of a ViT, whoever wrote it: open_clip's own here, timm's in `timm_vit`."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Asker = Literal["class token", "pool"]
"""Whose attention ranks the patches."""


class Vit(ABC):
    """A ViT by its parts, with one set of names for all families. Holds no state of its own.

    Attributes:
        visual: the image tower itself, as it stands in the model.
        stack: what holds the transformer blocks, for `blocks.run_blocks`.
        grid_size: patches (down, across) at the tower's own image size.
        num_prefix_tokens: P, class token and registers; they are never counted as patches and never removed.
        asker: whose attention the scores are, None where no token asks for the patches. A class token that is not read
            after the blocks does not: no loss sees its last query, and nothing makes the earlier ones look for content.
        reads_first: whether only the first token is read after the blocks.
    """

    visual: Any
    stack: Any
    grid_size: tuple[int, int]
    num_prefix_tokens: int
    asker: Asker | None
    reads_first: bool

    @property
    @abstractmethod
    def patch_embedding(self) -> nn.Conv2d:
        """The convolution that embeds patches; its stride is its kernel size."""

    @property
    def attention_pool(self) -> nn.Module | None:
        """The module that pools the patches by attention, if one does."""
        return None

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        height, width = self.patch_embedding.kernel_size
        return int(height), int(width)

    @abstractmethod
    def patch_positions(self) -> Float[Tensor, "N C"]:
        """Return the positions of the patches on the tower's own grid, row by row."""

    @abstractmethod
    def prefix(self) -> Float[Tensor, "P C"]:
        """Return class token and registers, with their positions where they have any."""

    @abstractmethod
    def before_blocks(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        """Apply the norm before the blocks, if there is one."""

    @abstractmethod
    def pool(
        self, x: Float[Tensor, "B L C"], with_scores: bool
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"] | None]:
        """Return the pooled token after the final norm, and the pool's scores if it is the asker and they are wanted.

        `x` holds the first token alone where that is all that is read.
        """

    @abstractmethod
    def project(self, pooled: Float[Tensor, "B C"]) -> Float[Tensor, "B D"]:
        """Map the pooled token into the joint space."""

    @abstractmethod
    def norm_patches(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B M C"]:
        """Apply the final norm to patch tokens."""

    @abstractmethod
    def drop_projection(self) -> None:
        """Take the projection into the joint space away: features are the pooled token from then on."""

    @abstractmethod
    def resize(self, image_size: tuple[int, int], positions: Float[Tensor, "N C"]) -> None:
        """Make this the tower's own image size, with these positions of the patches."""


class OpenClipVit(Vit):
    """open_clip's `VisionTransformer` of plain blocks: one class token, always."""

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.stack = visual.transformer
        self.grid_size = tuple(visual.grid_size)
        self.num_prefix_tokens = 1
        self.reads_first = visual.pool_type == "tok"
        self.asker = "class token" if self.reads_first else None

    @property
    def patch_embedding(self) -> nn.Conv2d:
        conv: nn.Conv2d = self.visual.conv1
        return conv

    def patch_positions(self) -> Float[Tensor, "N C"]:
        positions: Tensor = self.visual.positional_embedding[1:]
        return positions

    def prefix(self) -> Float[Tensor, "P C"]:
        cls: Tensor = self.visual.class_embedding + self.visual.positional_embedding[0]
        return cls[None]

    def before_blocks(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        normed: Tensor = self.visual.ln_pre(x)
        return normed

    def pool(
        self, x: Float[Tensor, "B L C"], with_scores: bool
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B N"] | None]:
        """Return the class token after the final norm, or the mean over patches before or after it."""
        pooled: Tensor
        if self.reads_first:
            pooled = self.visual.ln_post(x[:, 0])
        elif self.visual.final_ln_after_pool:
            pooled = self.visual.ln_post(x[:, 1:].mean(dim=1))
        else:
            pooled = self.visual.ln_post(x)[:, 1:].mean(dim=1)
        return pooled, None

    def project(self, pooled: Float[Tensor, "B C"]) -> Float[Tensor, "B D"]:
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    def norm_patches(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B M C"]:
        normed: Tensor = self.visual.ln_post(x)
        return normed

    def drop_projection(self) -> None:
        self.visual.proj = None

    def resize(self, image_size: tuple[int, int], positions: Float[Tensor, "N C"]) -> None:
        visual = self.visual
        whole = torch.cat([visual.positional_embedding[:1].detach(), positions])
        visual.positional_embedding = nn.Parameter(whole, visual.positional_embedding.requires_grad)
        visual.image_size = image_size
        visual.grid_size = (image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1])
        visual.preprocess_cfg = {**visual.preprocess_cfg, "size": image_size}
