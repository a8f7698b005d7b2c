"""How fast training and encoding are on this machine, on synthetic data; steps are timed in turns."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aclip import models
from aclip.data.progress import progress
from aclip.data.views import Crop
from aclip.devices import choose_device, in_units, peak_memory, synchronize, versions
from aclip.errors import ConfigError, OutOfMemoryError
from aclip.masking import MaskingContext, UniformMasking
from aclip.plan import Plan
from aclip.recipes import configure, find_recipe
from aclip.structs import Batch, ViewBatch
from aclip.trainer import Trainer, build_trainer

T = TypeVar("T")
LENGTH_SPREAD = 0.5
"""Standard deviation of the logarithm of a caption's length, see `caption_lengths`."""
DIFFERENT_CROPS = 64  # in a synthetic batch: cropping thousands would take longer than timing them
SCHEDULE = 1000  # steps of the schedule that timed steps begin
WARMUP = 2  # rounds that are not counted
CAPTIONS = ("a photo of a dog", "two people walk along a beach at sunset", "red apple",
            "a drawing of a lighthouse on a cliff, waves below, seagulls in the sky")


def bench_step(
    *,
    recipe: str = "a-clip-muon",
    model: str = "vit-tiny",
    image_size: int | str | None = None,
    batch_sizes: tuple[int, ...] = (),
    pairs: int | None = None,
    epochs: float = 25.0,
    text_tokens: float = 14.0,
    rounds: int = 5,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    device: str = "auto",
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Time whole optimizer steps at several batch sizes, in turns, on crops of noise and synthetic captions.

    Reading and decoding images is not included: it goes on beside the steps, and `data_wait` in a run's metrics.jsonl
    is the fraction of time for which the steps waited for it.

    Args:
        recipe: see `aclip recipes`.
        model: as for `aclip train`.
        image_size: side of the input in pixels, or HEIGHTxWIDTH (default: the model's own).
        batch_sizes: pairs in a step (default: 16 64 256, on a GPU 64 256 1024).
        pairs: size of your data, to say how long a run takes.
        epochs: of that run.
        text_tokens: mean caption length in tokens, SOT and EOT included.
        rounds: timed steps of each batch size.
        precision: of the towers (default: as `aclip train` chooses).
        device: auto, cpu, cuda, cuda:1, mps.
        changes: path -> value, fields of the recipe to change.
    """
    where = choose_device(device)
    sizes = sorted(set(batch_sizes or ((16, 64, 256) if where.type == "cpu" else (64, 256, 1024))))
    if sizes[0] < 2 or rounds < 1 or not text_tokens >= 3:
        raise ConfigError("batch_sizes are 2 or more, rounds 1 or more, text_tokens 3 or more")
    config = configure(recipe=find_recipe(recipe, changes), model=model, image_size=image_size, data=("synthetic",),
                       batch_size=sizes[0], samples=sizes[0] * SCHEDULE, precision=precision)
    trainer = build_trainer(config, sizes[0] * SCHEDULE, where)
    speeds = _time_batch_sizes(trainer, sizes, text_tokens, rounds)
    for speed in speeds:
        speed["hours"] = pairs * epochs / speed["pairs_per_second"] / 3600 if pairs else None
    best = max(speeds, key=lambda one: float(one["pairs_per_second"]), default=None)
    result: dict[str, Any] = {
        "recipe": recipe, "model": model, "precision": trainer.config.precision,
        "versions": versions(where), "speeds": speeds, "best_batch_size": best["batch_size"] if best else None}
    titles = ("batch", "ms a step", "quartiles", "pairs/s", "peak memory", *(["hours"] if pairs else []))
    rows = [(str(one["batch_size"]), f"{1e3 * one['seconds']:,.0f}",
             f"{1e3 * one['quartiles'][0]:,.0f} to {1e3 * one['quartiles'][1]:,.0f}",
             f"{one['pairs_per_second']:,.1f}", in_units(one["peak_memory"]),
             *([f"{one['hours']:,.1f}"] if pairs else [])) for one in speeds]
    hours = f"; hours for {pairs:,} pairs x {epochs:g} epochs, if reading keeps up" if pairs else ""
    return _show(result, titles, rows,
                 f"{recipe} on {model}, {trainer.config.precision} on {result['versions']['device']}, captions of "
                 f"{text_tokens:g} tokens on average; median of {rounds} steps{hours}",
                 *([f"most pairs a second: batch {best['batch_size']}; a larger batch also contrasts each pair with "
                    "more others"] if best else []))


def _show(
    result: dict[str, Any], titles: Sequence[str], rows: Sequence[Sequence[str]], *sentences: str
) -> dict[str, Any]:
    """Print a table and sentences; return the numbers."""
    console, table = Console(highlight=False), Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for sentence in sentences:
        console.print(sentence, markup=False, soft_wrap=True)
    return result


def _time_batch_sizes(trainer: Trainer, sizes: Sequence[int], text_tokens: float, rounds: int) -> list[dict[str, Any]]:
    """Time steps at every batch size that fits, in turns; sizes ascend, and the first that does not fit ends them."""
    device = trainer.device
    steps: dict[int, Callable[[], object]] = {}
    memory: dict[int, int] = {}
    with progress("timing", len(sizes) * (2 * WARMUP + rounds), "steps") as advance:
        timed = partial(time_in_turns, device=device, advance=advance)
        for size in sizes:
            batch = synthetic_batch(trainer.method.plan, size, text_tokens=text_tokens).to(device)
            step = partial(trainer.train_step, batch)
            try:
                timed({size: step}, warmup=WARMUP - 1, rounds=1)
            except OutOfMemoryError:
                Console(stderr=True, highlight=False).print(f"batch {size} and larger do not fit into memory")
                break
            steps[size], memory[size] = step, peak_memory(device)
        times = timed(steps, warmup=WARMUP, rounds=rounds)
    speeds = []
    for size, seconds in times.items():
        found = summary(seconds)
        speeds.append({"batch_size": size, "seconds": found["median"],
                       "quartiles": (found["first_quartile"], found["third_quartile"]),
                       "pairs_per_second": size / found["median"], "peak_memory": memory[size]})
    return speeds


@dataclass(frozen=True)
class Encoding:
    """A call that is timed: it encodes `batch_size` images or texts.

    Attributes:
        what: "images" or "texts". keep: fraction of the patches kept; 1 for texts.
        tokens: in the blocks of the tower, for each. batch_size: how many a call encodes.
    """

    what: str
    keep: float
    tokens: int
    batch_size: int


def bench_model(
    model: str,
    *,
    keep: tuple[float, ...] = (1.0, 0.5, 0.25),
    batch_sizes: tuple[int, ...] = (32,),
    rounds: int = 10,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: str = "auto",
) -> dict[str, Any]:
    """Time the encoding of images, whole and with patches dropped, and of texts, in turns.

    Patches are dropped at random before they are embedded, as in a masked pass of training. Choosing them by attention
    would take a pass over the whole image first, which is not included.

    Args:
        model: a run, a model's folder, or a name (weights do not matter for speed).
        keep: fractions of the patches.
        batch_sizes: images or texts in a call.
        rounds: timed calls of each.
        precision: of the towers.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    if min((*batch_sizes, rounds)) < 1 or not all(0 < fraction <= 1 for fraction in keep):
        raise ConfigError("batch_sizes and rounds are 1 or more, and keep takes fractions of the patches, above 0 and "
                          "at most 1")
    where = choose_device(device)
    loaded = models.load(model).to(where)
    calls = _encodings(loaded, sorted(set(keep), reverse=True), sorted(set(batch_sizes)), where)

    def under_precision(call: Callable[[], object]) -> None:
        with torch.inference_mode(), torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
            call()

    steps = {encoding: partial(under_precision, call) for encoding, call in calls.items()}
    with progress("timing", len(steps) * (WARMUP + rounds), "calls") as advance:
        times = time_in_turns(steps, warmup=WARMUP, rounds=rounds, device=where, advance=advance)
    rows: list[dict[str, Any]] = []
    whole: dict[tuple[str, int], float] = {}
    for encoding, measured in times.items():
        seconds = summary(measured)
        first = whole.setdefault((encoding.what, encoding.batch_size), seconds["median"])
        rows.append(asdict(encoding) | {
            "per_second": encoding.batch_size / seconds["median"],
            "per_second_quartiles": [encoding.batch_size / seconds["third_quartile"],
                                     encoding.batch_size / seconds["first_quartile"]],
            "relative": first / seconds["median"]})
    result = {"model": model, "device": versions(where)["device"], "threads": torch.get_num_threads(),
              "precision": precision, "torch": torch.__version__, "rounds": rounds, "speeds": rows}
    shown = []
    for row in rows:
        low, high = row["per_second_quartiles"]
        shown.append((row["what"], f"{row['keep']:.0%}" if row["what"] == "images" else "", str(row["tokens"]),
                      str(row["batch_size"]), f"{row['per_second']:,.1f}", f"{low:,.1f} to {high:,.1f}",
                      f"{row['relative']:.2f} x"))
    return _show(result, ("", "patches kept", "tokens", "batch", "a second", "quartiles", "speed-up"), shown,
                 f"{model}, {precision} on {result['device']}, median of {rounds} calls")


def _encodings(
    model: models.LoadedModel, keep: Sequence[float], batch_sizes: Sequence[int], device: torch.device
) -> dict[Encoding, Callable[[], object]]:
    """Return what encodes each kind of batch once; texts at full context, and cut where the tower allows it."""
    visual = models.visual_of(model.model)
    grid = models.vit_of(visual).grid_size
    calls: dict[Encoding, Callable[[], object]] = {}
    for batch_size in batch_sizes:
        pixels = torch.rand(batch_size, 3, *model.image_size, device=device)
        context = MaskingContext(batch_size, grid, device)
        for fraction in keep:
            kept = UniformMasking(mask_ratio=1 - fraction)(context) if fraction < 1 else None
            with torch.inference_mode():
                tokens = models.encode_image(visual, pixels, kept).num_tokens
            calls[Encoding("images", fraction, tokens, batch_size)] = partial(models.encode_image, visual, pixels, kept)
        if model.has_text:
            whole = model.tokenizer([CAPTIONS[i % len(CAPTIONS)] for i in range(max(batch_size, 4))])[-batch_size:]
            for ids in [whole, models.cut_after_eot(whole)] if models.can_cut(model.model) else [whole]:
                calls[Encoding("texts", 1.0, ids.shape[1], batch_size)] = partial(
                    models.encode_text, model.model, ids.to(device))
    return calls


def time_in_turns(
    steps: Mapping[T, Callable[[], object]], *, warmup: int, rounds: int, device: torch.device,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[T, list[float]]:
    """Return seconds of every step, taken in turns A B C, A B C, ..., so that whatever else the machine does meets all.

    Args:
        steps: name -> does one step.
        warmup: rounds that are not counted. rounds: those that are.
        device: waited for before and after each step.
        advance: called with 1 after every step.
    """
    seconds: dict[T, list[float]] = {name: [] for name in steps}
    for number in range(warmup + rounds):
        for name, step in steps.items():
            synchronize(device)
            begun = time.perf_counter()
            step()
            synchronize(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - begun)
            advance(1)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Return median and quartiles (inclusive method) of step times, and how many there are."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": median, "first_quartile": low, "third_quartile": high, "rounds": len(seconds)}


def caption_lengths(count: int, mean: float, longest: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """Return lengths of captions in tokens, SOT and EOT included: a log-normal distribution, cut off.

        length = round(exp(N(ln mean - s^2 / 2, s^2))), s = `LENGTH_SPREAD`, between 3 and `longest`

    With a mean of 14 tokens, half lie between 9 and 17 and one in a hundred is longer than 39.
    """
    logarithms = torch.randn(count, generator=generator) * LENGTH_SPREAD + (math.log(mean) - LENGTH_SPREAD**2 / 2)
    return logarithms.exp().round().long().clamp(3, longest)


def synthetic_tokens(lengths: Int[Tensor, " B"], width: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Return (B, width) int64 tokens of captions of these lengths: random words, EOT (the highest id), zeros."""
    words = torch.randint(1, vocabulary - 2, (len(lengths), width), generator=generator)
    place = torch.arange(width)
    eot = place == lengths[:, None] - 1
    return torch.where(eot, vocabulary - 1, words).masked_fill(place >= lengths[:, None], 0)


def synthetic_batch(
    plan: Plan, batch_size: int, *, text_tokens: float = 14.0, cut_text: bool = True, augmented: bool = True,
    seed: int = 0,
) -> Batch:
    """Return a batch for a plan, on the CPU: the recipe's own crops of one noise image, repeated after
    `DIFFERENT_CROPS`, and synthetic captions.

    Args:
        text_tokens: mean length of the captions, see `caption_lengths`.
        cut_text: whether text is cut after its longest caption, where the tower allows it, or padded to full context.
        augmented: whether the recipe's colour augmentation is drawn, to be applied within the step.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = plan.shape
    lengths = caption_lengths(batch_size, text_tokens, shape.context_length, generator)
    width = int(lengths.max()) if cut_text and shape.text_cut else shape.context_length
    image = torch.randint(0, 256, (240, 320, 3), dtype=torch.uint8, generator=generator).numpy()
    drawn = [plan.pipeline(image, seed=seed, epoch=0, sample=i, sizes=plan.view_sizes)
             for i in range(min(batch_size, DIFFERENT_CROPS))]
    crops = [drawn[i % len(drawn)] for i in range(batch_size)]
    return Batch(
        views={name: _stacked([crop[name] for crop in crops], augmented) for name in plan.view_sizes},
        tokens=synthetic_tokens(lengths, width, shape.vocab_size, generator),
        caption_ids=torch.arange(batch_size),
        seeds=torch.randint(0, 2**62, (batch_size,), generator=generator),
    )


def _stacked(crops: list[Crop], augmented: bool) -> ViewBatch:
    drawn = [crop.augmentation for crop in crops if crop.augmentation is not None]
    return ViewBatch(
        pixels=torch.from_numpy(np.stack([crop.pixels for crop in crops])),
        boxes=torch.tensor([crop.box for crop in crops], dtype=torch.float32),
        flipped=torch.tensor([crop.flipped for crop in crops]),
        augmentation=torch.from_numpy(np.stack(drawn)) if augmented and drawn else None,
    )
