"""Samples whose pictures are drawn."""

import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

from aclip.data.fetch.iconify import Icon
from aclip.data.fetch.progress import Progress
from aclip.data.fetch.render import Drawing, Renderer, drawing
from aclip.data.tar_files import Sample
from aclip.data.workers import usable_cores
from aclip.errors import BadSampleError

_log = logging.getLogger(__name__)

MAX_WORKERS = 8
"""Processes that draw, at most, unless a set is told another number."""


class Drawn(Protocol):
    """A sample that lacks its picture.

    Attributes:
        icon: what is drawn.
        key: the sample's name.
    """

    @property
    def icon(self) -> Icon: ...
    @property
    def key(self) -> str: ...

    def sample(self, png: bytes) -> Sample:
        """Return the sample with the picture `png`."""
        ...


def worker_count(workers: int | None) -> int:
    """Return `workers`, or for None one a core, `MAX_WORKERS` at most."""
    return workers or min(MAX_WORKERS, usable_cores())


def draw_samples(
    pictures: Sequence[Drawn], renderer: Renderer, progress: Progress, skipped: dict[str, str]
) -> Iterator[Sample]:
    """Yield the samples of some pictures; those that cannot be drawn go into `skipped` with the reason."""
    drawings: list[Drawing] = []
    drawable: list[Drawn] = []
    for picture in pictures:
        try:
            drawings.append(drawing(picture.icon))
            drawable.append(picture)
        except BadSampleError as error:
            skipped[picture.key] = error.reason
    if skipped:
        progress.advance(len(skipped))
    for picture, result in zip(drawable, renderer(drawings), strict=True):
        progress.advance(1)
        if isinstance(result, str):
            skipped[picture.key] = result
        else:
            yield picture.sample(result)
    for key, reason in skipped.items():
        _log.warning("skipped %s: %s", key, reason)
