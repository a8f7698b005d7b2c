"""`aclip data doctor`: examine a source before a training run does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.console import Console

    from aclip.data import CaptionTokenizer
    from aclip.data.doctor import Cleaned, Examination, Limits

EXAMPLES = """\
examples:
  aclip data doctor pairs.csv
  aclip data doctor emoji:train --against emoji:val_both emoji:val_vendor --output checks/emoji
  aclip data doctor pictures/ --model ViT-B-16 --fix clean.jsonl
  aclip data doctor 'shards/{0000..0012}.tar' --fix skip.txt     names for `aclip data pack --leave-out`
"""

_LONGER = 4  # times the model's context that captions are counted to


def register(actions: Any) -> None:
    """Add the action to `aclip data`."""
    parser = actions.add_parser(
        "doctor", help="look for what is wrong with a source", epilog=EXAMPLES,
        description="Read every sample of a source once and say what was found: pictures that cannot be read, copies,\n"
                    "pictures shared with an evaluation set, captions missing, repeated or cut. Prints a table and\n"
                    "writes a page with examples and advice. The source is never changed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="pairs of every kind that `aclip train --data` takes")
    parser.add_argument("--against", nargs="+", default=[], metavar="SOURCE",
                        help="evaluation sets that should share no picture with SOURCE")
    parser.add_argument("--model", default="vit-tiny", metavar="NAME",
                        help="the model that the data is for: its input size and context length (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("data-doctor"), metavar="FOLDER",
                        help="where data.html and data.json go (default: %(default)s)")
    parser.add_argument("--fix", type=Path, metavar="FILE",
                        help="also write what is left without bad samples, copies and shared pictures: a manifest "
                             "(.jsonl, .csv, .tsv), or the names to leave out (.txt)")
    parser.add_argument("--workers", type=int, metavar="N", help="reading processes (default: one a core)")
    parser.add_argument("--limit", type=int, metavar="N",
                        help="examine N samples of each source at most, drawn at random (default: all)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Examine, print the findings, write the page and, if asked to, the clean list."""
    from functools import partial

    from rich.console import Console

    from aclip.cli.bars import counting_bar
    from aclip.cli.compose import open_by_spec
    from aclip.data.doctor import check_fix, examine, write_clean
    from aclip.data.workers import usable_cores
    from aclip.errors import ConfigError
    from aclip.report.data_page import write_data_page

    for name, least in (("workers", 0), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: give {least} or more")
    if args.fix is not None and args.limit is not None:
        raise ConfigError("--fix needs to see the whole source: leave out --limit")
    limits, tokenizer = needs_of(args.model)
    source, *against = (open_by_spec(spec) for spec in (args.source, *args.against))
    if args.fix is not None:
        check_fix(args.fix, source)
    args.output.mkdir(parents=True, exist_ok=True)
    workers = usable_cores() if args.workers is None else args.workers
    total = sum(min(len(one), args.limit or len(one)) for one in (source, *against))
    with counting_bar() as bar:
        task = bar.add_task("examining", total=total)
        examined = examine(source, against, limits=limits, tokenizer=tokenizer, workers=workers,
                           limit=args.limit, scratch=args.output, progress=partial(bar.advance, task))
    page = write_data_page(examined, args.output)
    cleaned = None
    if args.fix is not None:
        with counting_bar() as bar:
            task = bar.add_task("cleaning", total=len(source))
            cleaned = write_clean(examined, args.fix, partial(bar.advance, task))
    console = Console(highlight=False)
    print_findings(console, examined)
    if cleaned is not None:
        print_cleaned(console, cleaned, args.source)
    console.print(f"done. page: {page}", markup=False, soft_wrap=True)


def needs_of(model: str) -> tuple[Limits, CaptionTokenizer | None]:
    """Return what a model takes, and a tokenizer that counts captions beyond its context; none without text."""
    from functools import partial

    from aclip.data import CaptionTokenizer
    from aclip.data.doctor import Limits
    from aclip.models import model_config, shape_of, tokenizer_of

    config = model_config(model)
    size = shape_of(config).image_size
    if not config.get("text_cfg"):
        return Limits(model, size, None), None
    tokenizer = tokenizer_of(model)
    context = CaptionTokenizer(tokenizer).context_length
    longer = partial(cast(Any, tokenizer), context_length=_LONGER * context)
    return Limits(model, size, context), CaptionTokenizer(longer)


def print_findings(console: Console, examined: Examination) -> None:
    """Print a line for each finding."""
    from rich.markup import escape
    from rich.table import Table

    from aclip.report.data_page import usable

    source = examined.measured[0]
    console.print(f"{source.source.name}: {len(source.samples):,} of {len(source.source):,} samples examined, "
                  f"{usable(examined):,} usable, {len(source.captions):,} captions", markup=False, soft_wrap=True)
    if not examined.findings:
        console.print("nothing to complain about")
        return
    # Title and advice share a column, which leaves both room to be read at 80 columns.
    table = Table("", box=None, pad_edge=False)
    for title in ("number", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("finding, and advice")
    colours = {"error": "red", "warning": "yellow", "note": "dim"}
    for finding in examined.findings:
        table.add_row(f"[{colours[finding.severity]}]{finding.severity}", f"{finding.count:,}", f"{finding.share:.1%}",
                      f"[bold]{escape(finding.title)}[/]\n{escape(finding.advice)}")
    console.print(table)


def print_cleaned(console: Console, cleaned: Cleaned, source: str) -> None:
    """Say what a clean list keeps, and why the others are left out."""
    from aclip.data.doctor.clean import SKIP_LIST

    reasons = "; ".join(f"{count:,} {reason}" for reason, count in cleaned.left_out.items()) or "nothing"
    console.print(f"{cleaned.path}: {cleaned.kept:,} samples are kept, left out: {reasons}", markup=False,
                  soft_wrap=True)
    if cleaned.path.suffix.lower() == SKIP_LIST:
        console.print(f"next: aclip data pack '{source}' --leave-out {cleaned.path} --output FOLDER", markup=False,
                      soft_wrap=True)
