"""`aclip data pack`: write a source as shards of pictures that are no larger than training needs."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  aclip data pack pairs.csv --output shards
  aclip data pack 'raw/{0000..0099}.tar' --output small --side 512 --workers 16
  aclip data doctor raw.tar --fix skip.txt && aclip data pack raw.tar --leave-out skip.txt --output clean
"""


def register(actions: Any) -> None:
    """Add the action to `aclip data`."""
    parser = actions.add_parser(
        "pack", help="write a source as shards of smaller pictures", epilog=EXAMPLES,
        description="Write any source as WebDataset shards whose pictures are shrunk to what training needs, with\n"
                    "their captions beside them. Bad samples are left out and named in skipped.jsonl. An interrupted\n"
                    "call is continued by the next. The source is never changed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="pairs of every kind that `aclip train --data` takes")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the shards go")
    parser.add_argument("--side", type=int, default=336, metavar="PIXELS",
                        help="shorter side of a picture at most; 1.5 times the model's input leaves crops their detail "
                             "(default: %(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG, 1 to 95 (default: %(default)s)")
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N",
                        help="samples in a shard (default: %(default)s)")
    parser.add_argument("--leave-out", type=Path, metavar="FILE",
                        help="names of samples to leave out, one a line, as `aclip data doctor --fix` writes them")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Pack with a progress bar, and say what was written."""
    from rich.console import Console

    from aclip.cli.bars import counting_bar
    from aclip.cli.compose import open_by_spec
    from aclip.data.pack import SKIPPED, PackSettings, pack
    from aclip.data.workers import usable_cores
    from aclip.errors import ConfigError

    settings = PackSettings(args.side, args.quality, args.shard_size)
    names: frozenset[str] = frozenset()
    if args.leave_out is not None:
        try:
            names = frozenset(args.leave_out.read_text("utf-8", errors="surrogateescape").splitlines())
        except OSError as error:
            raise ConfigError(f"--leave-out {args.leave_out} cannot be read: {error.strerror}") from error
    source = open_by_spec(args.source)
    workers = usable_cores() if args.workers is None else args.workers
    with counting_bar() as bar:
        task = bar.add_task("packing", total=len(source))
        packed = pack(source, args.output, settings, leave_out=names, workers=workers,
                      progress=partial(bar.advance, task))
    console = Console(highlight=False)
    if packed.skipped:
        console.print(f"{packed.skipped:,} bad samples are not in it: {args.output / SKIPPED}", markup=False,
                      soft_wrap=True)
    console.print(f"done. {packed.samples:,} of {len(source):,} samples, {packed.bytes / 1e6:,.1f} MB: {args.output}",
                  markup=False, soft_wrap=True)
