"""Memory that a run has used, and what helps when a step does not fit."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from aclip.config import RunConfig
from aclip.errors import OutOfMemoryError
from aclip.run_folder import RunFolder


@contextmanager
def explain_oom(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Turn running out of memory in a step into one sentence: what was held, and what helps.

    Raises:
        OutOfMemoryError: torch could not get memory.
    """
    try:
        yield
    except RuntimeError as error:
        words = ("out of memory", "can't allocate memory")  # on the CPU it has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and not any(word in str(error) for word in words):
            raise
        part = config.micro_batch or config.batch_size
        smaller = f"--micro-batch {max(1, (part or 2) // 2)}"
        helps = ", ".join([smaller, *([] if config.recompute else ["--recompute"])])
        raise OutOfMemoryError(
            f"out of memory in a step of {config.batch_size} pairs, {part} at a time, on {device}, where the most held "
            f"was {in_units(peak_memory(device))}: use {helps} (the step stays the same), or a smaller --batch-size"
        ) from error


def in_units(number: int) -> str:
    """Return bytes in GiB, or MiB if few."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def peak_memory(device: torch.device) -> int:
    """Return bytes: on CUDA the peak allocated on the device, else the peak resident size of this process.

    Loader processes are not counted.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_peak_memory(folder: RunFolder, device: torch.device) -> None:
    """Write `memory.json`: `peak_memory` in bytes, the most over all processes that have worked on the run."""
    path = folder.path / "memory.json"
    try:
        before = int(json.loads(path.read_text(encoding="utf-8"))["peak_memory"])
    except (OSError, ValueError, KeyError, TypeError):  # the first process, or a torn file of a killed one
        before = 0
    folder.write_json(path.name, {"peak_memory": max(before, peak_memory(device)), "device": device.type})
