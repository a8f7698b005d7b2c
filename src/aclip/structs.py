"""The tensors that travel between layers.

Letters used in every shape of the project:

    B samples, V views, N patches, K kept patches, P prefix tokens (CLS, registers), L = P + patches,
    C tower width, D joint width, T text length, H heads.

Patches are numbered row by row on the patch grid; the CLS token is never counted. Boxes are
(top, left, height, width) in pixels of the decoded source image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


class TensorFields:
    """A dataclass of tensors, nested ones and mappings of them included."""

    def to(self, device: torch.device, non_blocking: bool = True) -> Self:
        """Return a copy on `device`; what is not a tensor is shared."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory (the DataLoader calls this by name)."""
        return self.map(lambda tensor: tensor.pin_memory())

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with `function` applied to every tensor."""
        def visit(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, TensorFields):
                return value.map(function)
            if isinstance(value, Mapping):
                return {key: visit(item) for key, item in value.items()}
            return value

        changes = {f.name: visit(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True)
class ViewBatch(TensorFields):
    """One named view of a batch of images, as the loader delivers it.

    Attributes:
        pixels: (B, 3, h, w) uint8, cropped and resized, not yet augmented or normalised; from the loader in
            torch's channels_last layout.
        boxes: (B, 4) float32, the crop (top, left, height, width) in source pixels.
        flipped: (B,) bool, whether the crop has been mirrored left to right.
        augmentation: (B, A) float32 parameters drawn per sample, or None for a plain view;
            `aclip.data.augment` names the columns.
    """

    pixels: UInt8[Tensor, "B 3 h w"]
    boxes: Float[Tensor, "B 4"]
    flipped: Bool[Tensor, " B"]
    augmentation: Float[Tensor, "B A"] | None = None


@dataclass(frozen=True)
class Batch(TensorFields):
    """What one optimizer step reads.

    Attributes:
        views: view name -> `ViewBatch`.
        tokens: (B, T) int64 token ids, cut after the batch's longest caption where the tower allows it.
        caption_ids: (B,) int64; equal ids mean the same caption (tags aside), so that two images of one concept
            are not each other's negatives.
        seeds: (B,) int64, the per-sample, per-epoch seed of everything drawn on the device.
        keys: the samples' names, for reports.
        skipped: (name, reason) of bad samples met while this batch was filled; each was replaced by another.
        truncated: number of captions cut at the context length.
        stored: frozen pass -> (B, V, D), frozen text pass -> (B, D), float16, L2-normalised, where a teacher's features
            are read and not computed.
    """

    views: Mapping[str, ViewBatch]
    tokens: Int[Tensor, "B T"]
    caption_ids: Int[Tensor, " B"]
    seeds: Int[Tensor, " B"]
    keys: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    truncated: int = 0
    stored: Mapping[str, Float[Tensor, "B *rest"]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of pairs B."""
        return int(self.tokens.shape[0])

    def rows(self, rows: slice) -> "Batch":
        """Return some of the samples, with tokens as long as the whole batch's and without `skipped`."""
        return replace(self.map(lambda tensor: tensor[rows]), keys=self.keys[rows], skipped=(), truncated=0)


@dataclass(frozen=True)
class ImageEncoding:
    """What an image tower returns for one stack of images.

    Attributes:
        features: (B, D) projected into the joint space, not normalised.
        cls: (B, C) the pooled token after the final norm, before the projection.
        scores: (B, N) CLS-to-patch attention averaged over layers and heads, or None if not asked for.
        patches: (B, M, C) the patch tokens after the final norm, or None if not asked for; M is K where patches
            left the sequence, else N.
        num_tokens: tokens that went through the blocks, prefix included (L).
    """

    features: Float[Tensor, "B D"]
    cls: Float[Tensor, "B C"]
    scores: Float[Tensor, "B N"] | None
    patches: Float[Tensor, "B M C"] | None
    num_tokens: int


