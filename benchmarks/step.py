"""What a training step costs: every method of the project and open_clip's own trainer, in turns.

    python benchmarks/step.py                          CPU: ViT-B/16's proportions at half of its width, in bf16
    python benchmarks/step.py --precision fp32 --batch-size 8
    python benchmarks/step.py --size ViT-B-16 --batch-size 256 --device cuda --compile

One process; the competitors take their steps in turns, A B C A B C ..., so that whatever else the machine does meets
all of them; medians, and the first and third quartile. The competitor is open_clip's CLIP as its trainer runs it: its
model, `ClipLoss`, autocast to bf16 (`amp_bf16`), AdamW with its two groups, text padded to 77 tokens, and
`torch.compile` of the model with --compile (its --torchcompile). Both sides turn uint8 pictures into normalised floats
within the step; colour augmentation, which open_clip leaves to its loaders, is in neither.

"step" is forward pass, losses and backward pass; optimizer and EMA update are reported apart. "arithmetic" is the
ratio of multiply-accumulates to open_clip's, from the plan and the true lengths of the captions (SOT and EOT included,
a stated log-normal distribution, see `aclip.engine.trial`): what a step would cost if nothing but products took time.
Prints Markdown.
"""

import argparse
import ctypes
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.loss import ClipLoss
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import aclip
from aclip import plan, towers
from aclip.config import Recipe, override
from aclip.data import augment
from aclip.engine.memory import peak_memory
from aclip.engine.optim import build_optimizer, parameter_groups
from aclip.engine.trial import made_batch
from aclip.method import Method
from aclip.recipes import RECIPES
from aclip.structs import Batch, Encoded, EncodedBatch, EncodedText
from aclip.towers.blocks import call_as_modules

# Half of ViT-B/16 in width: the same tokens, depth and ratio of text to image.
HALF = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 384, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 12},
}  # fmt: skip
SIZES = {"half": "half-ViT-B-16", "ViT-B-16": "ViT-B-16"}

ASKED = {
    "clip": ("clip",),
    "flip": ("flip",),
    "slip": ("slip",),
    "maskclip": ("maskclip",),
    "attentive-1x50": ("attentive-1x50",),
    "attentive-1x50, EMA at 1/2": ("attentive-1x50", "passes.context.resolution=0.5"),
    "a-clip": ("a-clip",),
    "a-clip-eff": ("a-clip-eff",),
}
"""Title in the table -> recipe, and changes to it."""

BATCHES = 4  # different ones, which all competitors read
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
PARTS = ("text", "EMA pass", "online pass", "heads", "losses", "optimizer", "EMA update", "host")


@dataclass
class Stopwatch:
    """Seconds by name, of the clock on the wall or of the processor."""

    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add what happens inside to `name`."""
        self.wait()
        begun = self.clock()
        yield
        self.wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - begun

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Settings:
    """What the competitors share."""

    model: str
    device: torch.device
    precision: str
    compiled: bool
    batch_size: int
    text_tokens: float

    def autocast(self) -> torch.autocast:
        """Return the precision of the towers."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def batches(self, resolved: plan.Plan, cut_text: bool) -> list[Batch]:
        """Return batches of the same captions for everybody."""
        made = (made_batch(resolved, self.batch_size, text_tokens=self.text_tokens, cut_text=cut_text, seed=seed)
                for seed in range(BATCHES))
        return [batch.to(self.device) for batch in made]


