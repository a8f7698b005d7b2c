"""How much memory a run has needed."""

import json
import resource
import sys

import torch

from aclip.engine.run_folder import RunFolder


def peak_memory(device: torch.device) -> int:
    """Return bytes: on CUDA the most that tensors have taken on the device, else the most of this process in RAM.

    Loader processes have their own memory and are not counted.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def note_peak_memory(folder: RunFolder, device: torch.device) -> None:
    """Write `memory.json`: `peak_memory` in bytes, the most over all processes that have worked on the run."""
    path = folder.path / "memory.json"
    try:
        before = int(json.loads(path.read_text())["peak_memory"])
    except (OSError, ValueError, KeyError, TypeError):  # the first process, or a torn file of a killed one
        before = 0
    folder.write_json(path.name, {"peak_memory": max(before, peak_memory(device)), "device": device.type})
