"""Feed batches: worker processes read and crop ahead of the optimizer, in an order that does not depend
on how many of them there are."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from aclip.data.captions import CaptionTokenizer
from aclip.data.dataset import Item, PairDataset
from aclip.data.layout import layout_warnings
from aclip.data.order import BatchSampler, Request
from aclip.data.views import Crop
from aclip.data.workers import read_ahead
from aclip.structs import Batch, ViewBatch

_log = logging.getLogger(__name__)

READ_AHEAD = 8
"""Batches that are read before they are needed, held in memory."""

CutText = Callable[[Tensor], Tensor]
"""Maps (B, T) tokens to (B, T') without the columns that no caption needs."""


class BatchLoader:
    """The batches of a run's steps, in order; iterating again starts again at the first of them.

    Attributes:
        steps_per_epoch: whole batches in an epoch.
    """

    def __init__(
        self,
        read: "ReadBatch",
        sampler: BatchSampler,
        *,
        workers: int,
        prefetch: int,
        pin_memory: bool,
    ) -> None:
        """Combine the parts; see `build_loader`."""
        self.steps_per_epoch = sampler.steps_per_epoch
        self._read = read
        self._sampler = sampler
        self._workers = workers
        self._prefetch = prefetch
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's share of every step's batch.

        Raises:
            DataError: a source without usable samples.
        """
        return read_ahead(
            self._read,
            self._sampler,
            workers=self._workers,
            prefetch=self._prefetch,
            pin_memory=self._pin_memory,
        )


class ReadBatch:
    """Answers the requests of one step with their batch; picklable if its parts are."""

    def __init__(self, dataset: PairDataset, cut_text: CutText | None) -> None:
        """Read from `dataset` and shorten tokens with `cut_text`."""
        self._dataset = dataset
        self._cut_text = cut_text

    def __call__(self, requests: Sequence[Request]) -> Batch:
        """Return the batch whose row b answers `requests[b]`."""
        return collate(self._dataset.items(requests), len(requests), self._dataset.tokenizer, self._cut_text)


def build_loader(
    dataset: PairDataset,
    *,
    batch_size: int,
    total_steps: int,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int | None = None,
    device: torch.device | None = None,
    cut_text: CutText | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> BatchLoader:
    """Return the loader of a run's optimizer steps [`start_step`, `total_steps`).

    The batches are the same for any number of workers, and for any `start_step` the rest of the same
    stream. Neither building nor iterating touches a global random generator.

    Args:
        dataset: the samples; its seed gives the order.
        batch_size: pairs in a step, over all ranks.
        total_steps, start_step: the step after the last, and the first.
        workers: processes that read ahead; 0 reads in this one.
        prefetch: batches that each worker reads ahead; None: at least one, and `READ_AHEAD` of all workers together.
        device: where batches will go; for CUDA they come in page-locked memory.
        cut_text: shortens the tokens of a batch, see `CutText`; None leaves them at full length.
        rank, world_size: which contiguous slice of every batch is delivered.

    Raises:
        ConfigError: a batch size that does not divide among the ranks.
        DataError: fewer samples than one batch.
    """
    for warning in layout_warnings(dataset.source, workers) if rank == 0 else ():
        _log.warning("%s", warning)
    sampler = BatchSampler(
        dataset.source,
        batch_size=batch_size,
        seed=dataset.seed,
        start_step=start_step,
        total_steps=total_steps,
        rank=rank,
        world_size=world_size,
    )
    return BatchLoader(
        ReadBatch(dataset, cut_text),
        sampler,
        workers=workers,
        prefetch=prefetch or max(1, READ_AHEAD // max(1, workers)),
        pin_memory=device is not None and device.type == "cuda",
    )


def collate(
    items: Iterable[Item], count: int, tokenizer: CaptionTokenizer, cut_text: CutText | None = None
) -> Batch:
    """Return the batch of `count` items, every tensor's row b from item b.

    An item's pixels are taken over before the next item is asked for, while they are in the processor's cache.
    """
    views: dict[str, _Rows] = {}
    rows: list[tuple[Tensor, int, int, str, int]] = []
    skipped: dict[tuple[str, str], None] = {}
    for row, item in enumerate(items):
        for name, crop in item.views.items():
            if row == 0:
                views[name] = _Rows(count, crop)
            views[name].put(row, crop)
        rows.append((item.tokens, item.caption_id, item.seed, item.key, item.number))
        skipped.update(dict.fromkeys(item.skipped))
    all_tokens, caption_ids, seeds, keys, numbers = zip(*rows, strict=True)
    tokens = torch.stack(all_tokens)
    return Batch(
        views={name: crops.batch() for name, crops in views.items()},
        tokens=tokens if cut_text is None else cut_text(tokens).contiguous(),
        caption_ids=torch.tensor(caption_ids, dtype=torch.int64),
        seeds=torch.tensor(seeds, dtype=torch.int64),
        keys=keys,
        numbers=numbers,
        skipped=tuple(skipped),
        truncated=tokenizer.count_truncated(tokens),
    )


class _Rows:
    """One view of a batch, filled row by row."""

    def __init__(self, count: int, first: Crop) -> None:
        _, height, width = first.pixels.shape
        self._pixels = np.empty((count, height, width, 3), dtype=np.uint8)
        self._boxes = np.empty((count, 4), dtype=np.float32)
        self._flipped = np.empty(count, dtype=np.bool_)
        drawn = first.augmentation
        self._augmentation = None if drawn is None else np.empty((count, len(drawn)), dtype=np.float32)

    def put(self, row: int, crop: Crop) -> None:
        self._pixels[row] = crop.pixels.transpose(1, 2, 0)
        self._boxes[row], self._flipped[row] = crop.box, crop.flipped
        if self._augmentation is not None:
            self._augmentation[row] = crop.augmentation

    def batch(self) -> ViewBatch:
        return ViewBatch(
            pixels=torch.from_numpy(self._pixels).permute(0, 3, 1, 2),
            boxes=torch.from_numpy(self._boxes),
            flipped=torch.from_numpy(self._flipped),
            augmentation=None if self._augmentation is None else torch.from_numpy(self._augmentation),
        )
