"""What every source is: image-text pairs that can be counted, and read in any order."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from aclip import rng
from aclip.data.decode import grey_peak
from aclip.errors import BadSampleError

WINDOW = 8
"""Groups that training draws from at a time, and that a reader of groups keeps."""


@dataclass(frozen=True)
class RawSample:
    """One pair as it is stored."""

    name: str  # unique in its source; reports and journals use it
    image: bytes  # the image file, not yet decoded
    captions: tuple[str, ...]  # as written; empty where the source has none for this image
    tags: tuple[str, ...] = ()  # further words for the image
    label: str | None = None  # the image's class
    # What the captions name, if they are several ways to say it: images of one concept are not each other's negatives
    # whichever caption each is drawn with. None: every caption stands for itself.
    concept: str | None = None


@dataclass(frozen=True)
class Summary:
    """How a source was read, for one line: `found` = `captioned` + `uncaptioned` + the sum of `left_out`."""

    source: str  # what the user called it
    found: int  # images seen, used or not
    captioned: int  # images used that have a caption (one that may turn out to be blank counts)
    uncaptioned: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason -> images found and not used
    notes: tuple[str, ...] = ()  # how the source was read, and how to choose another reading where two are plausible

    def __str__(self) -> str:
        parts = [f"{self.found:,} image{'s' * (self.found != 1)}"]
        if self.uncaptioned:
            parts += [f"{self.captioned:,} captioned", f"{self.uncaptioned:,} without caption"]
        parts += [f"{count:,} left out ({reason})" for reason, count in self.left_out.items() if count]
        return "; ".join([f"{self.source}: {', '.join(parts)}", *self.notes])


class Source:
    """A numbered collection of pairs.

    A source is forked or pickled into every worker, so it holds no open file, and all processes see the same samples
    under the same indices. Subclasses define `__len__`, `read` and `name`; the rest has defaults.

    Attributes:
        spec: what the user called it.
        groups: number of samples in each group, where reading is by groups of consecutive samples (row groups, remote
            shards) and a random order over all of them would be slow; empty where any order is as fast.
        parts: the sources that this one is made of; empty for one that reads files itself.
    """

    spec: str = ""
    groups: tuple[int, ...] = ()
    parts: tuple["Source", ...] = ()

    def __len__(self) -> int:
        """Return the number of samples, bad ones included."""
        raise NotImplementedError

    def read(self, index: int) -> RawSample:
        """Read sample `index`, 0 <= index < len.

        Raises:
            BadSampleError: the sample's files or fields are missing or unreadable.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the unique, printable name of sample `index` without reading it."""
        raise NotImplementedError

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of sample `index`; sources that can do so without reading the image override this."""
        return self.read(index).captions

    def path(self, index: int) -> Path | None:
        """Return the file that is the image of sample `index`, or None if the image is no file of its own."""
        return None

    def order(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of an epoch in order, and for each the pass from which its crops and caption are drawn.

        (n,) int64 each, a function of the arguments alone. By default every sample once, the groups mixed `WINDOW` at
        a time.
        """
        samples = (window_order(self.groups, seed, epoch) if self.groups
                   else rng.generator(seed, "order", epoch).permutation(len(self)))
        return samples, np.full(len(samples), epoch, dtype=np.int64)

    def spans(self, seed: int, epoch: int) -> list[int]:
        """Return the lengths of the spans of `order`, one after the other, in which samples may change places without
        being read at another time: all samples, or those of each window of groups.
        """
        chosen = _windows(self.groups, rng.generator(seed, "order", epoch))
        return [sum(self.groups[group] for group in window) for window in chosen] or [len(self)]

    def window(self, seed: int, epoch: int, sample: int) -> list[range]:
        """Return the samples that are read at about the time of `sample`: those of its window of groups.

        A replacement drawn from them needs no shard or row group that is not in use anyway. The last window, which may
        be short, is filled up from the one before. `epoch` is the pass that `order` returned with the sample.
        """
        if not self.groups:
            return [range(len(self))]
        runs = Runs(self.groups)
        order = rng.generator(seed, "order", epoch).permutation(len(self.groups)).tolist()
        first = order.index(runs.place(sample)[0]) // WINDOW * WINDOW
        chosen = order[max(0, min(first, len(order) - WINDOW)) : first + WINDOW]
        return [range(start := runs.start(group), start + self.groups[group]) for group in chosen]

    def advice(self) -> list[str]:
        """Return what makes training on this source slow or useless, and what to do; a few samples are read."""
        return [*group_advice(self), *_grey_advice(self), *_caption_advice(self)]

    @property
    def summary(self) -> Summary:
        """How the source was read; its line is logged when the source is opened."""
        return Summary(self.spec, len(self), len(self))

    def digest(self) -> str:
        """Return a hash of what the samples are and how they are numbered, for ranks to compare; not of where they lie.
        """
        return digest_of(type(self).__name__, len(self), self.groups)


class Delegating(Source):
    """A source whose samples are those of other sources: `_place` says of which, and under which number there."""

    def _place(self, index: int) -> tuple[Source, int]:
        raise NotImplementedError

    def read(self, index: int) -> RawSample:
        source, inner = self._place(index)
        return replace(source.read(inner), name=self.name(index))

    def captions(self, index: int) -> tuple[str, ...]:
        source, inner = self._place(index)
        return source.captions(inner)

    def path(self, index: int) -> Path | None:
        source, inner = self._place(index)
        return source.path(inner)


