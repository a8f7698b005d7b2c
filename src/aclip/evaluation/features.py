"""Encoding an evaluation set: image features, text features, and features of masked images.

A set is encoded once a space, by `encode_image_set`, for all evaluators that read the space. Inside `sharding.sharded`
each rank encodes its share and all ranks end with all features in the order of the set, so that every metric is that
of a single process.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.data import EvaluationSet
from aclip.errors import CheckpointError, ConfigError, DataError, unknown_name
from aclip.evaluation import sharding
from aclip.masking import AttentiveMasking, MaskingContext, MaskingStrategy, UniformMasking, crop_scores
from aclip.models import LoadedModel, encode_image, visual_of
from aclip.models.vision import vit_of
from aclip.structs import ImageEncoding

Space = Literal["joint", "trunk"]
"""Which image features are read: in the joint space with text, or before the projection into it, as probes do."""

MAX_THUMBNAILS = 2048
"""Thumbnails kept of a set."""

THUMBNAIL_SIDE = 96
"""Longest side of a thumbnail, in pixels."""

CACHED_ELEMENTS = 2**26
"""Float32 entries of text features that are cached (256 MiB), such as 131,072 captions at 512."""

KEEP_BY = {
    "attentive": "the patches that the model's own [CLS] token attends to most",
    "attentive-half": "the same, scored on the image at half size, at a quarter of the cost",
    "uniform": "random patches, the same ones of an image in every run",
}


@dataclass(frozen=True)
class ImageFeatures:
    """An evaluation set after one pass through the image encoder.

    Attributes:
        features: (B, D) float32, finite, on the encoder's device: L2-normalised in the joint space, or (B, C) pooled
            tokens before the projection.
        captions: first caption of each image. labels: class of each image, or None. keys: name of each image.
        skipped: (name, reason) of images that could not be used.
        thumbnails: image index -> (3, h, w) uint8, for images spread evenly over the set.
        all_captions: all captions of each image, the first included.
    """

    features: Float[Tensor, "B _"]
    captions: tuple[str, ...]
    labels: tuple[str | None, ...]
    keys: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    thumbnails: dict[int, UInt8[Tensor, "3 h w"]] = field(default_factory=dict)
    all_captions: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        """Return the number of images B."""
        return len(self.captions)


def encode_image_set(
    model: LoadedModel,
    images: EvaluationSet,
    device: torch.device,
    *,
    space: Space = "joint",
    progress: Callable[[int], None] | None = None,
    max_thumbnails: int = MAX_THUMBNAILS,
) -> ImageFeatures:
    """Encode all images of a set without gradient and in evaluation mode.

    Args:
        model: encoder on `device`; its training mode is restored afterwards.
        images: read once, in order; with sharding, this rank's share (`EvaluationSet(..., share=(rank, world_size))`).
        device: where the encoder runs and the features stay.
        space: "joint" for features that are compared with text, "trunk" for probes.
        progress: called with the size of each finished batch.
        max_thumbnails: thumbnails kept, evenly spread over the set.

    Raises:
        DataError: the set has no usable image.
        CheckpointError: some features are NaN or inf.
        AclipError: reading failed on any rank; raised on all.
    """
    stride = max(1, -(-len(images) // max(1, max_thumbnails)))
    features: list[Tensor] = []
    about: list[tuple[str, str | None, str, tuple[str, ...]]] = []
    thumbnails: dict[int, Tensor] = {}
    with evaluating(model), torch.inference_mode(), sharding.raise_on_all_ranks():
        for batch in images:
            pixels = batch.pixels.to(device, non_blocking=True)
            encoded = model.encode_image(pixels) if space == "joint" else model.encode_trunk(pixels)
            features.append(F.normalize(encoded.float(), dim=-1) if space == "joint" else encoded.float())
            first = -len(about) % stride
            if max_thumbnails:
                thumbnails |= {len(about) + first + i * stride: image for i, image in
                               enumerate(_thumbnails(batch.pixels[first::stride], model))}
            about += zip(batch.captions, batch.labels, batch.keys, batch.all_captions, strict=True)
            if progress is not None:
                progress(len(batch.captions))
    skipped = [name for part in sharding.collect(list(images.skipped)) for name in part]
    found = _gather_rows(features, device)
    if not len(found):
        raise DataError(f"nothing to evaluate: the set has no usable image ({len(skipped)} skipped)")
    _check_finite(found, "images")
    shards = sharding.collect((about, thumbnails))
    starts = [sum(len(part) for part, _ in shards[:i]) for i in range(len(shards))]
    thumbnails = {start + i: image for start, (_, kept) in zip(starts, shards, strict=True)
                  for i, image in kept.items()}
    captions, labels, keys, all_captions = zip(*(one for part, _ in shards for one in part), strict=True)
    return ImageFeatures(found, captions, labels, keys, tuple(skipped), thumbnails, all_captions)


def _thumbnails(pixels: Float[Tensor, "B 3 h w"], model: LoadedModel) -> UInt8[Tensor, "B 3 _h _w"]:
    """Return images at most `THUMBNAIL_SIDE` pixels wide and high, the model's normalisation undone."""
    normalize = next((t for t in reversed(getattr(model.preprocess, "transforms", []))
                      if hasattr(t, "mean") and hasattr(t, "std")), None)
    colours = pixels.float().cpu()
    if normalize is not None:
        mean, std = (torch.as_tensor(values).float()[:, None, None] for values in (normalize.mean, normalize.std))
        colours = colours * std + mean
    h, w = colours.shape[-2:]
    scale = THUMBNAIL_SIDE / max(h, w)
    if scale < 1.0 and len(colours):
        size = (max(1, round(h * scale)), max(1, round(w * scale)))
        colours = F.interpolate(colours, size=size, mode="bilinear", antialias=True, align_corners=False)
    return (colours * 255.0).round().clamp(0, 255).to(torch.uint8)


