"""Worker processes that read ahead of the one that computes, over torch's DataLoader."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from aclip import dist
from aclip.errors import AclipError

_log = logging.getLogger(__name__)

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


MOST_SUITABLE = 8
"""Most processes that read where nobody has said how many: each holds whole batches."""


def usable_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def suitable_workers(device: torch.device, asked: int | None = None) -> int:
    """Return how many processes should read for one that computes on `device`: `asked`, where somebody has.

    Beside a GPU all cores but one; on a CPU, where they take cores from the training, a quarter of them. The processes
    that share this machine share its cores. At least 1, at most `MOST_SUITABLE`.
    """
    if asked is not None:
        return asked
    cores = usable_cores() // dist.processes_here()
    return min(MOST_SUITABLE, max(1, cores // 4 if device.type == "cpu" else cores - 1))


def read_ahead(
    read: Callable[[Asked], Answer],
    requests: Iterable[Asked],
    *,
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Iterator[Answer]:
    """Yield `read(request)` for every request, in order, whatever the number of processes.

    Touches no global random generator. Workers run torch on one thread and leave Ctrl-C to the process
    that started them; they end with the iteration.

    Args:
        read: a function of its argument alone; pickled where processes are spawned, not forked.
        requests: may be endless; drawn from in this process as workers become free.
        workers: processes; 0 reads in this one.
        prefetch: requests that each worker is ahead.
        pin_memory: deliver tensors, or objects with `pin_memory()`, in page-locked memory.

    Raises:
        AclipError: as `read` raised it in its worker.
    """
    cores = usable_cores()
    if workers > cores:
        _log.warning("%d loader workers share %d cores: fewer would be as fast", workers, cores)
    with warnings.catch_warnings():
        # Torch's wording of the above; and that forking beside threads can deadlock (Python 3.12): a worker
        # waits for no lock of the threads left behind, and starts none of its own.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        loader: DataLoader[Any] = DataLoader(
            _Reader(read),
            sampler=requests,
            batch_size=None,  # a request is answered whole
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # or torch draws the workers' base seed from the global one
        )
        answers = iter(loader)
    try:
        for answer in answers:
            if isinstance(answer, AclipError):
                raise answer
            yield answer
    finally:
        # Stops the workers now. An error's traceback keeps this frame: torch's iterator would live on in a
        # reference cycle, and a worker forked later that collects it waits seconds for processes not its own.
        del answers


class _Reader(Dataset[Any], Generic[Asked, Answer]):
    """Answers requests in a worker.

    An error that the user can cause is returned, not raised: torch would wrap its one sentence in the
    worker's traceback.
    """

    def __init__(self, read: Callable[[Asked], Answer]) -> None:
        self._read = read

    def __getitem__(self, request: Asked) -> Answer | AclipError:
        try:
            return self._read(request)
        except AclipError as error:
            return error


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # torchrun and Slurm send what they send to the whole group; the parent saves first, and ends its workers itself
    parent = os.getppid()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None if os.getppid() == parent else os._exit(1))
    sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Stay silent where the parent was interrupted while it took a tensor over: it says so itself."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _unchanged(answer: Any) -> Any:
    return answer