_LARGE_GROUP = 20_000  # samples: eight such groups of 30 kB images are 5 GB in each worker
_GREYS_READ, _CAPTIONS_READ = 5, 200


def group_advice(source: Source) -> list[str]:
    """Advise to pack a source whose groups are larger than workers can keep."""
    largest = max(source.groups, default=0)
    if largest <= _LARGE_GROUP and (len(source.groups) != 1 or largest <= 1000):
        return []
    return [f"{source.spec} has a row group or shard of {largest:,} pairs, which every worker reads whole, and keeps "
            f"{WINDOW} of: 'aclip data pack {source.spec} --output shards' makes shards of 1,000"]


def _grey_advice(source: Source) -> Iterator[str]:
    """Advise to stretch 16-bit images that use a small part of their range, as those of 12-bit detectors do."""
    peak = 0
    for index in range(min(len(source), _GREYS_READ)):
        with suppress(BadSampleError):
            peak = max(peak, grey_peak(source.read(index).image) or 0)
    if 0 < peak < 2**15:
        white = 2 ** peak.bit_length() - 1
        yield (f"{source.spec} has 16-bit grey images whose brightest value is {peak:,} of 65,535, so they are read as "
               f"nearly black: '?stretch={white}' makes {white:,} white, '?stretch=1' stretches each image")


def _caption_advice(source: Source) -> Iterator[str]:
    numbers = evenly(len(source), _CAPTIONS_READ)
    if source.groups:  # no further than the first group
        numbers = range(min(source.groups[0], _CAPTIONS_READ))
    said: set[str] = set()
    for index in numbers:
        with suppress(BadSampleError):
            said.update(" ".join(text.split()) for text in source.captions(index) if text.strip())
        if len(said) > 1:
            return
    if said and len(numbers) > 1:
        yield f"{source.spec} has one caption for every image, {said.pop()[:80]!r}: nothing can be learnt from it"
    elif not said and numbers:
        yield (f"no image of {source.spec} has a caption, of {len(numbers)} that were checked: it can evaluate "
               "classification, not train on captions")


def digest_of(*parts: Any) -> str:
    """Return 32 hexadecimal digits of BLAKE2b over bytes, `PackedStrings`, arrays and the text of anything else."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, PackedStrings):
            part = part.content()
        elif isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part).tobytes()
        elif not isinstance(part, bytes | bytearray):
            part = str(part).encode("utf-8", errors="backslashreplace")
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.hexdigest()


def window_order(groups: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """Return a permutation, (sum of groups,) int64, that needs few groups of consecutive samples at a time.

    The groups are permuted, taken `WINDOW` at a time, and the samples of each window are permuted.
    """
    generator = rng.generator(seed, "order", epoch)
    samples = np.split(np.arange(sum(groups)), np.cumsum(groups)[:-1])
    return np.concatenate([generator.permutation(np.concatenate([samples[group] for group in chosen]))
                           for chosen in _windows(groups, generator)])


def _windows(groups: Sequence[int], generator: np.random.Generator) -> list[list[int]]:
    """Return the numbers of the groups, permuted, `WINDOW` at a time."""
    order = generator.permutation(len(groups)).tolist()
    return [order[first : first + WINDOW] for first in range(0, len(order), WINDOW)]


def evenly(count: int, most: int) -> range:
    """Return at most `most` numbers below `count`, evenly over them."""
    return range(0, count, -(-count // most) or 1)


def printable(name: str) -> str:
    """Return `name` with the bytes of an undecodable file name as escapes: journals and terminals take UTF-8."""
    return name.encode("utf-8", errors="backslashreplace").decode("utf-8")


def relative_names(places: Sequence[str]) -> list[str]:
    """Return file paths or addresses as short as they are distinct: without the folder that all of them share."""
    split = [place.split("/") for place in places]
    folders = zip(*(parts[:-1] for parts in split), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, folders))
    return ["/".join(parts[shared:]) for parts in split]


class Runs:
    """Numbers 0, 1, 2, ... in runs of some lengths: the samples of several sources, files or row groups."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._ends = np.cumsum(self._sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._sizes else 0

    def start(self, run: int) -> int:
        return int(self._ends[run]) - self._sizes[run]

    def place(self, number: int) -> tuple[int, int]:
        """Return the run that has `number`, 0 <= number < len, and its place there."""
        run = int(np.searchsorted(self._ends, number, side="right"))
        return run, number - self.start(run)


class PackedStrings:
    """A list of strings in two flat buffers that strings can be appended to; undecodable file names survive.

    A million Python strings cost about 60 MB more than their text, and touching their reference counts
    copies them into every forked worker; a buffer costs 8 bytes a string and stays shared.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        self._text += string.encode("utf-8", errors="surrogateescape")
        self._ends.append(len(self._text))

    def content(self) -> bytes:
        return bytes(self._text) + self._ends.tobytes()

    def sizes(self) -> np.ndarray:
        """Return the (n,) int64 number of bytes of each string."""
        return np.diff(np.frombuffer(self._ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        return str(self._text[self._ends[index] : self._ends[index + 1]], "utf-8", "surrogateescape")