class OpenClip:
    """open_clip's training step, as `open_clip_train` takes it."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(0)
        self.settings = settings
        self.plan = plan.resolve(RECIPES["clip"], towers.shape_of(towers.model_config(settings.model)))
        towers.model_config(settings.model)
        self.bare = open_clip.create_model(settings.model, device=settings.device, output_dict=True).train()
        self.model = torch.compile(self.bare) if settings.compiled else self.bare
        self.loss = ClipLoss()
        named = [(name, p) for name, p in self.bare.named_parameters() if p.requires_grad]
        vectors = [p for name, p in named if excluded(name, p)]
        matrices = [p for name, p in named if not excluded(name, p)]
        self.optimizer = torch.optim.AdamW(
            [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.2}],
            lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
        self.batches = settings.batches(self.plan, cut_text=False)
        self.mean, self.std = (torch.tensor(value, device=settings.device) for value in
                               (towers.models.IMAGENET_MEAN, towers.models.IMAGENET_STD))

    def propagate(self, batch: Batch) -> None:
        """Forward pass, loss and backward pass."""
        self.optimizer.zero_grad()
        images = augment.apply(batch.views["a"], self.mean, self.std)
        with self.settings.autocast():
            out = self.model(images, batch.tokens)
            losses = self.loss(**out, output_dict=True)
        sum(losses.values()).backward()

    def optimize(self) -> None:
        """Take the optimizer's step."""
        self.optimizer.step()
        with torch.no_grad():
            self.bare.logit_scale.clamp_(0, math.log(100))

    def average(self) -> None:
        """There is no EMA."""

    def stages(self, watch: Stopwatch, batch: Batch) -> None:
        """The parts of this step are not told apart."""


def excluded(name: str, parameter: nn.Parameter) -> bool:
    """Return whether open_clip's trainer leaves a parameter out of weight decay."""
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


class Ours:
    """A recipe's training step, as `aclip train` takes it."""

    def __init__(self, settings: Settings, recipe: Recipe, cut_text: bool) -> None:
        torch.manual_seed(0)
        self.settings = settings
        self.plan = plan.resolve(recipe, towers.shape_of(towers.model_config(settings.model)))
        model = towers.create_model(settings.model, with_text=self.plan.uses_text)
        pixels = towers.preprocess_config(model)
        self.method = Method(model, self.plan, pixels["mean"], pixels["std"]).to(settings.device).train()
        if settings.compiled:
            compile_blocks(self.method)
        self.optimizer = build_optimizer(parameter_groups(self.method, 0.2), recipe.optimization)
        self.ema = self.method.ema()
        self.batches = settings.batches(self.plan, cut_text)

    def propagate(self, batch: Batch) -> None:
        """Forward pass, losses and backward pass."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.settings.autocast():
            output = self.method(batch)
        output.loss.backward()

    def optimize(self) -> None:
        """Take the optimizer's step."""
        self.optimizer.step()
        with torch.no_grad():
            towers.logit_scale_of(self.method.model).clamp_(0, math.log(100))

    def average(self) -> None:
        """Update the EMA."""
        if self.plan.recipe.ema_momentum is not None:
            self.ema.update(0.996)

    def stages(self, watch: Stopwatch, batch: Batch) -> None:
        """Take the step's forward and backward pass part by part, cut where one part hands over to the next."""
        self.optimizer.zero_grad(set_to_none=True)
        cuts: list[tuple[str, Tensor, Tensor]] = []

        def cut(name: str, tensor: Tensor | None) -> Tensor | None:
            if tensor is None or not tensor.requires_grad:
                return tensor
            leaf = tensor.detach().requires_grad_()
            cuts.append((name, tensor, leaf))
            return leaf

        def encode_text(*arguments: Any) -> EncodedText:
            with watch.measure("text"):
                out = Method.encode_text(self.method, *arguments)
            return replace(out, features=cut("text", out.features), states=cut("text", out.states))

        def encode(p: plan.PassPlan, *arguments: Any) -> Encoded:
            name = "EMA pass" if p.spec.encoder == "ema" else "online pass"
            with watch.measure(name):
                out = Method.encode(self.method, p, *arguments)
            return replace(out, features=cut(name, out.features), cls=cut(name, out.cls),
                           patches=cut(name, out.patches))

        self.method.encode_text, self.method.encode = encode_text, encode
        hooks = [hook for objective in self.method.objectives.values() for head in objective.children()
                 for hook in timing_hooks(watch, head)]
        try:
            with watch.measure("all"):
                with self.settings.autocast():
                    encoded: EncodedBatch = self.method.encode_batch(batch)
                with watch.measure("heads and losses"):
                    with self.settings.autocast():
                        loss = self.method.judge(encoded, batch.caption_ids).loss
                    loss.backward()
                for name in ("text", "online pass"):
                    ends = [(tensor, leaf.grad) for part, tensor, leaf in cuts
                            if part == name and leaf.grad is not None]
                    if ends:
                        with watch.measure(name):
                            torch.autograd.backward(*map(list, zip(*ends, strict=True)))
        finally:
            del self.method.encode_text, self.method.encode
            for hook in hooks:
                hook.remove()


