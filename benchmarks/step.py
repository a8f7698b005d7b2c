"""What a training step costs: every method of the project and open_clip's own trainer, in turns.

    python benchmarks/step.py          CPU: ViT-B/16's proportions at half of its width, bf16; 5 minutes on 2 idle cores
    python benchmarks/step.py --precision fp32 --text cut --batch-size 4 --rounds 4 --parts 0             2 minutes
    python benchmarks/step.py --size ViT-B-16 --batch-size 256 --device cuda --compile
    python benchmarks/step.py --size ViT-B-32 --batch-size 32 --methods clip 'clip, LoRA 8' --text cut --parts 0
    python benchmarks/step.py --against OTHER/src --methods clip a-clip --models vit-micro vit-tiny   another checkout

One process; the competitors take their steps in turns, A B C A B C ..., so that whatever else the machine does meets
all of them; medians, and the first and third quartile. The competitor is open_clip's CLIP as its trainer runs it: its
model, `ClipLoss`, autocast to bf16 (`amp_bf16`), AdamW with its two groups, text padded to 77 tokens, and
`torch.compile` of the model with --compile (its --torchcompile). Both sides turn uint8 images into normalised floats
within the step; colour augmentation, which open_clip leaves to its loaders, is in neither.

"step" is forward pass, losses and backward pass; optimizer and EMA update are reported apart. "arithmetic" is the
ratio of multiply-accumulates to open_clip's, from the plan and the true lengths of the captions (SOT and EOT included,
a stated log-normal distribution, see `aclip.bench`): what a step would cost if nothing but products took time.
Prints Markdown.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich.console import Console
from rich.progress import Progress

import aclip
from aclip.config import override
from aclip.recipes import RECIPES
from checkouts import compare_checkouts
from competitors import BATCHES, SIZES, OpenClip, Ours, Settings, Stopwatch, peak_of, register_sizes

ASKED: dict[str, tuple[str, dict[str, float]]] = {
    "clip": ("clip", {}),
    "flip": ("flip", {}),
    "slip": ("slip", {}),
    "maskclip": ("maskclip", {}),
    "attentive-1x50": ("attentive-1x50", {}),
    "attentive-1x50, EMA at 1/2": ("attentive-1x50", {"passes.context.resolution": 0.5}),
    "a-clip": ("a-clip", {}),
    "a-clip-eff": ("a-clip-eff", {}),
}
"""Title in the table -> recipe, and changes to it."""

LORA = {"clip, LoRA 8": ("clip", 8)}
"""Title -> recipe, and rank of the updates of both towers that are trained instead of the weights."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
PARTS = ("text", "EMA pass", "online pass", "heads", "losses", "optimizer", "EMA update", "host")


@dataclass
class Row:
    """What was measured of one competitor."""

    title: str
    text: str
    competitor: OpenClip | Ours
    step: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    ema: list[float] = field(default_factory=list)
    memory: int = 0
    parts: dict[str, float] = field(default_factory=dict)

    def take(self, watch: Stopwatch, number: int) -> None:
        """Take one whole step."""
        one = self.competitor
        batch = one.batches[number % BATCHES]
        parts: list[tuple[list[float], Callable[[], None]]] = [
            (self.step, partial(one.propagate, batch)), (self.optimizer, one.optimize), (self.ema, one.average)]
        for seconds, run in parts:
            watch.wait()
            begun = watch.clock()
            run()
            watch.wait()
            seconds.append(watch.clock() - begun)

    def forget(self) -> None:
        """Start counting after the warm-up."""
        for seconds in (self.step, self.optimizer, self.ema):
            seconds.clear()

    def macs(self) -> float:
        """Return the multiply-accumulates of a pair, at the true lengths of the captions where they are cut."""
        if self.text == "padded":
            return self.competitor.plan.macs()
        lengths = torch.cat([batch.tokens.argmax(dim=1) + 1 for batch in self.competitor.batches])
        return self.competitor.plan.macs(float(lengths.float().mean()))

    def tokens(self) -> float:
        """Return the tokens of a pair that go through the towers, padding not counted where text is cut."""
        resolved, batches = self.competitor.plan, self.competitor.batches
        lengths = torch.cat([batch.tokens.argmax(dim=1) + 1 for batch in batches]).float()
        text = resolved.shape.context_length if self.text == "padded" else float(lengths.mean())
        return text + sum(len(p.spec.views) * p.num_tokens for p in resolved.passes.values())


