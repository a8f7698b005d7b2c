"""Sources of image-text pairs; `open_source` finds the reader for what the user named."""

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

from aclip.data.sources.base import PackedStrings, RawSample, Source
from aclip.data.sources.folder import FolderSource, holds_pictures
from aclip.data.sources.part import Part, split_slice
from aclip.data.sources.shards import ShardSource, expand_shards
from aclip.data.sources.table import Columns, TableSource
from aclip.errors import ConfigError, DataError, unknown_name

__all__ = [
    "READERS",
    "Columns",
    "FolderSource",
    "PackedStrings",
    "Part",
    "RawSample",
    "Reader",
    "ShardSource",
    "Source",
    "TableSource",
    "open_source",
    "split_slice",
]


@dataclass(frozen=True)
class Reader:
    """One kind of source.

    Attributes:
        about: what it reads, for error messages and help.
        accepts: whether a spec is of this kind; decided by names, nothing is read.
        open: opens the source.
    """

    about: str
    accepts: Callable[[str], bool]
    open: Callable[[str], Source]


def open_source(spec: str) -> Source:
    """Open the source that `spec` names with the first of `READERS` that accepts it.

    A slice at the end, as in `pairs.csv[:1000]`, takes a part of it (`Part`).

    Raises:
        DataError: there is nothing of that name, or no reader for it; what is accepted.
        ConfigError: columns of a table that do not exist or cannot be guessed.
    """
    spec, part = split_slice(os.path.expanduser(spec))
    if part is not None:
        return Part(open_source(spec), *part)
    for reader in READERS.values():
        if reader.accepts(spec):
            return reader.open(spec)
    accepted = "; ".join(reader.about for reader in READERS.values())
    problem = "is none of what can be read" if os.path.exists(spec) else "does not exist"
    raise DataError(f"'{spec}' {problem}: give {accepted}")


def _is_shards(spec: str) -> bool:
    if os.path.isdir(spec):
        return bool(_tars_in(spec)) and not holds_pictures(Path(spec))
    return spec.endswith((".tar", ".tar.gz", ".tgz")) and (os.path.isfile(spec) or _is_pattern(spec))


def _open_shards(spec: str) -> Source:
    return ShardSource(spec, _tars_in(spec) if os.path.isdir(spec) else expand_shards(spec))


def _tars_in(folder: str) -> list[Path]:
    return [Path(path) for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))]


def _is_pattern(spec: str) -> bool:
    return "{" in spec or glob.has_magic(spec)


def _is_table(spec: str) -> bool:
    path, _, _ = spec.partition("?")
    return path.lower().endswith((".csv", ".tsv", ".tab")) and os.path.isfile(path)


def _open_table(spec: str) -> Source:
    """Open `pairs.csv` or `pairs.csv?image=photo&caption=alt,title&tags=words&label=kind`."""
    path, _, query = spec.partition("?")
    if not query:
        return TableSource(Path(path))
    known = ("image", "caption", "tags", "label")
    chosen = {name: values[-1] for name, values in parse_qs(query).items()}
    for name in chosen:
        if name not in known:
            raise ConfigError(f"'{spec}': {unknown_name('field', name, known)}")
    if "image" not in chosen or "caption" not in chosen:
        raise ConfigError(f"'{spec}': name both columns, as in '{path}?image=COLUMN&caption=COLUMN'")
    captions = tuple(chosen["caption"].split(","))
    return TableSource(
        Path(path), Columns(chosen["image"], captions, chosen.get("tags"), chosen.get("label"))
    )


READERS: dict[str, Reader] = {
    "shards": Reader(
        "WebDataset shards (a .tar file, a pattern such as 'shards/{0000..0012}.tar' or 'shards/*.tar', "
        "or a folder of .tar files)",
        _is_shards,
        _open_shards,
    ),
    "table": Reader(
        "a table (.csv or .tsv with a column of image paths and one of captions)",
        _is_table,
        _open_table,
    ),
    "folder": Reader(
        "a folder of pictures with .txt captions beside them",
        os.path.isdir,
        lambda spec: FolderSource(Path(spec)),
    ),
}
