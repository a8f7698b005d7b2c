"""`aclip bench model`: images and texts a second that a model encodes, whole and with patches dropped."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from aclip.models import LoadedModel

EXAMPLES = """\
examples:
  aclip bench model ViT-B-16
  aclip bench model runs/first --keep 1 0.5 0.25 --batch-sizes 1 32
  aclip bench model ViT-B-32 --device cuda --precision bf16 --json > speed.json

Patches are dropped at random and before they are embedded, as a masked pass of training does. Choosing them by
attention would take a pass over the whole picture first, which is not in these times.
"""

CAPTIONS = ("a photo of a dog", "two people walk along a beach at sunset", "red apple",
            "a drawing of a lighthouse on a cliff, waves below, seagulls in the sky")


@dataclass(frozen=True)
class Work:
    """One thing that is timed: a call that encodes `batch_size` pictures or texts.

    Attributes:
        what: "images" or "texts". keep: share of the patches that are kept; 1 for texts.
        tokens: what the tower's blocks see of each. batch_size: how many a call encodes.
    """

    what: str
    keep: float
    tokens: int
    batch_size: int

    @property
    def label(self) -> str:
        """A name that no other work of the same measurement has."""
        return f"{self.what} keep {self.keep:g} tokens {self.tokens} batch {self.batch_size}"


def register(actions: Any) -> None:
    """Add the action to `aclip bench`."""
    parser = actions.add_parser(
        "model", help="images and texts a second of encoding", epilog=EXAMPLES,
        description="Time the encoding of images, whole and with patches dropped, and of texts, in turns.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a model's folder, or a name (weights do not "
                        "matter for speed)")
    parser.add_argument("--keep", nargs="+", type=float, default=[1.0, 0.5, 0.25], metavar="SHARE",
                        help="of the patches, 0 < share <= 1 (default: 1 0.5 0.25)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32], metavar="N", help="(default: 32)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed turns of each (default: 10)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON in place of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Time, and print a table or JSON."""
    import json
    import sys

    from rich.console import Console

    from aclip.engine.run_config import choose_device
    from aclip.errors import ConfigError
    from aclip.models import load

    for name in ("batch_sizes", "rounds"):
        if min([getattr(args, name)] if name == "rounds" else getattr(args, name)) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} takes numbers of 1 or more")
    if not all(0 < share <= 1 for share in args.keep):
        raise ConfigError("--keep takes shares of the patches, 0 < share <= 1")
    device = choose_device(args.device)
    model = load(args.model).to(device)
    works = encodings(model, sorted(set(args.keep), reverse=True), sorted(set(args.batch_sizes)), device)
    result = measure(args.model, works, rounds=args.rounds, precision=args.precision, device=device)
    if args.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        print_speeds(Console(highlight=False), result)


def encodings(
    model: LoadedModel, keep: Sequence[float], batch_sizes: Sequence[int], device: torch.device
) -> dict[Work, Callable[[], object]]:
    """Return what encodes each kind of batch once.

    Texts are encoded at full context and, where the tower allows, cut after the longest of a few captions.
    """
    import torch

    from aclip import models
    from aclip.masking import MaskingContext, UniformMasking
    from aclip.models.vision import vit_of

    visual = models.visual_of(model.model)
    height, width = model.image_size
    grid = vit_of(visual).grid_size
    works: dict[Work, Callable[[], object]] = {}
    for batch_size in batch_sizes:
        pixels = torch.rand(batch_size, 3, height, width, device=device)
        for share in keep:
            kept = None
            if share < 1:
                mask = UniformMasking(mask_ratio=1 - share)
                kept = mask(MaskingContext(batch_size, grid, device))
            with torch.inference_mode():
                tokens = models.encode_image(visual, pixels, kept).num_tokens
            works[Work("images", share, tokens, batch_size)] = _image_call(visual, pixels, kept)
        if model.has_text:
            texts = [CAPTIONS[i % len(CAPTIONS)] for i in range(max(batch_size, len(CAPTIONS)))]
            whole = model.tokenizer(texts)[-batch_size:]
            lengths = [whole, models.cut_after_eot(whole)] if models.can_cut(model.model) else [whole]
            works |= {Work("texts", 1.0, ids.shape[1], batch_size): _text_call(model.model, ids.to(device))
                      for ids in lengths}
    return works


def measure(
    name: str, works: Mapping[Work, Callable[[], object]], *, rounds: int, precision: str, device: torch.device
) -> dict[str, Any]:
    """Return the speed of every work, timed in turns under a progress bar.

    Returns:
        JSON values: what was measured on what, and for each work its median rate, the rates at the quartiles of
        its times, and how many times as fast as the whole picture, or the whole context, it is.
    """
    import torch

    from aclip.cli.bars import counting_bar
    from aclip.engine.timing import summary, time_in_turns

    warmup = 2
    calls = {work.label: under_precision(call, precision, device) for work, call in works.items()}
    with counting_bar("turns") as bar:
        task = bar.add_task("timing", total=len(calls) * (warmup + rounds))
        times = time_in_turns(calls, warmup=warmup, rounds=rounds, device=device, advance=lambda: bar.advance(task))
    rows = []
    whole: dict[tuple[str, int], float] = {}
    for work in works:
        seconds = summary(times[work.label])
        slowest = whole.setdefault((work.what, work.batch_size), seconds["median"])
        rows.append(asdict(work) | {
            "per_second": work.batch_size / seconds["median"],
            "per_second_quartiles": [work.batch_size / seconds["third_quartile"],
                                     work.batch_size / seconds["first_quartile"]],
            "relative": slowest / seconds["median"]})
    return {"model": name, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "threads": torch.get_num_threads(), "precision": precision, "torch": torch.__version__,
            "rounds": rounds, "speeds": rows}


def under_precision(call: Callable[[], object], precision: str, device: torch.device) -> Callable[[], object]:
    """Return the call without gradient and under autocast where it is asked for."""
    import torch

    def under() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            call()

    return under


def print_speeds(console: Any, result: Mapping[str, Any]) -> None:
    """Print the speeds as a table."""
    from rich.table import Table

    table = Table("", box=None, pad_edge=False)
    for title in ("patches kept", "tokens", "batch", "a second", "quartiles", "to the first"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result["speeds"]:
        low, high = row["per_second_quartiles"]
        kept = f"{row['keep']:.0%}" if row["what"] == "images" else ""
        table.add_row(row["what"], kept, str(row["tokens"]), str(row["batch_size"]), f"{row['per_second']:,.1f}",
                      f"{low:,.1f} to {high:,.1f}", f"{row['relative']:.2f} x")
    console.print(table)
    console.print(f"{result['model']}, {result['precision']} on {result['device']}, {result['threads']} threads, "
                  f"median of {result['rounds']} turns", markup=False, soft_wrap=True)


def _image_call(visual: Any, pixels: torch.Tensor, kept: torch.Tensor | None) -> Callable[[], object]:
    from aclip.models import encode_image

    return lambda: encode_image(visual, pixels, kept)


def _text_call(model: Any, tokens: torch.Tensor) -> Callable[[], object]:
    from aclip.models import encode_text

    return lambda: encode_text(model, tokens)
