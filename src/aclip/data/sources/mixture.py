"""Several sources trained on together, each with a share of every epoch."""

import math
import os
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from aclip import rng
from aclip.data.order import order_of
from aclip.data.sources.base import Source
from aclip.data.sources.joined import Joined
from aclip.errors import ConfigError, DataError

_WEIGHT = re.compile(r"(.+)=([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf)", re.DOTALL)
_UNFINISHED_QUERY = re.compile(r".*[?&]\w+", re.DOTALL)


class Mixture(Joined):
    """Sources that share the places of an epoch in proportion to their weights.

    An epoch has as many places as all sources have samples together. Source i takes the share w_i / sum(w) of
    them, and walks through permutations of itself: all of its samples are seen before one is seen again, also
    from one epoch to the next. With weights that are the sources' sizes, every sample is seen once an epoch.

    A sample that comes again has the next number of its pass, from which crops and captions are drawn, so that
    a small source with a large weight does not repeat its views.

    Attributes:
        name: what the user called it.
        sources: in their order.
        shares: of each, adding up to 1.
    """

    def __init__(self, name: str, sources: Sequence[Source], weights: Sequence[float]) -> None:
        """Mix `sources` by `weights`, positive numbers.

        Raises:
            DataError: fewer samples than it takes to give every source its share.
        """
        super().__init__(name, sources)
        whole = sum(map(Fraction, weights))
        self._exact = [Fraction(weight) / whole for weight in weights]  # rounding would shift whole places
        self.shares = tuple(map(float, self._exact))
        # what is left for the largest share, after the others are rounded, must not be negative
        if len(self) * max(self._exact) < len(sources):
            raise DataError(f"{len(self)} samples are too few to mix {len(sources)} sources: {name}")

    def order(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sample and its pass for every place of an epoch, see `aclip.data.order.Ordered`."""
        parts = [self._part(number, seed, epoch) for number in range(len(self.sources))]
        samples, passes = (np.concatenate(column) for column in zip(*parts, strict=True))
        # Who comes when is drawn; each source's own samples stay in the order that suits it.
        # Two bytes an owner, because numpy sorts those by counting.
        owners = np.repeat(np.arange(len(parts), dtype=np.uint16), [len(part[0]) for part in parts])
        drawn = rng.generator(seed, "mixture", epoch).permutation(owners)
        place = np.argsort(drawn, kind="stable")
        mixed = np.empty((2, len(drawn)), dtype=np.int64)
        mixed[:, place] = samples, passes
        return mixed[0], mixed[1]

    def _part(self, number: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples and passes of one source's places in an epoch."""
        first, last = self._taken(number, epoch), self._taken(number, epoch + 1)
        source = self.sources[number]
        own_order = order_of(source)
        own_seed = int(rng.generator(seed, "mixture", "source", number).integers(2**63))
        samples, passes = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for one_pass in range(first // len(source), math.ceil(last / len(source))):
            start = one_pass * len(source)
            within = slice(max(first - start, 0), min(last - start, len(source)))
            samples.append(own_order(own_seed, one_pass)[0][within])
            passes.append(np.full(len(samples[-1]), one_pass, dtype=np.int64))
        return np.concatenate(samples) + self._runs.start(number), np.concatenate(passes)

    def _taken(self, number: int, epochs: int) -> int:
        """Return how many places source `number` has taken after some epochs; the largest takes what is left."""
        places = epochs * len(self)
        largest = self._exact.index(max(self._exact))
        if number != largest:
            return int(places * self._exact[number])
        return places - sum(self._taken(other, epochs) for other in range(len(self.sources)) if other != largest)


def open_mixture(specs: str | Sequence[str], open_one: Callable[[str], Source]) -> Source:
    """Open `a.csv=2 b.tar=1`, or one source alone.

    Without weights, sources weigh as much as they have samples: every sample is seen once an epoch.

    Args:
        specs: one or more sources, with `=NUMBER` behind each or none of them.
        open_one: opens a source.

    Raises:
        ConfigError: a weight that is not positive, or weights behind some sources only.
        AclipError: as `open_one`.
    """
    parsed = [split_weight(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
    weights = [weight for _, weight in parsed if weight is not None]
    if weights and len(weights) < len(parsed):
        unweighted = next(spec for spec, weight in parsed if weight is None)
        raise ConfigError(f"the source '{unweighted}' has no weight, and others have: give all of them one, or none")
    sources = [open_one(spec) for spec, _ in parsed]
    if len(sources) == 1:
        return sources[0]
    name = " + ".join(source.name for source in sources)
    return Mixture(name, sources, weights or [len(source) for source in sources])


def weights_of(specs: str | Sequence[str]) -> list[float | None]:
    """Return the weight of each of some sources, or None where it has none."""
    return [split_weight(spec)[1] for spec in ([specs] if isinstance(specs, str) else specs)]


def split_weight(spec: str) -> tuple[str, float | None]:
    """Return a source's specification without its weight, and the weight, or None where it has none.

    >>> split_weight("a.csv=2"), split_weight("a.csv?image=2")
    (('a.csv', 2.0), ('a.csv?image=2', None))

    Raises:
        ConfigError: a weight that is not a positive number.
    """
    match = _WEIGHT.fullmatch(spec)
    if match is None or os.path.exists(spec) or _UNFINISHED_QUERY.fullmatch(match[1]):
        return spec, None
    weight = float(match[2])
    if not 0.0 < weight < math.inf:
        raise ConfigError(f"the weight of '{match[1]}' must be a positive number, not {match[2]}")
    return match[1], weight
