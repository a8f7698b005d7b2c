"""Several processes as one: joining under torchrun, and collectives that are the identity on one process."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from jaxtyping import Shaped
from torch import Tensor

from aclip.errors import RANK_0_REPORTS_FIRST, AclipError, ConfigError

TIMEOUT = timedelta(hours=12)
"""How long a rank waits for the others; while rank 0 evaluates, they wait."""
JOIN_TIMEOUT = timedelta(minutes=30)


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the process group of torchrun, and yield the name of this rank's device; alone, do nothing.

    Collectives use NCCL between GPUs and gloo between CPUs, both in one group. Inside an existing group, nothing is
    joined again. An error raised on every rank is reported once, and an error on a single rank with its rank.

    Args:
        device: what the user asked for: auto, cpu, cuda, ...

    Raises:
        ConfigError: more processes than GPUs on this machine, or Slurm tasks without torchrun.
    """
    environment = os.environ
    ranks = int(environment.get("WORLD_SIZE", "1"))
    if world_size() > 1 or ranks == 1 or "RANK" not in environment:
        tasks = int(environment.get("SLURM_NTASKS", "1"))
        if tasks > 1 and "SLURM_STEP_ID" in environment and "RANK" not in environment:
            raise ConfigError(f"srun started {tasks} tasks that do not know of each other: start one torchrun a "
                              "machine, as in `srun --ntasks-per-node 1 torchrun ... -m aclip train`")
        yield device
        return
    gpus = device in ("auto", "cuda") and torch.cuda.is_available()
    if gpus:
        local, count = int(environment.get("LOCAL_RANK", environment["RANK"])), torch.cuda.device_count()
        if local >= count > 1:
            raise ConfigError(f"process {local} of this machine has no GPU: {count} exist; start one process a GPU, "
                              "or use --device cpu")
        local = local if local < count else 0  # each process was given a GPU of its own to see
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    torch_dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=_fresh_store(ranks),
                                  rank=int(environment["RANK"]), world_size=ranks, timeout=TIMEOUT)
    try:
        yield device
    except AclipError as error:
        if rank() == 0:
            raise
        time.sleep(RANK_0_REPORTS_FIRST)
        own = type(error)(f"rank {rank()}: {error}")
        own.reported = True
        raise own from error
    finally:
        torch_dist.destroy_process_group()


def _fresh_store(ranks: int) -> Any:
    """Return a store without keys of earlier attempts.

    torchrun keeps one store over its restarts (torch 2.14), so that a restarted process may find the address of one
    that is gone. Hence the processes first agree on a prefix: each sends rank 0 a random word, rank 0 answers to the
    word with the prefix, and all go on when everybody has it.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, own, _ = next(rendezvous("env://", int(os.environ["RANK"]), ranks, timeout=JOIN_TIMEOUT))
    word = os.urandom(8).hex()
    if own > 0:
        store.set(f"aclip/call/{own}", word)
        prefix = store.get(f"aclip/answer/{word}").decode()
        store.set(f"aclip/heard/{prefix}/{own}", "")
        return PrefixStore(prefix, store)
    waiting, until = set(range(1, ranks)), time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"aclip/heard/{word}/{other}"]):
                waiting.remove(other)
            elif store.check([f"aclip/call/{other}"]):  # again and again: the first may be of a process that is gone
                store.set("aclip/answer/" + store.get(f"aclip/call/{other}").decode(), word)
        if time.monotonic() > until:
            raise ConfigError(f"timed out waiting for ranks: {ranks - len(waiting)} of {ranks} joined")
        time.sleep(0.02)
    return PrefixStore(word, store)


def processes_here() -> int:
    """Return how many processes of the run share this machine's cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def world_size() -> int:
    """Return the number of processes."""
    return torch_dist.get_world_size() if torch_dist.is_available() and torch_dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, 0-based."""
    return torch_dist.get_rank() if torch_dist.is_available() and torch_dist.is_initialized() else 0


def gather(x: Shaped[Tensor, "B *rest"]) -> Shaped[Tensor, "WB *rest"]:
    """Concatenate `x` of all ranks in rank order; gradients flow back to every rank's own rows.

    The backward pass sums over ranks what each computed for these rows, so that with gradients averaged
    over ranks the result is that of one process with the whole batch. Integers (caption ids) pass through
    without a gradient. Every rank must pass the same number of rows.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


def sum_over_ranks(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the sum of `x` over all ranks, the same on each of them, without a gradient.

    For statistics of the whole batch, such as counts and means. Every rank must pass the same shape.
    """
    total = x.detach()
    if world_size() > 1:
        total = total.clone()
        torch_dist.all_reduce(total)
    return total


def collect(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order, on all ranks; for small objects that are not tensors.

    They are pickled between the processes of one run; nothing of this comes from a file.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    collect(None)


class Flag:
    """A flag that any rank can raise for all, without making the step wait.

    On several ranks `any_raised` answers for the call before: the exchange of this one goes on beside the next step, on
    the CPU, so that neither the device nor the other ranks are waited for. On one process it answers at once. Every
    rank must call it equally often.
    """

    def __init__(self) -> None:
        self._flag = torch.zeros((), dtype=torch.int32)
        self._pending: Any = None

    def any_raised(self, raised: bool) -> bool:
        """Send this rank's flag; return whether any rank had raised it."""
        if world_size() == 1:
            return raised
        before = False
        if self._pending is not None:
            self._pending.wait()
            before = bool(self._flag)
        self._flag = torch.tensor(int(raised), dtype=torch.int32)
        self._pending = torch_dist.all_reduce(self._flag, torch_dist.ReduceOp.MAX, async_op=True)
        return before


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = x.new_empty((world_size() * len(x), *x.shape[1:]))
        _named("all_gather_single", "all_gather_into_tensor")(rows, x.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        own = grad.new_empty((len(grad) // world_size(), *grad.shape[1:]))
        _named("reduce_scatter_single", "reduce_scatter_tensor")(own, grad)
        return own


def _named(name: str, before: str) -> Callable[[Tensor, Tensor], Any]:
    """Return a collective by its name since torch 2.14, where the former name warns."""
    found: Callable[[Tensor, Tensor], Any] = getattr(torch_dist, name, None) or getattr(torch_dist, before)
    return found
