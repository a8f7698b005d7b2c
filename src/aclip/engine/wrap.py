"""A method spread over processes: recomputed activations, then compiled blocks, then DDP or FSDP2. Only here."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
from open_clip.transformer import Transformer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from aclip import dist
from aclip.method import Method
from aclip.structs import StepOutput
from aclip.towers.blocks import call_as_modules

Parallel = Literal["ddp", "fsdp"]

BUCKET_BYTES = 64 * 2**20
"""Gradients are averaged in runs of this size where they are averaged after the backward pass."""


@dataclass(frozen=True)
class Wrapped:
    """A method in place on every process.

    Attributes:
        method: the method itself; its parameters are `DTensor`s where they are sharded.
        step: its forward pass, after whose backward pass every rank holds the gradients averaged over ranks.
        average_gradients: to be called after a backward pass that began elsewhere (`accumulation`).
    """

    method: Method
    step: Callable[..., StepOutput]
    average_gradients: Callable[[], None]


def wrap(
    method: Method, device: torch.device, *, parallel: Parallel = "ddp", recompute: bool = False,
    compile_blocks: bool = False,
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
    """
    for transformer in transformers_of(method):
        transformer.grad_checkpointing = recompute
        if compile_blocks or parallel == "fsdp":
            call_as_modules(transformer)
        if compile_blocks:
            for block in transformer.resblocks:
                block.compile(dynamic=True)
    if dist.world_size() == 1:
        return Wrapped(method, method, lambda: None)
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(method)
    return _sharded(method, device) if parallel == "fsdp" else _replicated(method, device)


def transformers_of(method: Method) -> Iterator[Transformer]:
    """Yield open_clip's stacks of blocks in towers, EMA and decoders."""
    return (module for module in method.modules() if isinstance(module, Transformer))


def whole_state(method: Method) -> dict[str, Tensor]:
    """Return the method's state with every tensor whole; all ranks must call it where it is sharded."""
    return {name: whole(tensor) for name, tensor in method.state_dict().items()}


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all ranks, who must all ask where it is sharded."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor into `target`; a sharded target takes its own part, without communication."""
    if not isinstance(target, DTensor):
        target.copy_(value)
    elif isinstance(value, DTensor):
        target.to_local().copy_(value.to_local())
    else:
        own = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(own.to_local())


def _replicated(method: Method, device: torch.device) -> Wrapped:
    """Every rank holds everything; gradients are averaged while the backward pass goes on."""
    on_device = [device] if device.type == "cuda" else None
    # buffers are equal on all ranks already: batch statistics are those of the whole batch
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.13
    options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
    replicas = DistributedDataParallel(method, device_ids=on_device, **options)
    trained = [p for p in method.parameters() if p.requires_grad]
    return Wrapped(method, replicas, lambda: average_gradients(trained))


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


def _sharded(method: Method, device: torch.device) -> Wrapped:
    """Every rank holds a part of everything; blocks are gathered when they are needed."""
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    for parameter in method.parameters():  # blocks of one tower are equal on all ranks from here on, as under DDP
        torch_dist.broadcast(parameter.data, src=0)
    # FSDP2 cannot shard scalars (logit_scale): they stay whole, and their gradients are averaged as they come
    scalars = {p for p in method.parameters() if p.ndim == 0}
    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average)
    for transformer in transformers_of(method):
        for block in transformer.resblocks:
            fully_shard(block, mesh=mesh)
    fully_shard(method, mesh=mesh, ignored_params=scalars)
    # what comes out of the method are views of each other, and nobody writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for name in ("encode_batch", "judge"):
        register_fsdp_forward_method(method, name)
    return Wrapped(method, method, lambda: None)


def _average(parameter: Tensor) -> None:
    """Average a gradient over ranks; what was averaged before and has grown since is averaged rightly, too."""
    assert parameter.grad is not None
    torch_dist.all_reduce(parameter.grad)
    parameter.grad /= dist.world_size()


def own_part(tensor: Any) -> Tensor:
    """Return what this rank holds of a tensor."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part
