"""A method over processes: activation checkpointing, then compiled blocks, then DDP or FSDP2; wrapped only here."""

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from aclip import dist
from aclip.config import Parallel
from aclip.method import Method
from aclip.models.blocks import blocks_of, call_as_modules, stacks_of
from aclip.models.text import stack_of_open_clip
from aclip.structs import StepOutput

BUCKET_BYTES = 64 * 2**20
"""Size of the flat buffers in which gradients are averaged after the backward pass."""

MAX_VARIANTS = 64
"""Of the compiled block; a recipe needs about ten, torch's default limit is eight."""


@dataclass(frozen=True)
class Wrapped:
    """A method wrapped for training on every process.

    Attributes:
        method: the method itself; its parameters are `DTensor`s if sharded.
        step: its forward pass; after its backward pass every rank holds the gradients averaged over ranks.
        average_gradients: call it after a backward pass that began elsewhere (`accumulation`).
        whole: the method with whole parameters, which rank 0 may use and save alone.
        refresh: all ranks call it before `whole` is used.
    """

    method: Method
    step: Callable[..., StepOutput]
    average_gradients: Callable[[], None]
    whole: Method
    refresh: Callable[[], None]


def wrap(
    method: Method, device: torch.device, *, parallel: Parallel = "ddp", recompute: bool = False,
    compile_blocks: bool = False, in_parts: bool = False,
) -> Wrapped:
    """Prepare a method for training on this process, one of `dist.world_size()`.

    Every rank averages gradients over ranks, and each objective returns the mean over this rank's samples with the
    whole batch in its denominators, so that N processes equal one with the whole batch.

    Args:
        method: on `device`, the same weights on every rank.
        parallel: "ddp" holds everything on every rank; "fsdp" shards parameters, gradients, EMA and optimizer state
            over the ranks, block by block. On one process both are the bare method.
        recompute: activation checkpointing: keep only the blocks' inputs, and run the blocks again for the backward.
        compile_blocks: compile the transformer blocks.
        in_parts: every step is taken by `accumulate`, so that DDP's own buffers are not needed.
    """
    needs_copy = parallel == "fsdp" and dist.world_size() > 1 and dist.rank() == 0
    whole_method = copy.deepcopy(method) if needs_copy else method
    foreign = [stack_of_open_clip(model) for model in (method.model, method.frozen) if model is not None]
    for transformer in stacks_of(method):
        transformer.grad_checkpointing = recompute
        if (compile_blocks or parallel == "fsdp") and not any(transformer is stack for stack in foreign):
            call_as_modules(transformer)
        if compile_blocks:
            # all blocks share one function, of which there is a variant for each tower, mode and kind of last block
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
            for block in blocks_of(transformer):
                block.compile(dynamic=True)
    if dist.world_size() == 1:
        return Wrapped(method, method, _nothing, method, _nothing)
    for tensor in [*method.parameters(), *method.buffers()]:  # the same on all ranks from here on
        torch_dist.broadcast(tensor.data, src=0)
    if parallel == "fsdp":
        _shard(method, device, in_parts)
        return Wrapped(method, method, _nothing, whole_method, lambda: _fill(whole_method, whole_state(method)))
    trained = [p for p in method.parameters() if p.requires_grad]
    replicas = method if in_parts else _replicas(method)
    return Wrapped(method, replicas, lambda: average_gradients(trained), method, _nothing)


def whole_state(method: Method) -> dict[str, Tensor]:
    """Return the method's state dict with whole tensors; all ranks must call it if it is sharded."""
    return {name: whole(tensor) for name, tensor in method.state_dict().items()}


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor; all ranks must call it if it is sharded."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


def _replicas(method: Method) -> nn.Module:
    # buffers are equal on all ranks: batch statistics are those of the whole batch
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.13
    options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True, "init_sync": False}
    return DistributedDataParallel(method, **options)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace gradients by their mean over ranks, in flat buffers of `BUCKET_BYTES`."""
    bucket: list[Tensor] = []
    size = 0
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None:
            bucket.append(parameter.grad)
            size += parameter.grad.nbytes
        if bucket and (size >= BUCKET_BYTES or index == len(parameters) - 1):
            flat = torch.cat([grad.flatten() for grad in bucket])
            torch_dist.all_reduce(flat)
            flat /= dist.world_size()
            means = flat.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [mean.view_as(grad) for mean, grad in zip(means, bucket, strict=True)])
            bucket, size = [], 0


def _shard(method: Method, device: torch.device, in_parts: bool) -> None:
    """Shard everything over the ranks; blocks are gathered when needed."""
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    # FSDP2 cannot shard scalars (logit_scale): they stay replicated, and a hook averages their gradients
    scalars = {p for p in method.parameters() if p.ndim == 0}
    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average)
    for transformer in stacks_of(method):
        for block in blocks_of(transformer):
            fully_shard(block, mesh=mesh)
    fully_shard(method, mesh=mesh, ignored_params=scalars, reshard_after_forward=False)
    # the outputs are views of each other, and nothing writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # each gathers and frees the root's parameters: register them only if a step enters there
    for name in ("encode_batch", "compute_loss") if in_parts else ():
        register_fsdp_forward_method(method, name)


def _fill(target: Method, state: dict[str, Tensor]) -> None:
    if dist.rank() == 0:
        target.load_state_dict(state)


def _nothing() -> None:
    pass


def _average(parameter: Tensor) -> None:
    """Average a gradient over ranks; averaging again after more was added is exact, too."""
    assert parameter.grad is not None
    torch_dist.all_reduce(parameter.grad)
    parameter.grad /= dist.world_size()
