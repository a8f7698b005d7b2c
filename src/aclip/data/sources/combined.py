"""Sources made of others: several as one (`Joined`), a mixture by weight (`Mixture`), and a part of one (`Part`)."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate

import numpy as np

from aclip import rng
from aclip.data.decode import stretch_grey
from aclip.data.sources.base import Delegating, RawSample, Runs, Source, Summary, digest_of
from aclip.data.spec import parse_spec
from aclip.errors import ConfigError, DataError

_NOTES = 5  # of all sources together, in a summary


class Joined(Delegating):
    """The samples of several sources (`parts`), numbered through: what `lists/{a,b}.csv` names."""

    def __init__(self, spec: str, sources: Sequence[Source]) -> None:
        self.spec = spec
        self.parts = tuple(sources)
        self._runs = Runs([len(source) for source in sources])

    def __len__(self) -> int:
        return len(self._runs)

    def name(self, index: int) -> str:
        source, index = self._place(index)
        return f"{source.spec}: {source.name(index)}"

    def advice(self) -> list[str]:
        return [sentence for source in self.parts for sentence in source.advice()]

    @property
    def summary(self) -> Summary:
        all_of = [source.summary for source in self.parts]
        left_out = sum((Counter(one.left_out) for one in all_of), Counter[str]())
        notes = tuple(dict.fromkeys(note for one in all_of for note in one.notes))
        return Summary(self.spec, sum(one.found for one in all_of), sum(one.captioned for one in all_of),
                       sum(one.uncaptioned for one in all_of), left_out, notes[:_NOTES])

    def digest(self) -> str:
        return digest_of(type(self).__name__, *(source.digest() for source in self.parts))

    def _place(self, index: int) -> tuple[Source, int]:
        number, index = self._runs.place(index)
        return self.parts[number], index


class Mixture(Joined):
    """Sources that share the places of an epoch in proportion to their weights.

    An epoch has as many places as all sources have samples together. Source i takes the fraction w_i / sum(w) of
    them, and walks through permutations of itself, from one epoch to the next. (Training leaves out the places that do
    not fill the last batch of an epoch; what they hold comes again with the next permutation.) A sample that comes
    again has the next number of its pass, from which crops and captions are drawn.

    Attributes:
        shares: of each source, adding up to 1.
    """

    def __init__(self, spec: str, sources: Sequence[Source], weights: Sequence[float]) -> None:
        super().__init__(spec, sources)
        whole = sum(map(Fraction, weights))
        self._exact = [Fraction(weight) / whole for weight in weights]  # rounding would shift whole places
        self.shares = tuple(map(float, self._exact))
        # what is left for the largest share, after the others are rounded, must not be negative
        if len(self) * max(self._exact) < len(sources):
            raise DataError(f"{len(self)} samples are too few to mix {len(sources)} sources: {spec}")

    def order(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._part(number, seed, epoch) for number in range(len(self.parts))]
        samples, passes = (np.concatenate(column) for column in zip(*parts, strict=True))
        # Who comes when is drawn; each source's own samples stay in the order that suits it.
        # Two bytes an owner, because numpy sorts those by counting.
        owners = np.repeat(np.arange(len(parts), dtype=np.uint16), [len(part[0]) for part in parts])
        drawn = rng.generator(seed, "mixture", epoch).permutation(owners)
        place = np.argsort(drawn, kind="stable")
        mixed = np.empty((2, len(drawn)), dtype=np.int64)
        mixed[:, place] = samples, passes
        return mixed[0], mixed[1]

    def spans(self, seed: int, epoch: int) -> list[int]:
        if any(source.groups for source in self.parts):
            raise ConfigError(f"hard negatives cannot be drawn from a mixture with remote shards or row groups, as "
                              f"{self.spec}: train on one source, or pack each with `aclip data pack`")
        return [len(self)]

    def window(self, seed: int, epoch: int, sample: int) -> list[range]:
        number, inner = self._runs.place(sample)
        start = self._runs.start(number)
        window = self.parts[number].window(self._seed(seed, number), epoch, inner)
        return [range(start + some.start, start + some.stop) for some in window]

    @staticmethod
    def _seed(seed: int, number: int) -> int:
        return int(rng.generator(seed, "mixture", "source", number).integers(2**63))

    def _part(self, number: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        first, last = self._taken(number, epoch), self._taken(number, epoch + 1)
        source = self.parts[number]
        own_seed = self._seed(seed, number)
        samples, passes = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for one_pass in range(first // len(source), math.ceil(last / len(source))):
            start = one_pass * len(source)
            within = slice(max(first - start, 0), min(last - start, len(source)))
            samples.append(source.order(own_seed, one_pass)[0][within])
            passes.append(np.full(len(samples[-1]), one_pass, dtype=np.int64))
        return np.concatenate(samples) + self._runs.start(number), np.concatenate(passes)

    def _taken(self, number: int, epochs: int) -> int:
        """Return how many places source `number` has taken after some epochs; the largest takes what is left."""
        places = epochs * len(self)
        largest = self._exact.index(max(self._exact))
        if number != largest:
            return int(places * self._exact[number])
        return places - sum(self._taken(other, epochs) for other in range(len(self.parts)) if other != largest)


class Part(Delegating):
    """Samples `first` to `last` (exclusive) of another source, under numbers of their own.

    Its groups are those of the source that lie in it, those at its ends cut.
    """

    def __init__(self, source: Source, first: int = 0, last: int | None = None) -> None:
        self.parts = (source,)
        self.first, self.last = first, len(source) if last is None else min(last, len(source))
        self.spec = f"{source.spec}[{first}:{'' if last is None else last}]"
        if self.first >= self.last:
            raise DataError(f"'{self.spec}' is empty: the source has {len(source):,} samples")
        sized = zip(source.groups, accumulate(source.groups), strict=True)
        spans = ((max(end - size, self.first), min(end, self.last)) for size, end in sized)
        self.groups = tuple(end - start for start, end in spans if start < end)

    def __len__(self) -> int:
        return self.last - self.first

    def name(self, index: int) -> str:
        return self.parts[0].name(self.first + index)

    def digest(self) -> str:
        return digest_of(self.parts[0].digest(), self.first, self.last)

    def _place(self, index: int) -> tuple[Source, int]:
        return self.parts[0], self.first + index


class Stretched(Part):
    """A source whose 16-bit grey images are stretched to 8 bits, see `aclip.data.decode.stretch_grey`."""

    def __init__(self, source: Source, white: str) -> None:
        """Stretch each image from its darkest value to its brightest for "1", from 0 to `white` for greater numbers."""
        super().__init__(source)
        if not white.isdecimal() or int(white) < 1:
            raise ConfigError(f"'stretch={white}': write 1, or the grey value that is white, such as 4095 for 12 bits")
        self.spec = f"{source.spec}?stretch={white}"
        self._white = None if int(white) == 1 else float(white)

    def read(self, index: int) -> RawSample:
        raw = super().read(index)
        return replace(raw, image=stretch_grey(raw.image, self._white))


def open_mixture(specs: str | Sequence[str], open_one: Callable[[str], Source]) -> Source:
    """Open `a.csv=2 b.tar=1`, or one source alone; without weights, sources weigh as much as they have samples."""
    given = [specs] if isinstance(specs, str) else list(specs)
    weights = weights_of(given)
    if None in weights and any(weights):
        unweighted = given[weights.index(None)]
        raise ConfigError(f"the source '{unweighted}' has no weight, and others have: give all of them one, or none")
    sources = [open_one(spec) for spec in given]
    if len(sources) == 1:
        return sources[0]
    name = " + ".join(source.spec for source in sources)
    return Mixture(name, sources, [weight or len(one) for weight, one in zip(weights, sources, strict=True)])


def weights_of(specs: str | Sequence[str]) -> list[float | None]:
    """Return the weight of each of some sources, or None where it has none."""
    return [parse_spec(spec).weight for spec in ([specs] if isinstance(specs, str) else specs)]
