"""What the benchmarks of masks begin with: a finished run, whose encoders score, and the pictures that they score."""

import argparse
from pathlib import Path

from aclip import data, models
from aclip.data.fetch import resolve_spec


def options(about: str | None, pictures: str) -> argparse.ArgumentParser:
    """Return the options that all of them have: the run, and --data, which is `pictures` by default."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", default=pictures)
    return parser


def opened(args: argparse.Namespace) -> tuple[models.LoadedModel, data.Source]:
    """Return the trained model of the run, and the source of the pictures."""
    return models.load(args.run), data.open_source(resolve_spec(args.data))
