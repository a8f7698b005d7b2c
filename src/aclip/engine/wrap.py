"""A method spread over processes: recomputed activations, then compiled blocks, then DDP or FSDP2. Only here."""

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
from aclip.engine.run_config import Parallel
from aclip.method import Method
from aclip.models.blocks import blocks_of, call_as_modules, stacks_of
from aclip.models.text import stack_of_open_clip
from aclip.structs import StepOutput

BUCKET_BYTES = 64 * 2**20
"""Gradients are averaged in runs of this size where they are averaged after the backward pass."""


MOST_VARIANTS = 64
"""Of the compiled block; a recipe has about ten, where torch gives up after eight."""


@dataclass(frozen=True)
class Wrapped:
    """A method in place on every process.

    Attributes:
        method: the method itself; its parameters are `DTensor`s where they are sharded.
        step: its forward pass, after whose backward pass every rank holds the gradients averaged over ranks.
        average_gradients: to be called after a backward pass that began elsewhere (`accumulation`).
        shown: what rank 0 may look at and save alone: the method, or a whole copy of one that is sharded.
        refresh: to be called by all ranks before `shown` is used.
    """

    method: Method
    step: Callable[..., StepOutput]
    average_gradients: Callable[[], None]
    shown: Method
    refresh: Callable[[], None]


def wrap(
    method: Method, device: torch.device, *, parallel: Parallel = "ddp", recompute: bool = False,
    compile_blocks: bool = False, in_parts: bool = False,
) -> Wrapped:
    """Prepare a method for training on this process, one of `dist.world_size()`.

    Every rank averages gradients over ranks, and each objective returns the mean over this rank's samples with the
    whole batch in its denominators, so that N processes equal one with the whole batch.

    Args:
        method: on its device, the same weights on every rank.
        device: its device.
        parallel: "ddp" holds everything on every rank; "fsdp" shards parameters, gradients, EMA and optimizer state
            over the ranks, transformer block by transformer block. Without other ranks both are the bare method.
        recompute: keep only the blocks' inputs for the backward pass, and run the blocks again in it.
        compile_blocks: compile the transformer blocks.
        in_parts: every step will be taken by `accumulate`, so that DDP need hold no second copy of the gradients.
    """
    copy_of_all = parallel == "fsdp" and dist.world_size() > 1 and dist.rank() == 0
    shown = copy.deepcopy(method) if copy_of_all else method
    foreign = stack_of_open_clip(method.model)
    for transformer in stacks_of(method):
        transformer.grad_checkpointing = recompute
        if (compile_blocks or parallel == "fsdp") and transformer is not foreign:
            call_as_modules(transformer)
        if compile_blocks:
            # all blocks share one function, of which there is a variant for each tower, mode and kind of last block
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
            for block in blocks_of(transformer):
                block.compile(dynamic=True)
    if dist.world_size() == 1:
        return Wrapped(method, method, _nothing, method, _nothing)
    for tensor in [*method.parameters(), *method.buffers()]:  # the same on all ranks from here on
        torch_dist.broadcast(tensor.data, src=0)
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(method)
    if parallel == "fsdp":
        _shard(method, device, in_parts)
        return Wrapped(method, method, _nothing, shown, lambda: _fill(shown, whole_state(method)))
    trained = [p for p in method.parameters() if p.requires_grad]
    replicas = method if in_parts else _replicas(method, device)
    return Wrapped(method, replicas, lambda: average_gradients(trained), method, _nothing)


def whole_state(method: Method) -> dict[str, Tensor]:
    """Return the method's state with every tensor whole; all ranks must call it where it is sharded."""
    return {name: whole(tensor) for name, tensor in method.state_dict().items()}


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all ranks, who must all ask where it is sharded."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


def _replicas(method: Method, device: torch.device) -> nn.Module:
    """Every rank holds everything; gradients are averaged while the backward pass goes on."""
    # buffers are equal on all ranks: batch statistics are those of the whole batch
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.13
    options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True, "init_sync": False}
    return DistributedDataParallel(method, device_ids=[device] if device.type == "cuda" else None, **options)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace gradients by their mean over ranks, in runs of `BUCKET_BYTES`."""
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
    """Leave a part of everything on every rank; blocks are gathered when they are needed."""
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    # FSDP2 cannot shard scalars (logit_scale): they stay whole, and their gradients are averaged as they come
    scalars = {p for p in method.parameters() if p.ndim == 0}
    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average)
    for transformer in stacks_of(method):
        for block in blocks_of(transformer):
            fully_shard(block, mesh=mesh)
    fully_shard(method, mesh=mesh, ignored_params=scalars, reshard_after_forward=False)
    # what comes out of the method are views of each other, and nobody writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # each would gather what is no block's, and give it back, once more: only where the step does begin in them
    for name in ("encode_batch", "judge") if in_parts else ():
        register_fsdp_forward_method(method, name)


def _fill(shown: Method, state: dict[str, Tensor]) -> None:
    """Give rank 0's whole copy the weights of a sharded method."""
    if dist.rank() == 0:
        shown.load_state_dict(state)


def _nothing() -> None:
    """Where there is nothing to do."""


def _average(parameter: Tensor) -> None:
    """Average a gradient over ranks; what was averaged before and has grown since is averaged rightly, too."""
    assert parameter.grad is not None
    torch_dist.all_reduce(parameter.grad)
    parameter.grad /= dist.world_size()
