"""Stages of `gpu.py` that time: whole steps, optimizers, and the operations in question."""

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from aclip import models, plan
from aclip.bench import caption_lengths, summary, synthetic_tokens, time_in_turns
from aclip.config import MuonConfig, Optimization, override
from aclip.method import Method
from aclip.models import text
from aclip.models.blocks import attention as attend
from aclip.models.blocks import first_row
from aclip.recipes import RECIPES
from aclip.training.optim import build_optimizer, parameter_groups
from competitors import OpenClip, Ours, Settings, Stopwatch, register_sizes
from gpu import Bench
from step import ASKED, Row, figures, measure_memory, parts_of, peak_rate, take_turns

TEXT_TOKENS = 14.0
SPARE = 0.92  # of the memory may be planned with
LARGEST = 1024  # batch, enough to fill a GPU
FIRST = ("open_clip", "a-clip", "clip", "a-clip-eff")
"""Compiled before the others."""
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def steps(bench: Bench) -> None:
    """Time steps of all methods and of open_clip, eager and in turns; then compiled, each beside open_clip's two."""
    sizes, device = bench.sizes, torch.device(bench.device)
    register_sizes()
    watch = Stopwatch(device)
    methods = {title: override(RECIPES[name], changes) for title, (name, changes) in ASKED.items()
               if title in (sizes.step_methods or ASKED)}
    settings = Settings(sizes.model, device, "bf16", False, sizes.step_batch or 0, TEXT_TOKENS)
    if not sizes.step_batch:
        settings = replace(settings, batch_size=largest_batch(settings, watch, others=len(methods)))
    rows = [Row("open_clip", "padded", OpenClip(settings)),
            *(Row(title, "cut", Ours(settings, recipe, cut_text=True)) for title, recipe in methods.items())]
    rate = peak_rate(settings, rows[0].competitor.plan.shape, watch.clock)
    bench.results.add("matrix products", precision="bf16", tflops=2 * rate / 1e12)
    take_turns(rows, watch, warmup=2, rounds=sizes.rounds)
    for row in rows:
        measure_memory(row, watch)
        add_step(bench, row, rows, rate)
    for row in rows[1:]:
        add_parts(bench, row)
    compiled, reference, longest = replace(settings, compiled=True), rows[:1], 0.0
    del rows, row
    order = sorted(("open_clip", *methods), key=lambda title: FIRST.index(title) if title in FIRST else len(FIRST))
    for title in order if sizes.compiles else ():
        if bench.left() < 1.5 * longest:
            bench.results.add("left out", stage="steps", what=f"{title}, compiled, and what follows", why="time")
            break
        gc.collect()
        before, ours = bench.left(), methods.get(title)
        row = Row(f"{title}, compiled", "padded" if ours is None else "cut",
                  OpenClip(compiled) if ours is None else Ours(compiled, ours, cut_text=True))
        take_turns([*reference, row], watch, warmup=2, rounds=sizes.rounds)
        measure_memory(row, watch)
        add_step(bench, row, [*reference, row], rate)
        if ours is None:
            reference.append(row)
        longest = max(longest, before - bench.left())