def timing_hooks(watch: Stopwatch, head: nn.Module) -> list[Any]:
    """Measure a head's forward and backward pass."""
    begun: list[float] = []

    def start(*_: object) -> None:
        watch.wait()
        begun.append(watch.clock())

    def stop(*_: object) -> None:
        watch.wait()
        watch.seconds["heads"] = watch.seconds.get("heads", 0.0) + watch.clock() - begun.pop()

    hooks: list[Any] = [head.register_forward_pre_hook(start), head.register_forward_hook(stop)]
    if any(p.requires_grad for p in head.parameters()):
        hooks += [head.register_full_backward_pre_hook(start), head.register_full_backward_hook(stop)]
    return hooks


def compile_blocks(method: Method) -> None:
    """Compile the transformer blocks, for texts of any length."""
    for module in method.modules():
        if isinstance(module, open_clip.transformer.Transformer):
            call_as_modules(module)
            for block in module.resblocks:
                block.compile(dynamic=True)


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
        for seconds, run in ((self.step, lambda: one.propagate(batch)), (self.optimizer, one.optimize),
                             (self.ema, one.average)):
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
        return text + sum(len(p.spec.views) * p.num_tokens for p in resolved.passes)


def peak_of(row: Row, device: torch.device) -> int:
    """Return the most memory that one step takes, its own weights and optimizer state included.

    On a CPU: what the process grows by in the step (Linux only), and what the competitor holds between steps.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        clear = Path("/proc/self/clear_refs")
        if not clear.exists():
            return 0
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would hide what the step takes
        clear.write_text("5")
        before = status("VmRSS")
    row.take(Stopwatch(device), 0)
    peak = peak_memory(device) if device.type == "cuda" else status("VmHWM")
    module = row.competitor.method if isinstance(row.competitor, Ours) else row.competitor.bare
    held = [*module.parameters(), *module.buffers(),
            *(t for state in row.competitor.optimizer.state.values() for t in state.values())]
    return peak - before + sum(t.nbytes for t in held)


def status(name: str) -> int:
    """Return a size in bytes from the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak_rate(settings: Settings, shape: Any, clock: Callable[[], float]) -> float:
    """Return the multiply-accumulates a second of the best of a few large matrix products."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    best = 0.0
    for rows, inner, outer in ((197 * settings.batch_size, shape.width, shape.mlp_width), (2048, 2048, 2048),
                               (4096, 1024, 4096)):
        a, b = (torch.randn(n, inner, device=settings.device, dtype=dtype) for n in (rows, outer))
        for _ in range(5):
            watch = Stopwatch(settings.device, clock)
            with watch.measure("product"):
                torch.nn.functional.linear(a, b)
            best = max(best, rows * inner * outer / watch.seconds["product"])
    return best


def spread(seconds: Sequence[float], scale: float = 1e3) -> str:
    """Return median and quartiles in words."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{scale * middle:.0f} ({scale * low:.0f} to {scale * high:.0f})"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def times_table(rows: list[Row], settings: Settings, rate: float) -> str:
    """Return the table of times, costs and rates."""
    base = rows[0]
    lines = []
    for row in rows:
        ratio = statistics.median(a / b for a, b in zip(row.step, base.step, strict=True))
        whole = statistics.median(sum(t) for t in zip(row.step, row.optimizer, row.ema, strict=True))
        arithmetic = row.macs() / base.macs()
        seconds = statistics.median(row.step)
        pairs = settings.batch_size
        lines.append([
            row.title, row.text, spread(row.step), f"{ratio:.2f}", f"{arithmetic:.2f}", f"{ratio / arithmetic:.2f}",
            f"{1e3 * statistics.median(row.optimizer):.0f}", f"{1e3 * statistics.median(row.ema):.0f}",
            f"{pairs / whole:.1f}", f"{pairs * row.tokens() / seconds:,.0f}",
            f"{pairs * row.macs() / seconds / rate:.0%}", f"{row.memory / 2**30:.2f}" if row.memory else "-"])
    return markdown(["method", "text", "step, ms", "x open_clip", "arithmetic", "over arithmetic", "optimizer, ms",
                     "EMA update, ms", "pairs/s", "tokens/s", "MFU", "peak GiB"], lines)


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
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--parts", type=int, default=3, help="steps taken part by part; 0 leaves the second table out")
    parser.add_argument("--text-tokens", type=float, default=14.0, help="mean length of the captions")
    parser.add_argument("--text", nargs="+", choices=("cut", "padded"), default=["cut", "padded"])
    parser.add_argument("--methods", nargs="+", choices=ASKED, default=list(ASKED))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: seconds of all threads together, "
                        "for one thread on a machine that does other things")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    begun = time.perf_counter()
    console = Console(width=200)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{SIZES['half']}.json").write_text(json.dumps(HALF))
        open_clip.add_model_config(folder)
        settings = Settings(SIZES[args.size], device, args.precision, args.compile, args.batch_size, args.text_tokens)
        rows = [Row("open_clip", "padded", OpenClip(settings))]
        for text in args.text:
            for title in args.methods:
                name, *changes = ASKED[title]
                recipe = override(RECIPES[name], changes)
                rows.append(Row(title, text, Ours(settings, recipe, cut_text=text == "cut")))
    watch = Stopwatch(device, CLOCKS[args.clock])
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("steps", total=(args.warmup + args.rounds + args.parts) * len(rows))
        for number in range(args.warmup + args.rounds):
            if number == args.warmup:
                for row in rows:
                    row.forget()
            for row in rows:
                row.take(watch, number)
                progress.advance(task)
        rate = peak_rate(settings, rows[0].competitor.plan.shape, watch.clock)
        for row in rows:
            table = (list(row.step), list(row.optimizer), list(row.ema))
            row.memory = peak_of(row, device)
            row.step, row.optimizer, row.ema = table
            row.parts = parts_of(row, args.parts, watch.clock) if args.parts else {}
            progress.advance(task, args.parts)
    print_results(console, rows, settings, rate, args.rounds, time.perf_counter() - begun)