class TextEncoder:
    """A model's text tower with a cache of the text features computed last.

    The cache embeds classes once for all sets and evaluators, and a set's captions once for every fraction of patches
    kept. The weights must not change meanwhile.

    Attributes:
        model: whose text tower is run, on `device`.
        device: where it runs and the features stay.
    """

    def __init__(
        self, model: LoadedModel, device: torch.device, *, batch_size: int = 256,
        tokenizer: Callable[[list[str]], Tensor] | None = None,
    ) -> None:
        """Wrap `model`; `tokenizer` replaces the model's own."""
        self.model, self.device = model, device
        self._batch_size, self._tokenizer = batch_size, tokenizer
        self._cache: OrderedDict[Hashable, Tensor] = OrderedDict()

    def encode(self, texts: Sequence[str]) -> Float[Tensor, "M D"]:
        """Encode texts without gradient and in evaluation mode.

        With sharding each rank encodes its share; all ranks must ask for the same texts in the same order.

        Returns:
            (M, D) float32, L2-normalised, on `device`, in the order of `texts`.

        Raises:
            CheckpointError: some features are NaN or inf.
        """
        starts, features = range(0, len(texts), self._batch_size), []
        tokenizer = self._tokenizer or self.model.tokenizer
        with evaluating(self.model), torch.inference_mode(), sharding.raise_on_all_ranks():
            for start in (starts[i] for i in sharding.shard(len(starts))):
                tokens = tokenizer(list(texts[start : start + self._batch_size])).to(self.device)
                features.append(F.normalize(self.model.encode_text(tokens, normalize=True).float(), dim=-1))
        found = _gather_rows(features, self.device)
        _check_finite(found, "texts")
        return found

    def cached(self, key: Hashable, compute: Callable[[], Float[Tensor, "M D"]]) -> Float[Tensor, "M D"]:
        """Return `compute()`, from the cache if `key` is in it; evicts the least recently used features."""
        features = self._cache.pop(key, None)
        if features is None:
            features = compute()
        self._cache[key] = features
        while sum(known.numel() for known in self._cache.values()) > CACHED_ELEMENTS:
            self._cache.popitem(last=False)
        return features


