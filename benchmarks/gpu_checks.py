"""Stages of `gpu.py` that check: a device against the CPU, synchronisations, two processes against one."""

import copy
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from re import search
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.profiler import ProfilerActivity

from aclip import dist, models, plan
from aclip.bench import synthetic_batch
from aclip.config import Parallel, Recipe
from aclip.devices import synchronize
from aclip.method import Method
from aclip.recipes import RECIPES, configure
from aclip.structs import Batch, EncodedBatch
from aclip.trainer import Trainer, build_trainer
from aclip.training.distributed import whole
from competitors import Ours, Settings, Stopwatch
from gpu import Bench
from gpu_speed import TEXT_TOKENS, add_parts
from step import Row, take_turns

LOSS_ERROR, GRADIENT_ERROR = 1e-4, 1e-2
"""Largest relative differences that count as equal in fp32: BatchNorm heads amplify rounding."""
TRIED = 6  # steps in bf16 and fp16, of which the scaler may skip the first
STEPS = 1000  # of the schedule that the steps taken here are the first of
KINDS = {
    "attention": r"flash|fmha|attention|sdpa", "matrix products": r"gemm|cutlass|nvjet|cublas|::mm|addmm|bmm|mkldnn",
    "layer norm": r"layer_?norm|LayerNorm", "softmax": r"softmax|SoftMax",
    "optimizer and EMA": r"multi_tensor|_fused_adam|_foreach",
    "copies": r"[Mm]emcpy|copy_|CatArray", "fill": r"[Mm]emset|[Ff]ill|zero_", "other": "",
}
"""Kinds of kernels by a pattern of their names; the first that matches."""
SYNCHRONISATIONS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize",
                    "aten::_local_scalar_dense", "aten::nonzero")


def check(bench: Bench) -> None:
    """Compare every recipe on the device with the CPU in fp32, and take steps in bf16 and in fp16 with a scaler."""
    device = torch.device(bench.device)
    for name in bench.sizes.check_recipes or RECIPES:
        if bench.left() < 0:
            bench.results.add("left out", stage="check", what=f"{name} and what follows", why="time")
            break
        row = compare(bench, RECIPES[name], device)
        for precision in ("bf16", "fp16"):
            row |= few_steps(bench, RECIPES[name], device, precision)
        bench.results.add("recipes on the device", recipe=name, **row)


