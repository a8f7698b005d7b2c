"""Evaluating on several processes at once; outside of `together` every process evaluates for itself.

A run on several processes may let one of them evaluate while the others wait, and then nothing here may wait for them:
so the sharing is asked for, and not read off the process group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from aclip import dist
from aclip.errors import AclipError

_shared: ContextVar[bool] = ContextVar("shared", default=False)


@contextmanager
def together() -> Iterator[None]:
    """Share every evaluation inside among all processes, which must do the same there: each ends with all results."""
    token = _shared.set(True)
    try:
        yield
    finally:
        _shared.reset(token)


def world_size() -> int:
    """Return how many processes share the work."""
    return dist.world_size() if _shared.get() else 1


def rank() -> int:
    """Return this process's number among them, from 0."""
    return dist.rank() if _shared.get() else 0


def share(count: int) -> range:
    """Return this process's run of `count` things; the runs lie behind one another in the order of the ranks."""
    first, last = (count * i // world_size() for i in (rank(), rank() + 1))
    return range(first, last)


def collect(value: Any) -> list[Any]:
    """Return every process's value, in rank order, on all."""
    return dist.collect(value) if world_size() > 1 else [value]


def gather(x: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "WB *rest"]:
    """Return the rows of all processes, in rank order, on all; everyone brings equally many."""
    return dist.gather(x) if world_size() > 1 else x


def sum_over_ranks(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the sum of `x` over the processes, on all."""
    return dist.sum_over_ranks(x) if world_size() > 1 else x


@contextmanager
def common_fate() -> Iterator[None]:
    """Let an error of one process be one of all: the others would wait for it for ever."""
    problem: AclipError | None = None
    try:
        yield
    except AclipError as error:
        if world_size() == 1:
            raise
        problem = error
    for found in collect(problem):
        if found is not None:
            raise found