class MaskedEncoder(LoadedModel):
    """A model whose image tower sees some patches only: what attentive inference costs in accuracy, and saves.

    Nothing else in an evaluation can mask.

    Attributes:
        keep: fraction of patches kept, in (0, 1].
        kept_by: key of `KEEP_BY`.
        num_keep, num_patches: patches kept and in all; 0 before the first images.
        seconds: spent encoding images, scoring included. images: encoded in that time.
    """

    def __init__(self, model: LoadedModel, keep: float, kept_by: str = "attentive", block_size: int = 1) -> None:
        """Wrap `model`.

        Args:
            model: shares its weights.
            keep: fraction of patches kept, counted as `masking.num_keep` does.
            kept_by: how they are chosen.
            block_size: side of the blocks that are kept or removed, in patches; training uses 2.

        Raises:
            ConfigError: a fraction outside (0, 1], an unknown `kept_by`, a block size below 1.
        """
        check_masking((keep,), (kept_by,), block_size)
        super().__init__(model.model, model.tokenizer)
        self.preprocess = model.preprocess
        self.keep, self.kept_by, self.block_size = keep, kept_by, block_size
        strategy = UniformMasking if kept_by == "uniform" else AttentiveMasking
        self._masking: MaskingStrategy = strategy(1.0 - keep, block_size=block_size)
        self.num_keep = self.num_patches = self.images = 0
        self.seconds = 0.0

    def encode_image(self, images: Float[Tensor, "B 3 h w"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """Return the features of the kept patches, in the joint space."""
        features = self._encode(images).features
        return F.normalize(features, dim=-1) if normalize else features

    def encode_trunk(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B C"]:
        """Return the pooled token of the kept patches."""
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

    def throughput(self) -> tuple[int, int, float | None]:
        """Return patches kept, patches in all, and images per second of all ranks together."""
        # a rank without any image knows none of them
        parts = sharding.collect((self.num_keep, self.num_patches, self.images, self.seconds))
        rate = sum(images / seconds for *_, images, seconds in parts if seconds)
        return max(part[0] for part in parts), max(part[1] for part in parts), rate or None

    def _scores(self, pixels: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Float[Tensor, "B N"]:
        seen, seen_grid = pixels, grid
        if self.kept_by == "attentive-half":
            seen_grid = (max(1, grid[0] // 2), max(1, grid[1] // 2))
            seen = F.interpolate(pixels, size=(seen_grid[0] * patch[0], seen_grid[1] * patch[1]), mode="bilinear",
                                 antialias=True, align_corners=False)
        scores = self.attention_scores(seen)
        if seen_grid == grid:
            return scores
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=pixels.device).expand(len(pixels), -1)
        return crop_scores(scores, seen_grid, whole, whole, grid)

    def _encode(self, pixels: Tensor) -> ImageEncoding:
        start = _synchronized_time(pixels.device)
        encoded = encode_image(visual_of(self.model), pixels, self.keep_indices(pixels))
        self.seconds += _synchronized_time(pixels.device) - start
        self.images += len(pixels)
        return encoded


def check_masking(keep: Sequence[float], keep_by: Sequence[str], block_size: int) -> None:
    """Check what `MaskedEncoder` takes; see there."""
    for fraction in keep:
        if not 0.0 < fraction <= 1.0:
            raise ConfigError(f"--keep is the fraction of patches that the model sees, in (0, 1], not {fraction:g}")
    for name in keep_by:
        if name not in KEEP_BY:
            raise ConfigError(unknown_name("way to keep patches", name, KEEP_BY))
    if block_size < 1:
        raise ConfigError(f"--block-size is in patches and at least 1, not {block_size}")


@contextmanager
def evaluating(model: LoadedModel) -> Iterator[None]:
    """Put a module into evaluation mode and restore the mode of each of its modules afterwards."""
    modes = {m: m.training for m in model.modules()} if isinstance(model, nn.Module) else {}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _gather_rows(parts: Sequence[Float[Tensor, "n D"]], device: torch.device) -> Float[Tensor, "N D"]:
    """Return all rows of all ranks in rank order; a rank may have none. (0, 0) if none has any."""
    sizes = sharding.collect((sum(map(len, parts)), parts[0].shape[1] if parts else 0))
    width, most = max(w for _, w in sizes), max(n for n, _ in sizes)
    own = torch.cat(list(parts)) if parts else torch.empty(0, width, device=device)
    if sharding.world_size() == 1 or most == 0:
        return own
    padded = sharding.gather(F.pad(own, (0, 0, 0, most - len(own)))).split(most)
    return torch.cat([rows[:n] for rows, (n, _) in zip(padded, sizes, strict=True)])


def _check_finite(features: Float[Tensor, "B _"], what: str) -> None:
    bad = int((~features.sum(dim=1).isfinite()).sum())
    if bad:
        raise CheckpointError(f"the model's features of {bad:,} of {len(features):,} {what} are NaN or inf: its "
                              "weights are damaged or its training diverged; measure an earlier checkpoint")


def _synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