def print_results(
    console: Console, rows: list[Row], settings: Settings, rate: float, rounds: int, seconds: float
) -> None:
    """Print both tables and what they depend on."""
    shape = rows[0].competitor.plan.shape
    where = (torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda"
             else f"{torch.get_num_threads()} threads of {processor()}")
    lengths = torch.cat([batch.tokens.argmax(dim=1) + 1 for batch in rows[0].competitor.batches]).float()
    longest = [int((batch.tokens.argmax(dim=1) + 1).max()) for batch in rows[0].competitor.batches]
    text = (
        f"{settings.model} ({shape.width} and {shape.text_width} wide, {shape.layers} layers, 197 tokens), "
        f"{settings.precision}, batch {settings.batch_size}, {'compiled' if settings.compiled else 'eager'}, on {where}; "
        f"matrix products reach {2 * rate / 1e9:,.0f} GFLOP/s there. Captions of {lengths.mean():.1f} tokens in the "
        f"mean, the longest of each batch {', '.join(map(str, longest))}. Medians of {rounds} steps taken in turns, "
        f"first to third quartile; {seconds / 60:.1f} minutes in all. attentive-clip {aclip.__version__}, torch "
        f"{torch.__version__}, open_clip {open_clip.__version__}, Python {platform.python_version()}.")
    for block in (text, times_table(rows, settings, rate), parts_table(rows)):
        console.print(block, "", sep="\n", markup=False, highlight=False, soft_wrap=True)


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
             ] if info.exists() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