def peak_rate(settings: Settings, shape: Any, clock: Callable[[], float]) -> float:
    """Return the multiply-accumulates a second of the best of a few large matrix products."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    best = 0.0
    on_gpu = settings.device.type == "cuda"
    tokens = math.prod(shape.grid_size) * settings.batch_size
    for rows, inner, outer in ((tokens, shape.width, shape.mlp_width), (2048, 2048, 2048), (4096, 1024, 4096),
                               *([(8192, 8192, 8192)] if on_gpu else [])):
        a, b = (torch.randn(n, inner, device=settings.device, dtype=dtype) for n in (rows, outer))
        times = 10 if on_gpu else 1  # between two readings of the clock, as a launch takes time, too
        for _ in range(5):
            watch = Stopwatch(settings.device, clock)
            with watch.measure("product"):
                for _ in range(times):
                    torch.nn.functional.linear(a, b)
            best = max(best, times * rows * inner * outer / watch.seconds["product"])
    return best


def take_turns(
    rows: Sequence[Row], watch: Stopwatch, *, warmup: int, rounds: int, advance: Callable[[], object] = lambda: None
) -> None:
    """Take steps of all competitors in turns; those of the warm-up are forgotten."""
    for number in range(warmup + rounds):
        if number == warmup:
            for row in rows:
                row.forget()
        for row in rows:
            row.take(watch, number)
            advance()


def measure_memory(row: Row, watch: Stopwatch) -> None:
    """Take one more step, which is not timed, for its peak."""
    times = (list(row.step), list(row.optimizer), list(row.ema))
    row.memory = peak_of(row.competitor, partial(row.take, watch, 0))
    row.step, row.optimizer, row.ema = times


def figures(row: Row, rows: Sequence[Row], rate: float) -> dict[str, Any]:
    """Return what the table of times shows of a row: seconds, quartiles, ratios to the first row and to own `clip`."""
    base, pairs = rows[0], row.competitor.settings.batch_size
    own = next((one for one in rows if (one.title, one.text) == ("clip", row.text)), None)
    ratio = statistics.median(a / b for a, b in zip(row.step, base.step, strict=True))
    arithmetic = row.macs() / base.macs()
    seconds = statistics.median(row.step)
    whole = statistics.median(sum(t) for t in zip(row.step, row.optimizer, row.ema, strict=True))
    return {
        "quartiles": statistics.quantiles(row.step, n=4, method="inclusive"), "ratio": ratio, "arithmetic": arithmetic,
        "to_own_clip": own and statistics.median(a / b for a, b in zip(row.step, own.step, strict=True)),
        "optimizer": statistics.median(row.optimizer), "ema": statistics.median(row.ema),
        "pairs_per_second": pairs / whole, "tokens_per_second": pairs * row.tokens() / seconds,
        "flops": 2 * pairs * row.macs() / seconds, "mfu": pairs * row.macs() / seconds / rate, "memory": row.memory}


def spread(quartiles: Sequence[float]) -> str:
    """Return median and quartiles in words, in milliseconds."""
    low, middle, high = (1e3 * seconds for seconds in quartiles)
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def times_table(rows: list[Row], rate: float) -> str:
    """Return the table of times, costs and rates."""
    lines = []
    for row in rows:
        of = figures(row, rows, rate)
        lines.append([
            row.title, row.text, spread(of["quartiles"]), f"{of['ratio']:.2f}", f"{of['arithmetic']:.2f}",
            f"{of['ratio'] / of['arithmetic']:.2f}", f"{of['to_own_clip']:.2f}" if of["to_own_clip"] else "-",
            f"{1e3 * of['optimizer']:.0f}", f"{1e3 * of['ema']:.0f}", f"{of['pairs_per_second']:.1f}",
            f"{of['tokens_per_second']:,.0f}", f"{of['mfu']:.0%}",
            f"{row.memory / 2**30:.2f}" if row.memory else "-"])
    return markdown(["method", "text", "step, ms", "x open_clip", "arithmetic", "over arithmetic", "x clip",
                     "optimizer, ms", "EMA update, ms", "pairs/s", "tokens/s", "MFU", "peak GiB"], lines)


def parts_table(rows: list[Row]) -> str:
    """Return the table of the shares of each part in a whole step."""
    lines = []
    for row in rows:
        if row.parts:
            total = sum(row.parts.values())
            lines.append([row.title, row.text, *(f"{row.parts.get(part, 0.0) / total:.1%}" for part in PARTS)])
    return markdown(["method", "text", *PARTS], lines)


def parts_of(row: Row, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return seconds of each part of a step: medians over a few steps taken part by part."""
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for number in range(rounds):
        watch = Stopwatch(row.competitor.settings.device, clock)
        row.competitor.stages(watch, row.competitor.batches[number % BATCHES])
        if not watch.seconds:
            return {}
        seconds = watch.seconds
        seconds["losses"] = seconds.pop("heads and losses") - seconds.get("heads", 0.0)
        inner = sum(seconds.get(part, 0.0) for part in PARTS[:5])
        seconds["host"] = seconds.pop("all") - inner
        for part in PARTS:
            found[part].append(seconds.get(part, 0.0))
    parts = {part: statistics.median(values) for part, values in found.items()}
    return parts | {"optimizer": statistics.median(row.optimizer), "EMA update": statistics.median(row.ema)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="half")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--parts", type=int, default=2, help="steps taken part by part; 0 leaves the second table out")
    parser.add_argument("--text-tokens", type=float, default=14.0, help="mean length of the captions")
    parser.add_argument("--text", nargs="+", choices=("cut", "padded"), default=["cut", "padded"])
    parser.add_argument("--methods", nargs="+", choices=[*ASKED, *LORA], default=list(ASKED))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: seconds of all threads together, "
                        "for one thread on a machine that does other things")
    parser.add_argument("--against", type=Path, metavar="SRC", help="compare with the package in this folder instead: "
                        "`aclip bench step` of both checkouts on the CPU, in processes that take turns")
    parser.add_argument("--models", nargs="+", default=["vit-micro", "vit-tiny"], help="for --against")
    parser.add_argument("--turns", type=int, default=8, help="of --against")
    args = parser.parse_args()
    if args.against:
        compare_checkouts(
            args.against, [ASKED[title][0] for title in args.methods], args.models, batch_size=args.batch_size,
            rounds=args.rounds, turns=args.turns, precision=args.precision, clock=args.clock)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    begun = time.perf_counter()
    console = Console(width=200)
    device = torch.device(args.device)
    register_sizes()
    settings = Settings(SIZES[args.size], device, args.precision, args.compile, args.batch_size, args.text_tokens)
    rows = [Row("open_clip", "padded", OpenClip(settings))]
    for text in args.text:
        for title in args.methods:
            name, rank = LORA.get(title, (title, 0))
            name, changes = ASKED[name]
            recipe = override(RECIPES[name], changes)
            rows.append(Row(title, text, Ours(settings, recipe, text == "cut", rank)))
    watch = Stopwatch(device, CLOCKS[args.clock])
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("steps", total=(args.warmup + args.rounds + args.parts) * len(rows))
        take_turns(rows, watch, warmup=args.warmup, rounds=args.rounds, advance=lambda: progress.advance(task))
        rate = peak_rate(settings, rows[0].competitor.plan.shape, watch.clock)
        for row in rows:
            measure_memory(row, watch)
            row.parts = parts_of(row, args.parts, watch.clock) if args.parts else {}
            progress.advance(task, args.parts)
    print_results(console, rows, settings, rate, args.rounds, time.perf_counter() - begun)


