"""How much memory a run will need, and has needed."""

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch

from aclip import dist
from aclip.engine.run_config import RunConfig
from aclip.errors import OutOfMemoryError
from aclip.method import Method
from aclip.objectives import Objective
from aclip.objectives.functional import LOGITS_AT_ONCE
from aclip.run_folder import RunFolder

SHARE_TO_FILL = 0.8
"""Of the memory that is free, what a step may be estimated to take: the allocator and the libraries want some, too."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that one process needs in a step.

    Attributes:
        weights: of model and heads. average: of what has a moving average.
        gradients, optimizer: of what is trained.
        activations: held for the backward pass of a micro-batch.
        batch: pixels, and what is gathered and contrasted of the whole batch, logits over codewords and words among it.
    """

    weights: int
    average: int
    gradients: int
    optimizer: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(int(getattr(self, part.name)) for part in fields(self))

    @property
    def beside_model(self) -> int:
        """What is not there yet when the model is."""
        return self.total - self.weights - self.average

    def __str__(self) -> str:
        """Say it in one line."""
        parts = ", ".join(f"{part.name} {in_units(getattr(self, part.name))}" for part in fields(self))
        return f"about {in_units(self.total)} a process: {parts}"


def estimate(method: Method, config: RunConfig, micro_batch: int) -> Estimate:
    """Estimate the memory of a step, of a method that is not sharded yet.

    A block of width C and MLP width M on L tokens keeps, for its backward pass, 2 C numbers a token in fp32 (the two
    inputs of norms) and 6 C + 2 M in the precision of the matrix products (normed twice, q, k, v, what attention and
    the two layers of the MLP give); the last one, where its first token alone is read, C and 3 C. Recomputed, it keeps
    its input alone, and one block at a time the rest. Heads, decoders, averages' passes and what the allocator cannot
    use are left out.

    Args:
        method: what is trained. Of a sharded one a process holds a share, and one block of it whole.
        config: settled.
        micro_batch: pairs whose activations are held at a time.
    """
    shape, ranks = method.plan.shape, dist.world_size()
    share = ranks if config.parallel == "fsdp" else 1
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    average = sum(p.numel() for p in method.ema_visual.parameters()) if method.ema_visual is not None else 0
    weights = sum(p.numel() for p in method.parameters()) - average
    number = 4 if config.precision == "fp32" else 2

    def tower(tokens: float, layers: int, width: int, mlp_width: int, pooled: bool) -> float:
        block = tokens * (2 * width * 4 + (6 * width + 2 * mlp_width) * number)
        blocks.append(block)
        if config.recompute:
            return layers * tokens * width * 4
        return (layers - 1) * block + (tokens * (width * 4 + 3 * width * number) if pooled else block)

    trains_image = any(p.requires_grad for name, p in method.model.named_parameters() if "visual." in name)
    a_pair, blocks = 0.0, [0.0]
    for p in method.plan.passes:
        if p.learns and trains_image:
            a_pair += len(p.spec.views) * tower(p.num_tokens, shape.layers, shape.width, shape.mlp_width,
                                                   pooled=not p.gives_patches)
    for text in method.plan.texts:
        if text.encoded:
            tokens = text.length(None) or shape.context_length
            a_pair += tower(tokens, shape.text_layers, shape.text_width, shape.text_mlp_width,
                            pooled=text.spec.mask_ratio == 0)
    if config.recompute:
        a_pair += max(blocks)
    pixels = sum(3 * height * width for height, width in method.plan.view_sizes.values())
    local = (config.batch_size or 0) // ranks
    logits = min(local * local * ranks, LOGITS_AT_ONCE)
    for config_of, objective in zip(method.plan.recipe.objectives, method.objectives.values(), strict=True):
        made = cast(Objective, objective).logits(local, method.plan.images_of(config_of), shape.context_length)
        logits += min(made, LOGITS_AT_ONCE)
    batch = local * pixels + micro_batch * pixels * 4 * 2 + 4 * logits * 4 + 2 * ranks * local * shape.joint_dim * 4
    return Estimate(weights * 4 // share, average * 4 // share, trained * 4 // share, trained * 8 // share,
                    round(micro_batch * a_pair), batch)


def fitting_micro_batch(method: Method, config: RunConfig, available: int) -> int:
    """Return the largest part of this process's share of a batch that is estimated to fit: all, 1/2, 1/4, ...

    All ranks get the smallest of them. Where even one pair does not fit it is one pair.
    """
    micro_batch = (config.batch_size or 0) // dist.world_size()
    while micro_batch > 1 and estimate(method, config, micro_batch).total > SHARE_TO_FILL * available:
        micro_batch = -(-micro_batch // 2)
    smallest: int = min(dist.collect(micro_batch))
    return smallest


def available_memory(device: torch.device) -> int:
    """Return the bytes that a process may still take: free on its GPU, or its share of what is free on its machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    listed = Path("/proc/meminfo")
    if listed.exists():
        free = 1024 * next(int(line.split()[1]) for line in listed.read_text().splitlines()
                           if line.startswith("MemAvailable"))
    return free // dist.processes_here()


def shortage(expected: Estimate, available: int) -> str:
    """Return in words that a step is not expected to fit beside the model, which is there already, or nothing.

    What counts is the rank with the least; all must call it.
    """
    free = min(dist.collect(available))
    if expected.beside_model <= free:
        return ""
    return (f"a step is estimated to take {in_units(expected.beside_model)} of memory beside the model, and "
            f"{in_units(free)} are free")


@contextmanager
def telling_of_shortage(expected: Estimate, config: RunConfig) -> Iterator[None]:
    """Within this context, where a step is taken, say in a sentence that memory has run out.

    Raises:
        OutOfMemoryError: it has.
    """
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise OutOfMemoryError(f"a training step does not fit into the memory, estimated at {expected}: use "
                               f"{remedies(config)}") from error


def ran_out(error: RuntimeError) -> bool:
    """Return whether torch got no memory: CUDA's error is a class of its own, those of others have but their words."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(some in str(error) for some in words)


def remedies(config: RunConfig) -> str:
    """Return the options that make a step of this run smaller, in words."""
    parts = "--micro-batch auto" if config.micro_batch is None else "a smaller --micro-batch"
    return f"{parts}{'' if config.recompute else ', --recompute'} or a smaller --batch-size"


def in_units(number: int) -> str:
    """Return bytes in GiB, or MiB where they are few."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


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
