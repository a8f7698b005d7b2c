"""Joining the other processes of a run, under torchrun or Slurm."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from aclip.errors import AclipError, ConfigError

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others; while one of them evaluates, they wait."""
RANK_0_SPEAKS = 5.0
"""Seconds in which rank 0 may say what all have met, and the launcher end the others."""


@dataclass(frozen=True)
class Place:
    """Which process this is.

    Attributes:
        rank, world_size: its number and how many there are.
        local_rank: its number on its machine, which is that of its GPU.
        master: address and port where the processes meet; None where the environment names them (torchrun).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master: tuple[str, int] | None = None


def find_place(environment: Mapping[str, str]) -> Place:
    """Read from the environment which process this is: torchrun's variables, else Slurm's, else it is alone.

    Raises:
        ConfigError: variables that contradict each other.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Place(_number(environment, "RANK"), _number(environment, "WORLD_SIZE"),
                     _number(environment, "LOCAL_RANK", environment["RANK"]))
    tasks = _number(environment, "SLURM_NTASKS", "1")
    # an interactive allocation has SLURM_NTASKS and no step: only srun starts the tasks
    if tasks > 1 and "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        first = environment.get("MASTER_ADDR") or _first_host(environment)
        port = _number(environment, "MASTER_PORT", str(20000 + _number(environment, "SLURM_JOB_ID", "0") % 20000))
        return Place(_number(environment, "SLURM_PROCID"), tasks, _number(environment, "SLURM_LOCALID", "0"),
                     (first, port))
    return Place()


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the other processes for as long as the context lasts; yield the device of this one.

    Communication is NCCL between GPUs and gloo between CPUs, both in one group.

    Args:
        device: what the user asked for, "auto", "cuda", "cpu".

    Raises:
        ConfigError: more processes than GPUs on this machine.
    """
    place = find_place(os.environ)
    if place.world_size == 1:
        yield device
        return
    gpus = device in ("auto", "cuda") and torch.cuda.is_available()
    if gpus:
        if place.local_rank >= torch.cuda.device_count():
            raise ConfigError(f"process {place.local_rank} of this machine has no GPU: it has "
                              f"{torch.cuda.device_count()}; start one process a GPU, or use --device cpu")
        torch.cuda.set_device(place.local_rank)
    if place.master is not None:
        os.environ |= {"MASTER_ADDR": place.master[0], "MASTER_PORT": str(place.master[1])}
    torch_dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=fresh_store(place), rank=place.rank,
                                  world_size=place.world_size, timeout=PATIENCE)
    try:
        with speaking_in_turn():
            yield f"cuda:{place.local_rank}" if gpus else device
    finally:
        torch_dist.destroy_process_group()


@contextmanager
def speaking_in_turn() -> Iterator[None]:
    """Let an error that all processes meet in this context be told once, and one that a process meets alone, too.

    Those after rank 0 wait before theirs goes on. Where rank 0 has met it as well, the launcher ends them meanwhile;
    else the others, still joined, wait for them, and the error goes on with the rank in front.
    """
    try:
        yield
    except AclipError as error:
        rank = find_place(os.environ).rank
        if rank == 0:
            raise
        time.sleep(RANK_0_SPEAKS)
        raise type(error)(f"rank {rank}: {error}") from error


def fresh_store(place: Place) -> Store:
    """Return a store in which nothing is left of processes that met there before.

    torchrun keeps one store over its restarts (torch 2.14): a process that starts anew may find the address of one that
    is gone, and be refused, or wait for it. So the processes of one start first agree on a name that none had before:
    each calls rank 0 with a random word, rank 0 answers to the word, and goes on when all have heard it.
    """
    store, rank, ranks = next(rendezvous("env://", place.rank, place.world_size, timeout=PATIENCE))
    word = os.urandom(8).hex()
    if rank > 0:
        store.set(f"aclip/call/{rank}", word)
        name = store.get(f"aclip/answer/{word}").decode()
        store.set(f"aclip/heard/{name}/{rank}", "")
        return PrefixStore(name, store)
    answered: dict[int, str] = {}
    waiting, until = set(range(1, ranks)), time.monotonic() + PATIENCE.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"aclip/heard/{word}/{other}"]):
                waiting.remove(other)
            elif store.check([f"aclip/call/{other}"]):
                call = store.get(f"aclip/call/{other}").decode()
                if answered.get(other) != call:  # the first one may be of a process that is gone
                    answered[other] = call
                    store.set(f"aclip/answer/{call}", word)
        if time.monotonic() > until:
            raise ConfigError(f"only {ranks - len(waiting)} of {ranks} processes have come")
        time.sleep(0.02)
    return PrefixStore(word, store)


def _first_host(environment: Mapping[str, str]) -> str:
    """Return the host of Slurm's first task."""
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if not any(mark in listed for mark in "[,"):
        return listed or "localhost"
    try:
        hosts = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"cannot find the first host of Slurm's list '{listed}': set MASTER_ADDR") from error
    return hosts.stdout.split()[0]


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    try:
        return int(text or "")
    except ValueError as error:
        raise ConfigError(f"the environment variable {name} is '{text}', not a number") from error