def print_results(
    console: Console, rows: list[Row], settings: Settings, rate: float, rounds: int, seconds: float
) -> None:
    """Print both tables and what they depend on."""
    shape = rows[0].competitor.plan.shape
    tokens = math.prod(shape.grid_size) + shape.num_prefix_tokens
    where = (torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda"
             else f"{torch.get_num_threads()} threads of {processor()}")
    lengths = torch.cat([batch.tokens.argmax(dim=1) + 1 for batch in rows[0].competitor.batches]).float()
    longest = [int((batch.tokens.argmax(dim=1) + 1).max()) for batch in rows[0].competitor.batches]
    text = (
        f"{settings.model} ({shape.width} and {shape.text_width} wide, {shape.layers} layers, {tokens} tokens), "
        f"{settings.precision}, batch {settings.batch_size}, {'compiled' if settings.compiled else 'eager'}, "
        f"on {where}; matrix products reach {2 * rate / 1e9:,.0f} GFLOP/s there. Captions of {lengths.mean():.1f} "
        f"tokens in the mean, the longest of each batch {', '.join(map(str, longest))}. Medians of {rounds} steps "
        f"taken in turns, first to third quartile; {seconds / 60:.1f} minutes in all. attentive-clip "
        f"{aclip.__version__}, torch {torch.__version__}, open_clip {open_clip.__version__}, Python "
        f"{platform.python_version()}.")
    for block in (text, times_table(rows, rate), parts_table(rows)):
        console.print(block, "", sep="\n", markup=False, highlight=False, soft_wrap=True)


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
             ] if info.exists() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
