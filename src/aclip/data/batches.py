"""From requests to batches: read, decode, crop, draw a caption, tokenise, collate.

A bad sample is neither fatal nor silent: a good one drawn from (seed, epoch, sample) replaces it, and its name and
reason travel with the batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from aclip import rng
from aclip.data.captions import CaptionTokenizer, caption_id, clean_captions, draw_caption
from aclip.data.decode import decode_pixels
from aclip.data.order import BatchSampler, Groups, Request
from aclip.data.sources.base import RawSample, Source
from aclip.data.stored import StoredFeatures
from aclip.data.views import Box, Crop, ViewPipeline
from aclip.data.workers import check_workers, empty_shared, read_ahead
from aclip.errors import BadSampleError, DataError
from aclip.structs import Batch, ViewBatch

MAX_REPLACEMENTS = 1000  # samples that are tried in place of a bad one before the source counts as unusable

_READ_AHEAD = 8  # batches that all workers together read before they are needed, held in memory
_NEARBY = 100  # of the replacements, drawn from the window of the bad sample; the rest from the whole source
_TOGETHER = 32  # samples whose small work is done in one go; their files are in memory meanwhile

CutText = Callable[[Tensor], Tensor]
"""Maps (B, T) tokens to (B, T') without the columns that no caption needs."""


@dataclass(frozen=True)
class Item:
    """One training sample."""

    views: Mapping[str, Crop]
    tokens: Int[Tensor, " T"]  # int64, T the tokenizer's context length
    caption_id: int  # of the sample's concept if it has one, else of the drawn caption
    seed: int  # of everything drawn on the device for this sample in this epoch
    key: str  # the sample's name
    skipped: tuple[tuple[str, str], ...] = ()  # name and reason of the bad samples that this one replaces
    stored: Mapping[str, np.ndarray] = field(default_factory=dict)  # a teacher's features, see `StoredFeatures.rows`


class _Start(NamedTuple):
    """A sample without its views and tokens, see `Item`."""

    raw: RawSample
    epoch: int
    place: int
    text: str
    caption_id: int


class PairDataset:
    """The training samples of a source, by `Request`; a pure function of the request, in any process.

    Args:
        sizes: view name -> (height, width) in pixels.
        seed: of everything that is drawn for a sample, and of the order.
        stored: features that samples come with; crops, captions and seeds are then those of the first K epochs, again
            and again.
    """

    def __init__(self, source: Source, views: ViewPipeline, tokenizer: CaptionTokenizer, *,
                 sizes: Mapping[str, tuple[int, int]], seed: int, stored: StoredFeatures | None = None) -> None:
        self.source, self.tokenizer, self.seed, self.stored = source, tokenizer, seed, stored
        self._views, self._sizes = views, dict(sizes)
        self._min_side = views.least_side(self._sizes)  # JPEGs are decoded no larger than that takes

    def __len__(self) -> int:
        """Return the number of samples in the source, bad ones included."""
        return len(self.source)

    def __getitem__(self, request: Request) -> Item:
        """Return the sample for `request`, or a good one in its place."""
        return next(self.items([request]))

    def items(self, requests: Sequence[Request]) -> Iterator[Item]:
        """Yield the sample for every request, or a good one in its place.

        The small work of several samples, reading, drawing and tokenising captions, is done in one go: between two
        images, each of which fills the processor's cache, it takes three times as long.

        Raises:
            DataError: `MAX_REPLACEMENTS` samples in a row are bad.
        """
        for first in range(0, len(requests), _TOGETHER):
            some = requests[first : first + _TOGETHER]
            if self.stored is not None:
                some = [request._replace(epoch=request.epoch % self.stored.crops) for request in some]
            starts: list[_Start | BadSampleError] = []
            for request in some:
                try:
                    starts.append(self._start(request.sample, request.epoch, place=request.sample))
                except BadSampleError as error:
                    starts.append(error)
            tokens = iter(self.tokenizer([start.text for start in starts if isinstance(start, _Start)]))
            for request, start in zip(some, starts, strict=True):
                try:
                    if isinstance(start, BadSampleError):
                        raise start
                    item = self._finish(start, next(tokens))
                except BadSampleError as error:
                    item = self._replacement(request, error.reason)
                yield item if self.stored is None else replace(item, stored=self.stored.rows(*request))

    def _replacement(self, request: Request, reason: str) -> Item:
        """Return a good sample for a request whose own is bad.

        Everything drawn for it depends on the place it fills, numbered after all regular samples, so that it does not
        repeat the crops of its own regular appearance in this epoch.
        """
        name = self.source.name(request.sample)
        skipped = {name: reason}
        for number in self._replacements(request):
            try:
                start = self._start(number, request.epoch, place=len(self) + request.sample)
                return self._finish(start, self.tokenizer([start.text])[0], tuple(skipped.items()))
            except BadSampleError as error:
                skipped[self.source.name(number)] = error.reason
        raise DataError(f"no usable sample in {self.source.spec}: {MAX_REPLACEMENTS + 1} in a row are bad, the first "
                        f"is {name} ({reason})")

    def _replacements(self, request: Request) -> Iterator[int]:
        """Yield candidates to replace the sample of a request, the first ones from its own window."""
        generator = rng.generator(self.seed, "replacement", *request)
        window = self.source.window(self.seed, *request)
        ends = np.cumsum([len(samples) for samples in window])
        for drawn in generator.integers(ends[-1], size=_NEARBY).tolist():
            group = int(np.searchsorted(ends, drawn, side="right"))
            yield window[group][drawn - int(ends[group])]  # counted from the end of the group
        yield from generator.integers(len(self), size=MAX_REPLACEMENTS - _NEARBY).tolist()

    def _start(self, number: int, epoch: int, *, place: int) -> _Start:
        raw = self.source.read(number)
        captions = clean_captions(raw.captions)  # before the image: cheaper to find bad
        caption = draw_caption(captions, raw.tags, seed=self.seed, epoch=epoch, sample=place)
        return _Start(raw, epoch, place, caption.text,
                      caption.caption_id if raw.concept is None else caption_id(raw.concept))

    def _finish(self, start: _Start, tokens: Int[Tensor, " T"], skipped: tuple[tuple[str, str], ...] = ()) -> Item:
        image = decode_pixels(start.raw.image, min_side=self._min_side)
        views = self._views(image, seed=self.seed, epoch=start.epoch, sample=start.place, sizes=self._sizes)
        seed = rng.sample_seed(self.seed, start.epoch, start.place)
        return Item(views, tokens, start.caption_id, seed, start.raw.name, skipped)


@dataclass(frozen=True)
class ReadBatch:
    """Answers the requests of one step with the batch whose row b answers `requests[b]`."""

    dataset: PairDataset
    cut_text: CutText | None

    def __call__(self, requests: Sequence[Request]) -> Batch:
        return collate(self.dataset.items(requests), len(requests), self.dataset.tokenizer, self.cut_text)


@dataclass(frozen=True)
class BatchLoader:
    """The batches of a run's steps, in order; iterating again starts from the first of them. See `build_loader`."""

    read: ReadBatch
    sampler: BatchSampler
    workers: int
    pin_memory: bool

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        return read_ahead(self.read, self.sampler, workers=self.workers, pin_memory=self.pin_memory,
                          prefetch=max(1, _READ_AHEAD // max(1, self.workers)))


def build_loader(dataset: PairDataset, *, batch_size: int, total_steps: int, start_step: int = 0, workers: int = 0,
                 device: torch.device | None = None, cut_text: CutText | None = None, rank: int = 0,
                 world_size: int = 1, groups: Groups | None = None) -> BatchLoader:
    """Return the loader of the optimizer steps [`start_step`, `total_steps`).

    The batches are the same for any number of workers, and for any `start_step` the rest of the same stream. Neither
    building nor iterating touches a global random generator.

    Args:
        dataset: the samples; its seed gives the order.
        batch_size: pairs in a step, over all ranks.
        workers: processes that read ahead; 0 reads in this one.
        device: where batches will go; for CUDA they come in page-locked memory.
        cut_text: shortens the tokens of a batch; None leaves them at full length.
        rank, world_size: the contiguous slice of every batch that is delivered.

    Raises:
        ConfigError: a batch size that does not divide among the ranks, or a negative number of workers.
        DataError: fewer samples than one batch.
    """
    sampler = BatchSampler(dataset.source, batch_size=batch_size, seed=dataset.seed, start_step=start_step,
                           total_steps=total_steps, rank=rank, world_size=world_size, groups=groups)
    return BatchLoader(ReadBatch(dataset, cut_text), sampler, check_workers(workers),
                       pin_memory=device is not None and device.type == "cuda")


def collate(items: Iterable[Item], count: int, tokenizer: CaptionTokenizer, cut_text: CutText | None = None) -> Batch:
    """Return the batch of `count` items, row b of every tensor from item b.

    An item's pixels are copied before the next item is asked for, while they are in the processor's cache.
    """
    pixels: dict[str, Tensor] = {}  # (B, h, w, 3) of each view
    drawn: dict[str, list[tuple[Box, bool, np.ndarray | None]]] = {}
    stored: dict[str, list[np.ndarray]] = {}
    rows: list[tuple[Tensor, int, int, str]] = []
    skipped: dict[tuple[str, str], None] = {}
    for row, item in enumerate(items):
        for name, crop in item.views.items():
            if row == 0:
                _, height, width = crop.pixels.shape
                pixels[name], drawn[name] = empty_shared((count, height, width, 3), torch.uint8), []
            pixels[name].numpy()[row] = crop.pixels.transpose(1, 2, 0)
            drawn[name].append(crop[1:])
        rows.append((item.tokens, item.caption_id, item.seed, item.key))
        skipped.update(dict.fromkeys(item.skipped))
        for name, features in item.stored.items():
            stored.setdefault(name, []).append(features)
    all_tokens, caption_ids, seeds, keys = zip(*rows, strict=True)
    tokens = torch.stack(all_tokens)
    return Batch(
        views={name: _view(pixels[name], some) for name, some in drawn.items()},
        tokens=tokens if cut_text is None else cut_text(tokens).contiguous(),
        caption_ids=torch.tensor(caption_ids, dtype=torch.int64),
        seeds=torch.tensor(seeds, dtype=torch.int64),
        keys=keys,
        skipped=tuple(skipped),
        truncated=tokenizer.count_truncated(tokens),
        stored={name: torch.from_numpy(np.stack(features)) for name, features in stored.items()},
    )


def _view(pixels: UInt8[Tensor, "B h w 3"], drawn: Sequence[tuple[Box, bool, np.ndarray | None]]) -> ViewBatch:
    boxes, flipped, augmentations = zip(*drawn, strict=True)
    return ViewBatch(
        pixels=pixels.permute(0, 3, 1, 2),
        boxes=torch.tensor(boxes, dtype=torch.float32),
        flipped=torch.tensor(flipped),
        augmentation=None if augmentations[0] is None else torch.from_numpy(np.stack(augmentations)),
    )
