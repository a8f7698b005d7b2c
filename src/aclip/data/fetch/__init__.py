"""Data sets that can be fetched by name.

To add one, write a file with an object that has what `DataSet` asks for, and name it in the table.
"""

import os
from pathlib import Path
from typing import Protocol

from aclip.data.fetch import emoji, emoji_vendors
from aclip.data.fetch.cifar10 import Cifar10
from aclip.data.fetch.emoji import Emoji
from aclip.data.fetch.emoji_vendors import EmojiVendors
from aclip.data.fetch.icons import Icons
from aclip.data.fetch.progress import Progress, Silent
from aclip.data.fetch.shards import split_sizes
from aclip.data.fetch.tuxpaint import TuxPaint
from aclip.data.sources.part import split_slice
from aclip.errors import ConfigError, DataError, unknown_name

__all__ = ["DATASETS", "DataSet", "Progress", "default_root", "fetch", "resolve_spec", "split_sizes"]


class DataSet(Protocol):
    """A set of image-text pairs that the package clients alone can bring.

    Attributes:
        name: as on the command line; also the name of its folder.
        about: one line: what it is, how much, how large the download.
        licence: one line: under which licences its files stand.
    """

    @property
    def name(self) -> str: ...
    @property
    def about(self) -> str: ...
    @property
    def licence(self) -> str: ...

    def fetch(self, root: Path, progress: Progress) -> Path:
        """Bring the set into `root/NAME`, or go on with it, or check that it is there.

        Args:
            root: folder of all sets; shared downloads lie in `root/packages`.
            progress: told what is done.

        Returns:
            The folder of the set.
        """
        ...


DATASETS: dict[str, DataSet] = {
    one.name: one
    for one in (
        Emoji(counts=emoji.COUNTS),
        EmojiVendors(counts=emoji_vendors.COUNTS),
        Cifar10(),
        Icons(),
        TuxPaint(),
    )
}


def default_root() -> Path:
    """Return the folder of all data sets: `$ACLIP_DATA`, else `~/.cache/aclip/data`."""
    chosen = os.environ.get("ACLIP_DATA")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "aclip" / "data"


def fetch(name: str, root: Path | None = None, progress: Progress | None = None) -> Path:
    """Fetch a data set, unless it is there already.

    Args:
        name: a key of `DATASETS`.
        root: folder of all data sets; None takes `default_root()`.
        progress: told what is done; None tells nobody.

    Returns:
        The folder of the set.

    Raises:
        ConfigError: there is no such set.
        MissingDependencyError: a package or program that it needs is missing.
        DataError: the download failed, or `root` cannot be written.
    """
    if name not in DATASETS:
        raise ConfigError(unknown_name("data set", name, DATASETS))
    root = default_root() if root is None else root
    try:
        return DATASETS[name].fetch(root, Silent() if progress is None else progress)
    except OSError as error:
        raise DataError(
            f"the data set '{name}' cannot be written below {root}: {error.strerror or error}"
        ) from error


def resolve_spec(spec: str, root: Path | None = None) -> str:
    """Return what a source specification names, sets fetched by name included.

    Args:
        spec: "NAME:SPLIT" with a key of `DATASETS`, e.g. "emoji:train", or anything else; a slice at its end stays
            there.
        root: folder of all data sets; None takes `default_root()`.

    Returns:
        The folder of the split's shards; `spec` itself if it does not begin with the name of a set or is
        a path that exists.

    Raises:
        DataError: the set has not been fetched, or has no such split.
    """
    whole, part = split_slice(spec)
    if part is not None:
        return resolve_spec(whole, root) + spec.removeprefix(whole)
    name, _, split = spec.partition(":")
    if name not in DATASETS or Path(spec).exists():
        return spec
    folder = (default_root() if root is None else root) / name
    splits = split_sizes(folder)
    if not splits:
        raise DataError(f"the data set '{name}' is not in {folder}: `aclip data fetch {name}` brings it")
    if split not in splits:
        choices = ", ".join(f"{name}:{one}" for one in splits)
        raise DataError(f"'{spec}' names no split of the data set '{name}': there are {choices}")
    return str(folder / split)
