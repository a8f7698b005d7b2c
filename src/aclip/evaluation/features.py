"""Encode the pictures of an evaluation, each once.

Retrieval and zero-shot classification read the same picture features, and so do the probes, so a caller
with several evaluators encodes the set once a space with `encode_pictures` and hands the result to each.

Where processes evaluate together (`aclip.evaluation.together`), each encodes its share and all end with everything, in
the same order: what is measured then is what one process measures.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.errors import DataError
from aclip.evaluation import together
from aclip.evaluation.interface import Encoder, PictureBatch, PictureSet, Progress, Space

THUMBNAILS = 2048
"""Most pictures of a set that are kept small."""

THUMBNAIL_SIDE = 96
"""Longest side in pixels of a kept thumbnail."""


@dataclass(frozen=True)
class PictureFeatures:
    """A set of pictures after one pass through the image encoder.

    Attributes:
        features: (B, D) float32, L2-normalised, in the joint space, or (B, C) float32 as the tower pools
            them, before the projection; on the device of the encoder.
        captions: the (first) caption of each picture. labels: its class, or None. keys: its name.
        skipped: (name, reason) of pictures that could not be used.
        thumbnails: picture index -> (3, h, w) uint8, for a share of the set spread evenly over it.
        all_captions: all captions of each picture, the first included.
    """

    features: Float[Tensor, "B _"]
    captions: tuple[str, ...]
    labels: tuple[str | None, ...]
    keys: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    thumbnails: dict[int, UInt8[Tensor, "3 h w"]]
    all_captions: tuple[tuple[str, ...], ...] = ()

    @property
    def size(self) -> int:
        """Number of pictures B."""
        return len(self.captions)


def encode_pictures(
    model: Encoder,
    pictures: PictureSet,
    device: torch.device,
    *,
    space: Space = "joint",
    precision: torch.dtype | None = None,
    progress: Progress | None = None,
    thumbnails: int = THUMBNAILS,
) -> PictureFeatures:
    """Encode all pictures of a set without gradient, in evaluation mode, which is undone afterwards.

    Args:
        model: the encoder, already on `device`.
        pictures: read once, from beginning to end; where processes evaluate together, this one's share, which lies
            behind those of lower ranks (`EvaluationSet(..., share=(rank, world_size))`).
        device: where the encoder runs and the features stay.
        space: "joint" for features that are compared with texts, "trunk" for those that probes read.
        precision: type of autocast (`torch.bfloat16`), or None for none. Features are float32 either way.
        progress: told the size of every batch that is done.
        thumbnails: at most this many pictures, evenly spread over the set, are kept small for reports, so
            that memory does not grow with the set. 0 keeps none.

    Raises:
        DataError: the set holds no usable picture.
        AclipError: reading failed, on any process; all raise it.
    """
    gallery = _Gallery(thumbnails, *_normalisation(model))
    read = _Read(gallery)
    with evaluating(model), torch.inference_mode(), together.common_fate():
        for batch in pictures:
            pixels = batch.pixels.to(device, non_blocking=True)
            with autocast(device, precision):
                encoded = model.encode_image(pixels) if space == "joint" else model.encode_trunk(pixels)
            read.add(F.normalize(encoded.float(), dim=-1) if space == "joint" else encoded.float(), batch)
            if progress is not None:
                progress(len(batch.captions))
    skipped = [name for part in together.collect(list(pictures.skipped)) for name in part]
    features = gather_rows(read.features, device)
    if not len(features):
        raise DataError(f"nothing to evaluate: the set holds no usable picture ({len(skipped)} skipped)")
    captions, labels, keys, all_captions, small = (
        read.captions, read.labels, read.keys, read.all_captions, gallery.kept)
    if together.world_size() > 1:
        parts = together.collect((captions, labels, keys, all_captions, small))
        captions, labels, keys, all_captions = ([x for part in parts for x in part[i]] for i in range(4))
        starts = [sum(len(part[0]) for part in parts[:i]) for i in range(len(parts))]
        small = {start + i: image for start, part in zip(starts, parts, strict=True) for i, image in part[4].items()}
    return PictureFeatures(features, tuple(captions), tuple(labels), tuple(keys), tuple(skipped), small,
                           tuple(all_captions))


@dataclass
class _Read:
    """What this process has read and encoded so far."""

    gallery: "_Gallery"
    features: list[Tensor] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    all_captions: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, features: Float[Tensor, "b _"], batch: PictureBatch) -> None:
        self.gallery.add(len(self.captions), batch.pixels)
        self.features.append(features)
        self.captions += batch.captions
        self.labels += batch.labels
        self.keys += batch.keys
        self.all_captions += batch.all_captions


def gather_rows(parts: Sequence[Float[Tensor, "n D"]], device: torch.device) -> Float[Tensor, "N D"]:
    """Return all rows of all processes in rank order; a process may have none. (0, 0) if nobody has any."""
    sizes = together.collect((sum(map(len, parts)), parts[0].shape[1] if parts else 0))
    total, width, most = sum(n for n, _ in sizes), max(w for _, w in sizes), max(n for n, _ in sizes)
    if together.world_size() == 1:
        return torch.cat(list(parts)) if parts else torch.empty(0, 0, device=device)
    if total == 0:
        return torch.empty(0, 0, device=device)
    own = torch.cat(list(parts)) if parts else torch.empty(0, width, device=device)
    padded = together.gather(F.pad(own, (0, 0, 0, most - len(own)))).split(most)
    return torch.cat([rows[:n] for rows, (n, _) in zip(padded, sizes, strict=True)])


class _Gallery:
    """Keeps every `stride`-th picture as a thumbnail; the stride doubles whenever the gallery is full.

    A set need not know its length beforehand, and which pictures are kept depends on their positions
    alone.
    """

    def __init__(self, capacity: int, mean: Tensor, std: Tensor) -> None:
        self.kept: dict[int, Tensor] = {}
        self._capacity, self._mean, self._std = capacity, mean, std
        self._stride = 1

    def add(self, start: int, pixels: Float[Tensor, "B 3 h w"]) -> None:
        if self._capacity < 1:
            return
        chosen = [i for i in range(len(pixels)) if (start + i) % self._stride == 0]
        if not chosen:
            return
        small = self._shrink(pixels[chosen])
        self.kept.update({start + i: image for i, image in zip(chosen, small, strict=True)})
        while len(self.kept) > self._capacity:
            self._stride *= 2
            self.kept = {i: image for i, image in self.kept.items() if i % self._stride == 0}

    def _shrink(self, pixels: Float[Tensor, "B 3 h w"]) -> UInt8[Tensor, "B 3 _h _w"]:
        colours = pixels.float().cpu() * self._std[:, None, None] + self._mean[:, None, None]
        h, w = colours.shape[-2:]
        scale = min(1.0, THUMBNAIL_SIDE / max(h, w))
        if scale < 1.0:
            size = (max(1, round(h * scale)), max(1, round(w * scale)))
            colours = F.interpolate(colours, size=size, mode="bilinear", antialias=True, align_corners=False)
        return (colours * 255.0).round().clamp(0, 255).to(torch.uint8)


def _normalisation(model: Encoder) -> tuple[Tensor, Tensor]:
    """Return the (3,) mean and deviation of the model's preprocessing; none found means none applied."""
    for transform in reversed(getattr(model.preprocess, "transforms", [])):
        if hasattr(transform, "mean") and hasattr(transform, "std"):
            return torch.as_tensor(transform.mean).float(), torch.as_tensor(transform.std).float()
    return torch.zeros(3), torch.ones(3)


def autocast(device: torch.device, precision: torch.dtype | None) -> Any:
    """Return the context in which products are taken in `precision`; None changes nothing."""
    return nullcontext() if precision is None else torch.autocast(device.type, dtype=precision)


@contextmanager
def evaluating(model: Encoder) -> Iterator[None]:
    """Put a module in evaluation mode and give each of its modules back the mode it had."""
    modes = {m: m.training for m in model.modules()} if isinstance(model, nn.Module) else {}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
