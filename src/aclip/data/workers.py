"""Worker processes that read ahead of the training process, over torch's DataLoader."""

import atexit
import contextlib
import errno
import functools
import logging
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from aclip import dist
from aclip.devices import usable_cores
from aclip.errors import AclipError, ConfigError, DataError

_log = logging.getLogger(__name__)

Request = TypeVar("Request")
Answer = TypeVar("Answer")

_MAX_WORKERS = 8
_GRACE = 0.5  # seconds in which a worker may finish what it reads before it exits
# Forked workers share the index of a source, which spawned ones (Python 3.14's default) would copy.
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"

_SMALL_SHM = ("/dev/shm has no room for batches: give the container more ('docker run --shm-size=8g'), or read in the "
             "training process with '--workers 0'")


def suitable_workers(device: torch.device, workers: int | None = None) -> int:
    """Return how many processes should read for one that computes on `device`; `workers`, unless it is None.

    Beside a GPU all cores but one; on a CPU, where readers take cores from training, a quarter of them. The ranks on
    this machine share its cores. At least 1, at most 8: each holds whole batches in memory.

    Raises:
        ConfigError: a negative number.
    """
    if workers is not None:
        return check_workers(workers)
    cores = usable_cores() // dist.processes_here()
    return min(_MAX_WORKERS, max(1, cores // 4 if device.type == "cpu" else cores - 1))


def check_workers(workers: int) -> int:
    """Return `workers`, or raise ConfigError for a negative number."""
    if workers < 0:
        raise ConfigError(f"workers must be 0 (read in the main process) or more, not {workers}")
    return workers


def read_ahead(read: Callable[[Request], Answer], requests: Iterable[Request], *, workers: int, prefetch: int = 2,
               pin_memory: bool = False) -> Iterator[Answer]:
    """Yield `read(request)` for every request, in order, whatever the number of processes.

    Touches no global random generator, and may be called from any thread. Workers run torch on one thread, ignore
    signals sent to the process group (the parent decides when to stop), and exit within a second of the iteration's
    end or the parent's death, also in the middle of a long read.

    Args:
        read: a pure function, picklable where processes cannot fork.
        requests: may be endless; consumed in this process as workers become free.
        workers: processes; 0 reads in this one.
        prefetch: requests that each worker reads ahead.
        pin_memory: deliver tensors, and objects with `pin_memory()`, in page-locked memory.

    Raises:
        ConfigError: a negative number of workers.
        AclipError: as raised by `read` in its worker.
        DataError: a worker was killed, or there is no shared memory to talk to one.
    """
    cores = usable_cores()
    if check_workers(workers) > cores:
        _log.warning("%d loader workers share %d cores: fewer would be as fast", workers, cores)
    return _read_ahead(read, requests, workers, prefetch, pin_memory)


def _read_ahead(
    read: Callable[[Request], Answer], requests: Iterable[Request], workers: int, prefetch: int, pin_memory: bool
) -> Iterator[Answer]:
    with contextlib.ExitStack() as stack:
        # Cleared to stop the workers, once they are told to. The traceback of an error keeps this frame: torch's
        # iterator would live on in a cycle, and a worker forked later that collects it would wait for strangers.
        answers: list[Iterator[Any]] = []
        stack.callback(answers.clear)
        # the id is asked for here, because this process may have gone before a worker asks
        start = functools.partial(_start_worker, stack.enter_context(_stopping()), os.getpid()) if workers else None
        with warnings.catch_warnings():
            # Torch's wording of too many workers; and that forking beside threads can deadlock (Python 3.12): a worker
            # waits for no lock of the threads left behind.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
            try:
                # Without a batch size a request is answered whole. Without a generator torch draws the workers' base
                # seed from the global one.
                answers.append(iter(DataLoader(
                    _Reader(read), sampler=requests, batch_size=None, collate_fn=_unchanged, num_workers=workers,
                    prefetch_factor=prefetch if workers else None, worker_init_fn=start, pin_memory=pin_memory,
                    multiprocessing_context=_START_METHOD if workers else None, generator=torch.Generator())))
            except OSError as error:  # the semaphores of queues lie in shared memory, too
                remedy = _SMALL_SHM if error.errno == errno.ENOSPC else "lower '--workers'"
                raise DataError(f"workers cannot be started ({error.strerror}): {remedy}") from error
        if workers:
            _watch_workers()
        killed = None
        while killed is None:
            try:
                answer = next(answers[0])
            except StopIteration:
                return
            except RuntimeError as error:
                killed = _killed(error)
                if killed is None:
                    raise
                continue
            if isinstance(answer, AclipError):
                raise answer
            yield answer.open() if isinstance(answer, _Packed) else answer
        raise killed  # outside of the handler: the context would keep torch's iterator


def _watch_workers() -> None:
    """Turn what torch's SIGCHLD handler raises, at any point of the main thread, into one sentence.

    In other threads, where there is no handler, torch notices a dead worker within seconds.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return
    torch_handler = signal.getsignal(signal.SIGCHLD)
    if not callable(torch_handler) or hasattr(torch_handler, "wrapped"):
        return

    def handler(number: int, frame: Any) -> None:
        try:
            torch_handler(number, frame)
        except RuntimeError as error:
            raise _killed(error) or error from None

    handler.wrapped = torch_handler  # type: ignore[attr-defined]
    signal.signal(signal.SIGCHLD, handler)


def _killed(error: RuntimeError) -> DataError | None:
    """Return the sentence for a killed worker, or None if that is not what torch reports."""
    reason = str(error).partition("\n")[0]
    if "DataLoader worker" not in reason:
        return None
    if "Bus error" in reason:
        return DataError(f"a loader worker was killed: {_SMALL_SHM}")
    return DataError("a loader worker was killed, most often because memory ran out: lower '--workers' or give the "
                     f"machine more memory ({reason.strip().rstrip('.')})")


@contextlib.contextmanager
def _stopping() -> Iterator[Connection]:
    """Yield the end of a pipe that becomes readable when workers should stop, at the latest when this process exits."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def stop() -> None:
        sender.send_bytes(b"stop")  # never received, so that every worker sees it

    atexit.register(stop)  # runs before multiprocessing's own, which would wait for workers in the middle of a read
    try:
        yield receiver
    finally:
        atexit.unregister(stop)
        stop()


def _start_worker(stop: Connection, parent: int, _: int) -> None:
    """Set up a worker process."""
    torch.set_num_threads(1)
    sys.excepthook = _report
    # torchrun and Slurm signal the whole process group; the parent saves first and stops its workers itself
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    def exit_when_told() -> None:
        while not stop.poll(1.0):
            if os.getppid() != parent:
                os._exit(1)
        time.sleep(_GRACE)  # torch stops an idle worker meanwhile
        os._exit(0)

    threading.Thread(target=exit_when_told, daemon=True).start()


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception, unless the parent hung up: it reports why itself."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


class _Reader(Dataset[Any]):
    """Answers requests in a worker.

    An error that the user can cause is returned, not raised: torch would wrap its one sentence in the worker's
    traceback. An answer that does not fit into shared memory travels through a pipe: torch would lose it, and wait for
    it for ever.
    """

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self._read = read

    def __getitem__(self, request: Any) -> Any:
        try:
            answer = self._read(request)
        except AclipError as error:
            return error
        if get_worker_info() is None:
            return answer
        try:
            for tensor in _tensors(answer):
                tensor.share_memory_()
        except (RuntimeError, OSError):
            return _Packed(answer)
        return answer


class _Packed:
    """An answer as bytes, which needs no shared memory."""

    def __init__(self, answer: Any) -> None:
        self._content = pickle.dumps(answer, protocol=5)

    def open(self) -> Any:
        _warn_of_the_pipe()
        return pickle.loads(self._content)

    def pin_memory(self) -> Any:
        """Return the answer in page-locked memory (torch calls this by name)."""
        answer = self.open()
        return answer.pin_memory() if hasattr(answer, "pin_memory") else answer


@functools.cache
def _warn_of_the_pipe() -> None:
    _log.warning("batches travel through a pipe, which is slower: %s", _SMALL_SHM)


def empty_shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised CPU tensor, in a worker in shared memory, so that handing it over copies nothing."""
    if get_worker_info() is not None:
        size = math.prod(shape) * dtype.itemsize
        with contextlib.suppress(RuntimeError, OSError):  # no room: see `_Reader`
            return torch.empty(0, dtype=dtype).set_(torch.UntypedStorage._new_shared(size), 0, shape)  # type: ignore
    return torch.empty(shape, dtype=dtype)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in dataclasses, mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])


def _unchanged(answer: Any) -> Any:
    return answer