@dataclass(frozen=True)
class Encoded(TensorFields):
    """One pass of a recipe: V views of the batch through one encoder.

    Attributes:
        features: (V, B, D) projected and L2-normalised; of width 0 if only the scores are read.
        cls: (V, B, C) the pooled token after the final norm, which self-supervised heads read; of width 0 then, too.
        scores: (V, B, N) or None; only a pass that a later pass reads scores from has them.
        keep_indices: (V, B, K) int64 ascending, or None where nothing was removed.
        num_tokens: tokens per view that went through the blocks, prefix included.
        grid_size: patches (down, across) of a whole view; N = down * across.
        pixels: (V, B, 3, h, w) the normalised views, with all their patches, where an objective reads them.
        patches: (V, B, M, C) the patch tokens after the final norm, where an objective reads them; M is K where
            patches left the sequence, else N.
    """

    features: Float[Tensor, "V B D"]
    cls: Float[Tensor, "V B C"]
    scores: Float[Tensor, "V B N"] | None
    keep_indices: Int[Tensor, "V B K"] | None
    num_tokens: int
    grid_size: tuple[int, int]
    pixels: Float[Tensor, "V B 3 h w"] | None = None
    patches: Float[Tensor, "V B M C"] | None = None


@dataclass(frozen=True)
class EncodedText(TensorFields):
    """One text pass of a recipe.

    Attributes:
        tokens: (B, T) int64, the captions' own tokens, before any are hidden from the encoder.
        features: (B, D) projected and L2-normalised; None if tokens are hidden, or if only the tokens are read.
        hidden: (B, T) bool, which tokens are to be predicted; None if none are hidden.
        states: (B, T, C) every token after the final norm if tokens are hidden, else None.
    """

    tokens: Int[Tensor, "B T"]
    features: Float[Tensor, "B D"] | None = None
    hidden: Bool[Tensor, "B T"] | None = None
    states: Float[Tensor, "B T C"] | None = None


@dataclass(frozen=True)
class EncodedBatch:
    """A batch, encoded.

    Attributes:
        texts: text pass name -> `EncodedText`.
        passes: pass name -> `Encoded`, in declared order.
    """

    texts: Mapping[str, EncodedText]
    passes: Mapping[str, Encoded]


@dataclass(frozen=True)
class StepContext(EncodedBatch):
    """What objectives read: a batch, encoded, and what else was computed before them in this step.

    Attributes:
        caption_ids: (B,) int64.
        logit_scale: scalar multiplier, already exponentiated, or None without text.
        logit_bias: the bias that the model adds to logits, or None.
        frozen_logit_scale: the frozen model's multiplier, or None without it or without text.
    """

    caption_ids: Int[Tensor, " B"]
    logit_scale: Float[Tensor, ""] | None
    logit_bias: Float[Tensor, ""] | None = None
    frozen_logit_scale: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class StepOutput:
    """What one step returns.

    Attributes:
        loss: the weighted sum to differentiate.
        parts: objective name -> unweighted, detached loss.
        passes: as in `StepContext`, for snapshots and tests.
    """

    loss: Float[Tensor, ""]
    parts: Mapping[str, Float[Tensor, ""]]
    passes: Mapping[str, Encoded] = field(default_factory=dict)


@dataclass(frozen=True)
class TowerShape:
    """The sizes of a model that plans, heads and costs need.

    Attributes:
        image_size, patch_size: (height, width) in pixels.
        width, layers, heads, mlp_width: of the image tower (C, depth, H, hidden width of an MLP; of a gated one, the
            hidden width of the plain MLP with as many weights).
        joint_dim: D.
        num_prefix_tokens: P, 1 for a CLS token, and registers.
        text_width, text_layers, text_mlp_width, context_length, vocab_size: of the text tower.
        text_cut: whether text may be cut after the longest EOT (causal and EOT-pooled).
        scored: whether the tower has attention scores (`models.encode_image`): what it pools attends to the patches.
        pool_mlp_width: hidden width of the MLP behind the query that pools the patches (SigLIP's); 0 where none does.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    width: int
    layers: int
    heads: int
    mlp_width: int
    joint_dim: int
    num_prefix_tokens: int
    text_width: int
    text_layers: int
    text_mlp_width: int
    context_length: int
    vocab_size: int
    text_cut: bool
    scored: bool = True
    pool_mlp_width: int = 0

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches (down, across) at the model's own image size."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]