def coloured(batch: Batch) -> Batch:
    """Return the batch with a colour of its own for every sample: features of plain noise barely differ, and a
    BatchNorm divides by their difference."""
    colours = torch.rand(batch.size, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return replace(batch, views={name: replace(view, pixels=(view.pixels * colours).to(torch.uint8))
                                 for name, view in batch.views.items()})


def compare(bench: Bench, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Return how far loss, gradients, scores and masks are from those of the CPU.

    Loss and gradients are those of the masks that the CPU chose: a score that is rounded otherwise may choose another
    patch, which "masks" counts, the fraction of equal ones.
    """
    torch.manual_seed(0)
    resolved = plan.resolve(recipe, models.shape_of(models.model_config(bench.sizes.check_model)))
    here = Method(models.create_model(bench.sizes.check_model, with_text=resolved.uses_text), resolved, (0.5,) * 3,
                  (0.25,) * 3).train()
    if here.frequencies is not None:
        here.frequencies.fill_(1.0 / resolved.shape.vocab_size)
    there = copy.deepcopy(here).to(device)
    batch = coloured(synthetic_batch(resolved, bench.sizes.check_batch))
    ours = batch.to(device)
    expected = here.encode_batch(batch)
    with torch.no_grad():
        found = there.encode_batch(ours)
    passes = [(one, found.passes[name]) for name, one in expected.passes.items()]
    masks = [(a.keep_indices == b.keep_indices.cpu()).float().mean().item() for a, b in passes
             if a.keep_indices is not None and b.keep_indices is not None]
    scores = [relative(b.scores.cpu(), a.scores) for a, b in passes if a.scores is not None and b.scores is not None]
    earlier = EncodedBatch({}, {name: on(one, device) for name, one in expected.passes.items()})
    loss = here.compute_loss(expected, batch.caption_ids).loss
    loss_there = there.compute_loss(there.encode_batch(ours, earlier=earlier), ours.caption_ids).loss
    loss.backward()
    loss_there.backward()
    pairs = [(p.grad, q.grad.cpu()) for p, q in zip(here.parameters(), there.parameters(), strict=True)
             if p.grad is not None and q.grad is not None]
    error = abs(loss_there.item() - loss.item()) / abs(loss.item())
    gradient = relative(torch.cat([q.flatten() for _, q in pairs]), torch.cat([p.flatten() for p, _ in pairs]))
    return {"loss, relative": error, "gradient, relative": gradient, "scores, relative": max(scores, default=""),
            "masks": min(masks, default=""), "equal": error < LOSS_ERROR and gradient < GRADIENT_ERROR}


def on(encoded: Any, device: torch.device) -> Any:
    """Return an encoded pass on the device, without a graph."""
    return replace(encoded, **{name: value.detach().to(device) for name, value in vars(encoded).items()
                               if isinstance(value, Tensor)})


def relative(value: Tensor, expected: Tensor) -> float:
    """Return |value - expected| / |expected|."""
    return float((value - expected).norm() / expected.norm())


def trainer_of(recipe: Recipe | str, model: str, batch_size: int, device: torch.device, **settings: Any) -> Trainer:
    """Return a trainer at its first step."""
    pairs = STEPS * batch_size
    config = configure(recipe=recipe, model=model, data=("synthetic",), batch_size=batch_size, samples=pairs,
                       **settings)
    return build_trainer(config, pairs, device)


def few_steps(bench: Bench, recipe: Recipe, device: torch.device, precision: str) -> dict[str, Any]:
    """Return the loss of the last of some steps; it and its gradients must be finite unless the scaler skips them."""
    trainer = trainer_of(recipe, bench.sizes.check_model, bench.sizes.check_batch, device, precision=precision)
    batch = coloured(synthetic_batch(trainer.method.plan, bench.sizes.check_batch))
    for _ in range(TRIED):
        output = trainer.train_step(batch)
    trainer.guard.incidents(wait=True)
    finite = bool(torch.isfinite(output.loss) & torch.isfinite(trainer._grad_norm))
    return {f"{precision}: loss": output.loss.item(), f"{precision}: finite": finite,
            f"{precision}: skipped of {TRIED}": trainer.guard.skipped}


def profile(bench: Bench) -> None:
    """Look for synchronisations in a step of a-clip, and profile some steps."""
    device, results = torch.device(bench.device), bench.results
    trainer = trainer_of("a-clip", bench.sizes.model, bench.sizes.profile_batch, device, precision="bf16")
    batch = synthetic_batch(trainer.method.plan, bench.sizes.profile_batch)
    if device.type == "cuda":
        batch = batch.pin_memory()

    def step() -> None:
        trainer.train_step(batch)
        trainer.guard.incidents(wait=False)

    for _ in range(3):
        step()
    results.add("synchronisations inside a step", what="set_sync_debug_mode", count=first_synchronisation(step))
    synchronize(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        begun = time.perf_counter()
        for _ in range(bench.sizes.profile_steps):
            step()
        queued = time.perf_counter() - begun
        synchronize(device)
        seconds = time.perf_counter() - begun
    events = profiler.key_averages()
    for name in SYNCHRONISATIONS:
        results.add("synchronisations inside a step", what=name, count=sum(
            e.count for e in events if e.key == name) / bench.sizes.profile_steps)
    on_device = [e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
    time_of = "self_device_time_total" if on_device else "self_cpu_time_total"
    kernels = on_device or [e for e in events if e.key.startswith("aten::")]
    by_kind: Counter[str] = Counter()
    for event in kernels:
        kind = next(kind for kind, pattern in KINDS.items() if search(pattern, event.key))
        by_kind[kind] += getattr(event, time_of) / 1e3 / bench.sizes.profile_steps
    each = 1e3 * seconds / bench.sizes.profile_steps
    results.add("profile of a step", what="all, on the clock", ms=each, share=1.0)
    results.add("profile of a step", what="host, to queue it", ms=1e3 * queued / bench.sizes.profile_steps,
                share=queued / seconds)
    for kind, ms in by_kind.most_common():
        results.add("profile of a step", what=kind, ms=ms, share=ms / each)
    for event in sorted(kernels, key=lambda e: -getattr(e, time_of))[:20]:
        ms = getattr(event, time_of) / 1e3 / bench.sizes.profile_steps
        results.add("longest kernels", ms=ms, share=ms / each, calls=event.count / bench.sizes.profile_steps,
                    kernel=event.key[:100].replace("|", " "))
    profiler.export_chrome_trace(str(results.folder / "trace.json.gz"))
    del trainer
    settings = Settings(bench.sizes.model, device, "bf16", False, bench.sizes.profile_batch, TEXT_TOKENS)
    row = Row("a-clip", "cut", Ours(settings, RECIPES["a-clip"], cut_text=True))
    take_turns([row], Stopwatch(device), warmup=1, rounds=2)
    add_parts(bench, row)


def first_synchronisation(step: Any) -> str:
    """Return where a step first waits for the device, "none" if nowhere; CUDA says so itself."""
    if not torch.cuda.is_available():
        return "needs CUDA"
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        trace, where = error.__traceback__, "?"
        while trace is not None:
            if "aclip" in trace.tb_frame.f_code.co_filename:
                where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
            trace = trace.tb_next
        return f"{where}: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


CASES: tuple[tuple[str, Parallel], ...] = (("clip", "ddp"), ("a-clip", "ddp"), ("clip", "fsdp"), ("a-clip", "fsdp"))


def ranks(bench: Bench) -> None:
    """Compare two processes on one device with one, over gloo and NCCL, with DDP and FSDP2."""
    device = torch.device(bench.device)
    with tempfile.TemporaryDirectory() as folder:
        for recipe in ("clip", "a-clip"):
            torch.save(few_losses(bench, recipe, "ddp", device), f"{folder}/{recipe}.pt")
        for backend in ("gloo", "nccl") if device.type == "cuda" else ("gloo",):
            error = ""
            try:
                spawn(one_rank, (bench, backend, folder), nprocs=2)
            except Exception as failure:  # NCCL refuses two ranks on one device, by its documentation
                error = str(failure).strip().splitlines()[-1][:200]
            for recipe, way in CASES:
                found = Path(folder, f"{backend}-{recipe}-{way}.json")
                bench.results.add("two processes against one", backend=backend, recipe=recipe, parallel=way, **(
                    json.loads(found.read_text()) if found.exists() else {"failed": error}))


def few_losses(bench: Bench, recipe: str, way: Parallel, device: torch.device) -> dict[str, Any]:
    """Return gradients of a first step and the losses of five, of the whole batch, on this process or on all."""
    torch.backends.cuda.matmul.allow_tf32 = False
    batch_size = bench.sizes.check_batch
    trainer = trainer_of(recipe, bench.sizes.check_model, batch_size, device, precision="fp32", parallel=way)
    share = batch_size // dist.world_size()
    batch = coloured(synthetic_batch(trainer.method.plan, batch_size)).rows(
        slice(dist.rank() * share, (dist.rank() + 1) * share))
    losses: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    for number in range(5):
        losses.append(trainer.train_step(batch).loss.detach())
        if number == 0:
            gradients = dict(named_gradients(trainer.method))
    mean = dist.sum_over_ranks(torch.stack(losses)) / dist.world_size()
    return {"losses": mean.cpu(), "gradients": gradients}


def named_gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield whole gradients, on the CPU; all ranks call it."""
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            yield name, whole(parameter.grad).cpu()


def one_rank(rank: int, bench: Bench, backend: str, folder: str) -> None:
    """Train as one of two ranks; leave the differences from one process."""
    device = torch.device(bench.device)
    torch_dist.init_process_group(f"cpu:gloo,cuda:{backend}" if device.type == "cuda" else backend, world_size=2,
                                  init_method=f"file://{folder}/meet-{backend}", rank=rank)
    for recipe, way in CASES:
        found, alone = few_losses(bench, recipe, way, device), torch.load(f"{folder}/{recipe}.pt")
        gradients = [(found["gradients"][name].flatten(), g.flatten()) for name, g in alone["gradients"].items()]
        if rank == 0:
            Path(folder, f"{backend}-{recipe}-{way}.json").write_text(json.dumps({
                "gradient, relative": relative(*map(torch.cat, zip(*gradients, strict=True))),
                "loss, relative": float(((found["losses"] - alone["losses"]) / alone["losses"]).abs().max())}))
    torch_dist.destroy_process_group()