def largest_batch(settings: Settings, watch: Stopwatch, others: int) -> int:
    """Return the largest batch, a multiple of 64, at which a step of slip, which takes the most memory, fits beside
    what so many others hold; from its memory at two small batches, in which it is linear."""
    (small, held), (large, held_large) = (
        memory_of_slip(replace(settings, batch_size=size), watch) for size in (64, 128))
    per_pair = (large - small + others * (held_large - held)) / 64
    fixed = small + others * held - 64 * per_pair
    _, total = torch.cuda.mem_get_info(settings.device)
    return max(64, min(LARGEST, int((SPARE * total - fixed) / per_pair) // 64 * 64))


def memory_of_slip(settings: Settings, watch: Stopwatch) -> tuple[int, int]:
    """Return bytes at the peak of a step of slip, and between its steps."""
    gc.collect()
    row = Row("slip", "cut", Ours(settings, RECIPES["slip"], cut_text=True))
    torch.cuda.reset_peak_memory_stats(settings.device)
    row.take(watch, 0)
    return torch.cuda.max_memory_allocated(settings.device), torch.cuda.memory_allocated(settings.device)


def add_step(bench: Bench, row: Row, rows: list[Row], rate: float) -> None:
    """Add a row of the table of steps; ratios are to the first of `rows`, open_clip's eager step."""
    of = figures(row, rows, rate)
    bench.results.add("steps", method=row.title, text=row.text, batch=row.competitor.settings.batch_size, **{
        "ms, quartiles": [1e3 * seconds for seconds in of["quartiles"]], "pairs/s": of["pairs_per_second"],
        "x open_clip": of["ratio"], "arithmetic": of["arithmetic"], "over arithmetic": of["ratio"] / of["arithmetic"],
        "TFLOP/s": of["flops"] / 1e12, "MFU": of["mfu"], "optimizer, ms": 1e3 * of["optimizer"],
        "EMA, ms": 1e3 * of["ema"], "peak GiB": row.memory / 2**30})


def add_parts(bench: Bench, row: Row) -> None:
    """Add a row of the table of parts; each part is waited for, so that they take more than the step as a whole."""
    parts = parts_of(row, 2, time.perf_counter)
    bench.results.add("parts of a step", method=row.title, **{
        f"{part}, ms": 1e3 * seconds for part, seconds in parts.items()})


def optimizers(bench: Bench) -> None:
    """Time one update of every weight of a-clip."""
    device = torch.device(bench.device)
    resolved = plan.resolve(RECIPES["a-clip"], models.shape_of(models.model_config(bench.sizes.model)))
    method = Method(models.create_model(bench.sizes.model), resolved, (0.5,) * 3, (0.25,) * 3).to(device)
    groups = parameter_groups(method, 0.2)
    named = {name: p for group in groups for name, p in group.parameters.items()}
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    decayed = [{"params": list(group.parameters.values()), "weight_decay": group.weight_decay} for group in groups]
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embedding" not in name]
    chosen = set(map(id, matrices))
    others = [p for p in named.values() if id(p) not in chosen]
    muon, rest = torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, fused=True)
    ours = build_optimizer(parameter_groups(method, 0.2, muon=MuonConfig()), Optimization())
    ours.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]  # as in training
    ema = method.ema()
    calls: dict[str, Callable[[], object]] = {
        "AdamW": torch.optim.AdamW(decayed).step,
        "AdamW, fused": torch.optim.AdamW(decayed, fused=True).step,
        "torch's Muon, fused AdamW for vectors and embeddings": lambda: (muon.step(), rest.step()),
        "aclip's Muon, for the blocks of both towers": ours.step,
        "EMA update": partial(ema.update, 0.996, skipped=torch.zeros((), device=device)),
    }
    for name, row in timed(bench, calls).items():
        bench.results.add("optimizers", update=name, parameters=sum(p.numel() for p in named.values()), **row)


