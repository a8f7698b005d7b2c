"""Encoding an evaluation set: image features, text features, and features of masked images.

Inside `sharding.sharded` each rank encodes its share and all ranks end with all features in the order of the set, so
that every metric is that of a single process.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.data import EvaluationSet, decode_image
from aclip.devices import synchronize
from aclip.errors import CheckpointError, ConfigError, DataError, unknown_name
from aclip.evaluation import sharding
from aclip.masking import AttentiveMasking, MaskingContext, MaskingStrategy, UniformMasking, crop_scores
from aclip.models import LoadedModel, encode_image, visual_of, vit_of
from aclip.structs import ImageEncoding

Space = Literal["joint", "trunk"]
"""Which image features are read: in the joint space with text, or before the projection into it, as probes do."""

TEXT_BATCH_SIZE = 256

CACHED_ELEMENTS = 2**26
"""Float32 entries of text features that are cached (256 MiB), such as 131,072 captions at 512."""

KEEP_BY = ("attentive", "attentive-half", "uniform")
"""The patches that the model's own [CLS] token attends to most; the same, scored on the image at half size, at a
quarter of the cost; random patches, the same ones of an image in every run."""


@dataclass(frozen=True)
class ImageFeatures:
    """An evaluation set after one pass through the image encoder.

    Attributes:
        features: float32, finite, on the encoder's device: L2-normalised in the joint space, or pooled tokens.
        captions: all captions of each image. labels: class of each image, or None. keys: name of each image.
        skipped: (name, reason) of images that could not be used.
        open_image: reads image i again, upright and in RGB; None where there is nothing to read.
    """

    features: Float[Tensor, "B _"]
    captions: tuple[tuple[str, ...], ...]
    labels: tuple[str | None, ...]
    keys: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    open_image: Callable[[int], Image.Image] | None = None

    def __len__(self) -> int:
        return len(self.captions)


def encode_image_set(
    model: LoadedModel, images: EvaluationSet, device: torch.device, *, space: Space = "joint",
    progress: Callable[[int], object] = lambda images: None,
) -> ImageFeatures:
    """Encode all images of a set (with sharding, of this rank's share of it) without gradient and in evaluation mode.

    `model` is on `device`, where the features stay; `progress` is called with the size of each finished batch. Raises
    a `DataError` without any usable image, a `CheckpointError` for features that are NaN or inf, on all ranks.
    """
    features: list[Tensor] = []
    about: list[tuple[tuple[str, ...], str | None, str, int]] = []
    with evaluating(model), torch.inference_mode(), sharding.raise_on_all_ranks():
        for batch in images:
            features.append(encode_batch(model, batch.pixels, device, space))
            about += zip(batch.all_captions, batch.labels, batch.keys, batch.indices, strict=True)
            progress(len(batch.keys))
    found = _gather(features, device)
    parts = sharding.collect((about, images.skipped))
    skipped = tuple(one for _, part in parts for one in part)
    if not len(found):
        raise DataError(f"nothing to evaluate: the set has no usable image ({len(skipped)} skipped)")
    check_finite(found, "images")
    captions, labels, keys, indices = zip(*(one for part, _ in parts for one in part), strict=True)
    return ImageFeatures(found, captions, labels, keys, skipped,
                         lambda i: decode_image(images.source.read(indices[i]).image))


def encode_batch(
    model: LoadedModel, pixels: Float[Tensor, "B 3 h w"], device: torch.device, space: Space = "joint"
) -> Float[Tensor, "B _"]:
    """Return float32 features of a batch on `device`, where the model is; L2-normalised in the joint space."""
    pixels = pixels.to(device)
    if space == "trunk":
        return model.encode_trunk(pixels).float()
    return F.normalize(model.encode_image(pixels).float(), dim=-1)


class TextEncoder:
    """A model's text tower, called with texts, and a cache of the features computed last; the weights must not change.

    It embeds classes once for all sets and evaluators, and a set's captions once for every fraction of patches kept.
    """

    def __init__(
        self, model: LoadedModel, device: torch.device, *, tokenizer: Callable[[list[str]], Tensor] | None = None
    ) -> None:
        """Wrap `model`, which is on `device`, where features stay; `tokenizer` replaces the model's own."""
        self.model, self.device = model, device
        self._tokenizer = tokenizer or model.tokenizer
        self._cache: dict[Hashable, Tensor] = {}  # the least recently used first

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "M D"]:
        """Return float32, L2-normalised, finite features (else `CheckpointError`); all ranks ask for the same texts."""
        starts, features = range(0, len(texts), TEXT_BATCH_SIZE), []
        first, last = (len(starts) * i // sharding.world_size() for i in (sharding.rank(), sharding.rank() + 1))
        with evaluating(self.model), torch.inference_mode(), sharding.raise_on_all_ranks():
            for start in starts[first:last]:
                tokens = self._tokenizer(list(texts[start : start + TEXT_BATCH_SIZE])).to(self.device)
                features.append(F.normalize(self.model.encode_text(tokens, normalize=True).float(), dim=-1))
        found = _gather(features, self.device)
        check_finite(found, "texts")
        return found

    def cached(self, key: Hashable, compute: Callable[[], Float[Tensor, "M D"]]) -> Float[Tensor, "M D"]:
        """Return `compute()`, from the cache if `key` is in it; evicts the least recently used features."""
        features = self._cache.pop(key, None)
        if features is None:
            features = compute()
        self._cache[key] = features
        while sum(known.numel() for known in self._cache.values()) > CACHED_ELEMENTS:
            del self._cache[next(iter(self._cache))]
        return features


class MaskedEncoder(LoadedModel):
    """A model whose image tower sees some patches only: what attentive inference costs in accuracy, and saves.

    Nothing else in an evaluation can mask.
    """

    def __init__(self, model: LoadedModel, keep: float, kept_by: str = "attentive", block_size: int = 1) -> None:
        """Wrap `model`, whose weights are shared; for the options see `check_masking`."""
        check_masking((keep,), (kept_by,), block_size)
        super().__init__(model.model, model.tokenizer)
        self.preprocess = model.preprocess
        self.keep, self.kept_by, self.block_size = keep, kept_by, block_size
        strategy = UniformMasking if kept_by == "uniform" else AttentiveMasking
        self._masking: MaskingStrategy = strategy(1.0 - keep, block_size=block_size)
        self.num_keep = self.num_patches = 0  # of the latest images
        self.images, self.seconds = 0, 0.0  # encoded, and the time it took, scoring included

    def encode_image(self, images: Float[Tensor, "B 3 h w"], normalize: bool = True) -> Float[Tensor, "B D"]:
        features = self._encode(images).features
        return F.normalize(features, dim=-1) if normalize else features

    def encode_trunk(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B C"]:
        return self._encode(images).cls

    def keep_indices(self, pixels: Float[Tensor, "B 3 h w"]) -> Int[Tensor, "B K"] | None:
        """Return the kept patches, ascending; None for all."""
        patch = vit_of(visual_of(self.model)).patch_size
        grid = (pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1])
        self.num_patches = grid[0] * grid[1]
        self.num_keep = self._masking.num_keep(grid)
        if self.num_keep == self.num_patches:
            return None
        scores = None if self.kept_by == "uniform" else self._scores(pixels, grid, patch)
        # seeded by the image's own pixels: the same draw in any batch and on any rank
        seeds = pixels.detach().float().contiguous().view(torch.int32).flatten(1).sum(dim=1, dtype=torch.int64)
        return self._masking(MaskingContext(len(pixels), grid, pixels.device, scores=scores, seeds=seeds,
                                            purpose="masked evaluation"))

    def to_record(self) -> dict[str, Any]:
        """Return the options, the patches kept and in all, and images per second of all ranks together."""
        # a rank without any image knows none of them
        parts = sharding.collect((self.num_keep, self.num_patches, self.images, self.seconds))
        rate = sum(images / seconds for *_, images, seconds in parts if seconds)
        return {"keep": self.keep, "kept_by": self.kept_by, "num_keep": max(part[0] for part in parts),
                "num_patches": max(part[1] for part in parts), "block_size": self.block_size,
                "pictures_per_second": rate or None}

    def _scores(self, pixels: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Float[Tensor, "B N"]:
        if self.kept_by == "attentive":
            return self.attention_scores(pixels)
        half = (max(1, grid[0] // 2), max(1, grid[1] // 2))
        small = F.interpolate(pixels, size=(half[0] * patch[0], half[1] * patch[1]), mode="bilinear", antialias=True,
                              align_corners=False)
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=pixels.device).expand(len(pixels), -1)
        return crop_scores(self.attention_scores(small), half, whole, whole, grid)

    def _encode(self, pixels: Tensor) -> ImageEncoding:
        start = _synchronized_time(pixels.device)
        encoded = encode_image(visual_of(self.model), pixels, self.keep_indices(pixels))
        self.seconds += _synchronized_time(pixels.device) - start
        self.images += len(pixels)
        return encoded


def check_masking(keep: Sequence[float], keep_by: Sequence[str], block_size: int) -> None:
    """Raise a `ConfigError` for fractions outside (0, 1], ways not in `KEEP_BY`, or blocks of less than a patch."""
    for fraction in keep:
        if not 0.0 < fraction <= 1.0:
            raise ConfigError(f"--keep is the fraction of patches that the model sees, in (0, 1], not {fraction:g}")
    for name in keep_by:
        if name not in KEEP_BY:
            raise ConfigError(unknown_name("way to keep patches", name, KEEP_BY))
    if block_size < 1:
        raise ConfigError(f"--block-size is in patches and at least 1, not {block_size}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and restore the mode of each of its modules afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _gather(parts: Sequence[Float[Tensor, "n D"]], device: torch.device) -> Float[Tensor, "N D"]:
    return sharding.gather(torch.cat(list(parts)) if parts else torch.empty(0, 0, device=device))


def check_finite(features: Float[Tensor, "B _"], what: str) -> None:
    """Raise a `CheckpointError` for features that are NaN or inf; `what` names them in it, as in "images"."""
    bad = int((~features.sum(dim=1).isfinite()).sum())
    if bad:
        raise CheckpointError(f"the model's features of {bad:,} of {len(features):,} {what} are NaN or inf: its "
                              "weights are damaged or its training diverged; measure an earlier checkpoint")


def _synchronized_time(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()
