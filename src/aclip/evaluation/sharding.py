"""Sharding one evaluation over the ranks of a process group.

Off unless asked for: during training one rank may evaluate alone while the others wait, and then no collective may run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from aclip import dist
from aclip.errors import AclipError, DataError, OutOfMemoryError

_sharded: ContextVar[bool] = ContextVar("sharded", default=False)


@contextmanager
def sharded() -> Iterator[None]:
    """Share the work of every evaluation inside among all ranks, which make the same calls and get all results."""
    token = _sharded.set(True)
    try:
        yield
    finally:
        _sharded.reset(token)


def world_size() -> int:
    """Return the number of ranks that share the work."""
    return dist.world_size() if _sharded.get() else 1


def rank() -> int:
    """Return this process's rank among them."""
    return dist.rank() if _sharded.get() else 0


def collect(value: Any) -> list[Any]:
    """Return every rank's value, in rank order, on all ranks."""
    return dist.collect(value) if world_size() > 1 else [value]


def gather(rows: Float[Tensor, "n d"]) -> Float[Tensor, "N D"]:
    """Return the rows of all ranks, in rank order, on all ranks; a rank without any may bring (0, 0)."""
    if world_size() == 1:
        return rows
    counts, widths = zip(*collect(tuple(rows.shape)), strict=True)
    padded = F.pad(rows, (0, max(widths) - rows.shape[1], 0, max(counts) - len(rows)))
    shards = dist.gather(padded).view(world_size(), max(counts), max(widths))
    return torch.cat([shard[:count] for shard, count in zip(shards, counts, strict=True)])


@contextmanager
def as_aclip_errors() -> Iterator[None]:
    """Make errors of files and exhausted device memory an `AclipError`, which a training loop survives."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot evaluate: {error}") from error
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"the evaluation does not fit into the device's memory: {error}") from error


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise an error of one rank on every rank; the code inside must not use any collective."""
    problem: AclipError | None = None
    try:
        with as_aclip_errors():
            yield
    except AclipError as error:
        problem = error
    for found in collect(problem):
        if found is not None:
            raise found