def timed(bench: Bench, calls: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
    """Return "ms" and "quartiles" of each call, in turns; a call that fails has "failed" instead."""
    found: dict[str, dict[str, Any]] = {}
    working: dict[str, Callable[[], None]] = {}
    for name, call in calls.items():
        try:
            call()
        except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
            found[name] = {"failed": (str(error) or type(error).__name__).splitlines()[0][:100]}
            continue

        def several(call: Callable[[], object] = call) -> None:
            for _ in range(bench.sizes.repeat):
                call()

        working[name] = several
    times = time_in_turns(working, warmup=1, rounds=max(3, bench.sizes.rounds), device=torch.device(bench.device))
    for name, seconds in times.items():
        of = summary([1e3 * s / bench.sizes.repeat for s in seconds])
        found[name] = {"ms": of["median"], "quartiles": [of["first_quartile"], of["third_quartile"]]}
    return {name: found[name] for name in calls}


def with_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """Return a call of the function and of its backward pass."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def call() -> None:
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return call


def attention(bench: Bench) -> None:
    """Time the row of scores, the backends of attention, packed captions, and CUDA graphs."""
    for part in (cls_row, backends, captions, graphs):
        if bench.left() > 0:
            part(bench)


def heads(bench: Bench, tokens: int) -> list[Tensor]:
    """Return queries, keys and values of ViT-B's heads, in bf16."""
    return [torch.randn(bench.sizes.attention_batch, 12, tokens, 64, device=bench.device, dtype=torch.bfloat16)
            for _ in range(3)]


def cls_row(bench: Bench) -> None:
    """Compare the row of scores with attention itself."""
    for tokens in (50, 197):
        q, k, v = heads(bench, tokens)
        rows = timed(bench, {"attention, forward": partial(attend, q, k, v), "row of scores": partial(first_row, q, k)})
        for name, row in rows.items():
            bench.results.add("row of [CLS]", tokens=tokens, what=name, **row)


def backends(bench: Bench) -> None:
    """Compare the backends of SDPA, forward and backward."""
    for tokens in (50, 101, 197):
        inputs = heads(bench, tokens)

        def by(backend: SDPBackend, inputs: list[Tensor] = inputs) -> None:
            with sdpa_kernel(backend):
                with_backward(F.scaled_dot_product_attention, *inputs)()

        calls: dict[str, Callable[[], object]] = {
            "torch's choice": with_backward(F.scaled_dot_product_attention, *inputs),
            **{backend.name: partial(by, backend) for backend in BACKENDS}}
        for name, row in timed(bench, calls).items():
            bench.results.add("SDPA, forward and backward", tokens=tokens, backend=name, **row)


def captions(bench: Bench) -> None:
    """Compare captions that are cut after the longest with packed ones: the whole tower, and its attention alone."""
    device, count = torch.device(bench.device), bench.sizes.attention_batch
    model = models.create_model(bench.sizes.model).to(device)
    tower = models.text_tower_of(model)
    noise = torch.Generator().manual_seed(0)
    lengths = caption_lengths(count, TEXT_TOKENS, tower.context_length, noise)
    tokens = synthetic_tokens(lengths, int(lengths.max()), tower.vocab_size, noise).to(device)

    def encode(packed: bool) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16), patch.object(text, "packs", lambda tokens: packed):
            models.encode_text(model, tokens).float().sum().backward()

    width, num_heads = tower.token_embedding.embedding_dim, tower.transformer.resblocks[0].attn.num_heads
    ends = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    longest, flat = int(lengths.max()), (int(ends[-1]), num_heads, width // num_heads)
    padded = [torch.randn(count, num_heads, longest, flat[2], device=device, dtype=torch.bfloat16) for _ in range(3)]
    packed = [torch.randn(flat, device=device, dtype=torch.bfloat16) for _ in range(3)]
    calls: dict[str, Callable[[], object]] = {
        "tower, cut": partial(encode, False), "tower, packed outside of attention": partial(encode, True),
        "attention, cut": with_backward(partial(F.scaled_dot_product_attention, is_causal=True), *padded),
        "attention, nested tensors": with_backward(partial(nested_attention, ends, longest), *packed),
        "attention, varlen": with_backward(partial(varlen_attention, ends, longest), *packed),
    }
    for name, row in timed(bench, calls).items():
        bench.results.add("captions, forward and backward", what=name, captions=count, longest=longest,
                          mean=float(lengths.float().mean()), **row)


def nested_attention(ends: Tensor, longest: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention of sequences that stand one after the other, by jagged nested tensors: (S, H, d)."""
    queries, keys, values = (
        torch.nested.nested_tensor_from_jagged(x, ends.long(), max_seqlen=longest).transpose(1, 2) for x in (q, k, v))
    mixed: Any = F.scaled_dot_product_attention(queries, keys, values, is_causal=True).transpose(1, 2)
    return cast(Tensor, mixed.values())


def varlen_attention(ends: Tensor, longest: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the same by torch's kernel for sequences of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    # each token sees itself and all before it
    return cast(Tensor, varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0)))


def graphs(bench: Bench) -> None:
    """Compare the image tower's two passes, whose shapes never change, with their CUDA graphs."""
    device = torch.device(bench.device)
    visual = models.visual_of(models.create_model(bench.sizes.model)).to(device)
    size = models.vit_of(visual).visual.image_size
    for batch_size in bench.sizes.graph_batches:
        pixels = torch.randn(batch_size, 3, *size, device=device)

        def run(train: bool, pixels: Tensor = pixels) -> None:
            visual.zero_grad(set_to_none=True)
            precision = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # graphs keep no cast weights
            with precision, nullcontext() if train else torch.no_grad():
                out = models.encode_image(visual, pixels, return_scores=not train)
            if train:
                out.features.float().sum().backward()

        for name, train in (("EMA pass with scores", False), ("forward and backward", True)):
            call = partial(run, train)
            for how, row in timed(bench, {"eager": call, "CUDA graph": recorded(call, visual)}).items():
                bench.results.add("CUDA graphs", batch=batch_size, what=name, how=how, **row)


def recorded(call: Callable[[], None], module: nn.Module) -> Callable[[], object]:
    """Return the replay of a call, recorded after some calls on a side stream, as torch asks for."""
    if not torch.cuda.is_available():
        return no_graph
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    module.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def no_graph() -> None:
    """Fail, as only CUDA has graphs."""
    raise RuntimeError("needs CUDA")
