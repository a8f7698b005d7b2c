"""From a request to one training sample: read, decode, crop, choose a caption, tokenise.

A bad sample is never fatal and never silent: its place in the batch is taken by a good one, drawn from
(seed, epoch, index), and its name and reason travel with the batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from aclip import rng
from aclip.data.captions import CaptionTokenizer, caption_id, clean_captions, draw_caption
from aclip.data.decode import decode_pixels
from aclip.data.order import Request
from aclip.data.sources import RawSample, Source
from aclip.data.views import Crop, ViewPipeline
from aclip.errors import BadSampleError, DataError

MAX_REPLACEMENTS = 1000
"""Samples that are tried for the place of a bad one before the source is called unusable."""


_TOGETHER = 32
"""Samples whose small work is done in one go; their files are in memory meanwhile."""


@dataclass(frozen=True)
class Item:
    """One training sample.

    Attributes:
        views: view name -> `Crop`.
        tokens: (T,) int64, T the tokenizer's context length.
        caption_id: see `aclip.data.captions.caption_id`; of the sample's concept where it names one, else of
            the caption that was drawn.
        seed: from which the device draws for this sample in this epoch.
        key: the sample's name.
        number: its number in the source, its own also where it takes another's place.
        skipped: (name, reason) of the bad samples whose place this one takes.
    """

    views: Mapping[str, Crop]
    tokens: Int[Tensor, " T"]
    caption_id: int
    seed: int
    key: str
    number: int
    skipped: tuple[tuple[str, str], ...] = ()


class PairDataset(Dataset[Item]):
    """The training samples of a source, by `Request`; a pure function of the request, in any process.

    Attributes:
        source: where the pairs come from.
        tokenizer: turns captions into tokens.
        seed: of everything that is drawn for a sample, and of the order.
    """

    def __init__(
        self,
        source: Source,
        views: ViewPipeline,
        tokenizer: CaptionTokenizer,
        *,
        sizes: Mapping[str, tuple[int, int]],
        seed: int,
    ) -> None:
        """Combine the parts.

        Args:
            source: the pairs.
            views: draws and cuts the views of a picture.
            tokenizer: turns captions into tokens.
            sizes: view name -> (height, width) in pixels.
            seed: the run's.
        """
        self.source = source
        self.tokenizer = tokenizer
        self.seed = seed
        self._views = views
        self._sizes = dict(sizes)
        self._min_side = views.least_side(self._sizes)  # JPEGs are decoded no larger than that takes

    def __len__(self) -> int:
        """Return the number of samples in the source, bad ones included."""
        return len(self.source)

    def __getitem__(self, request: Request) -> Item:
        """Return the sample for `request`, or a seeded good one in its place.

        What is drawn for a replacement depends on the place that it fills, numbered after all regular
        samples, so that it does not repeat the crops of its own regular appearance in this epoch.

        Raises:
            DataError: `MAX_REPLACEMENTS` samples in a row are bad.
        """
        epoch, index = request
        try:
            return self._read(index, epoch, sample=index)
        except BadSampleError as error:
            skipped = {self.source.key(index): error.reason}
        place = len(self) + index
        candidates = rng.generator(self.seed, "replacement", epoch, index)
        for candidate in candidates.integers(len(self), size=MAX_REPLACEMENTS).tolist():
            try:
                return self._read(candidate, epoch, sample=place, skipped=tuple(skipped.items()))
            except BadSampleError as error:
                skipped[self.source.key(candidate)] = error.reason
        name, reason = next(iter(skipped.items()))
        raise DataError(
            f"no usable sample in {self.source.name}: {MAX_REPLACEMENTS + 1} in a row are bad, "
            f"the first is {name} ({reason})"
        )

    def items(self, requests: Sequence[Request]) -> Iterator[Item]:
        """Yield `self[request]` for every request, in less time.

        The small work of several samples, reading, drawing and tokenising captions, is done in one go: between two
        pictures, each of which fills the processor's cache, it takes three times as long.

        Raises:
            DataError: as `self[request]`.
        """
        for first in range(0, len(requests), _TOGETHER):
            some = requests[first : first + _TOGETHER]
            started = [self._start(request) for request in some]
            tokens = iter(self.tokenizer([one.text for one in started if one is not None]))
            for request, one in zip(some, started, strict=True):
                if one is None:
                    yield self[request]
                    continue
                own = next(tokens)
                try:
                    yield self._finish(one, own)
                except BadSampleError:
                    yield self[request]

    def _read(
        self, index: int, epoch: int, *, sample: int, skipped: tuple[tuple[str, str], ...] = ()
    ) -> Item:
        """Build sample `index`, everything random drawn for (`epoch`, `sample`)."""
        one = self._begin(index, epoch, sample)
        return self._finish(one, self.tokenizer([one.text])[0], skipped)

    def _start(self, request: Request) -> "_Begun | None":
        """Begin a sample; None if it is bad."""
        try:
            return self._begin(request.sample, request.epoch, request.sample)
        except BadSampleError:
            return None

    def _begin(self, index: int, epoch: int, sample: int) -> "_Begun":
        """Do all of a sample but its picture and tokens."""
        raw = self.source.read(index)
        captions = clean_captions(raw.captions)  # before the picture: cheaper to find wanting
        caption = draw_caption(captions, raw.tags, seed=self.seed, epoch=epoch, sample=sample)
        concept = caption.caption_id if raw.concept is None else caption_id(raw.concept)
        return _Begun(raw, index, epoch, sample, caption.text, concept, rng.sample_seed(self.seed, epoch, sample))

    def _finish(self, one: "_Begun", tokens: Int[Tensor, " T"], skipped: tuple[tuple[str, str], ...] = ()) -> Item:
        image = decode_pixels(one.raw.image, min_side=self._min_side)
        views = self._views(image, seed=self.seed, epoch=one.epoch, sample=one.sample, sizes=self._sizes)
        return Item(views, tokens, one.caption_id, one.seed, one.raw.key, one.number, skipped)


class _Begun(NamedTuple):
    """A sample without its picture, see `Item`."""

    raw: RawSample
    number: int
    epoch: int
    sample: int
    text: str
    caption_id: int
    seed: int
