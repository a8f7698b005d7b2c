"""Sources of image-text pairs; `open_source` finds the reader for what the user named."""

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

from aclip.data.sources.base import Grouped, PackedStrings, RawSample, Source
from aclip.data.sources.folder import FolderSource, holds_pictures
from aclip.data.sources.json_files import CocoSource, JsonSource, open_json
from aclip.data.sources.manifest import Columns, ManifestSource
from aclip.data.sources.parquet import EmbeddedPictures, open_parquet
from aclip.data.sources.part import Part, split_slice
from aclip.data.sources.shards import ShardSource, expand_shards
from aclip.data.sources.table import TableSource
from aclip.errors import ConfigError, DataError, unknown_name

__all__ = [
    "READERS",
    "CocoSource",
    "Columns",
    "EmbeddedPictures",
    "FolderSource",
    "Grouped",
    "JsonSource",
    "ManifestSource",
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


def _split_query(spec: str) -> tuple[str, str]:
    """Return a specification without its `?name=value&...`, and that; a bare `?` is a wildcard."""
    match = _QUERY.fullmatch(spec)
    return (match[1], match[2]) if match else (spec, "")


def _options(spec: str, *known: str) -> dict[str, str]:
    """Return what the query of `spec` says, by name.

    Raises:
        ConfigError: a name that is not `known`.
    """
    chosen = {name: values[-1] for name, values in parse_qs(_split_query(spec)[1]).items()}
    for name in chosen:
        if name not in known:
            raise ConfigError(f"'{spec}': {unknown_name('field', name, known)}")
    return chosen


def _columns(spec: str, *others: str) -> Columns | None:
    """Return the columns that the query of `spec` names, if it does; `others` are further options."""
    chosen = _options(spec, *_COLUMN_OPTIONS, *others)
    if not chosen.keys() - set(others):
        return None
    if "image" not in chosen or "caption" not in chosen:
        path = _split_query(spec)[0]
        raise ConfigError(f"'{spec}': name both columns, as in '{path}?image=COLUMN&caption=COLUMN'")
    return Columns(chosen["image"], tuple(chosen["caption"].split(",")), chosen.get("tags"), chosen.get("label"))


def _is_file(*endings: str) -> Callable[[str], bool]:
    def accepts(spec: str) -> bool:
        path = _split_query(spec)[0]
        return path.lower().endswith(endings) and os.path.isfile(path)

    return accepts


def _open_json(spec: str) -> Source:
    path, images = _split_query(spec)[0], _options(spec, *_COLUMN_OPTIONS, "images").get("images")
    return open_json(Path(path), _columns(spec, "images"), None if images is None else Path(images))


def _is_parquet(spec: str) -> bool:
    path = _split_query(spec)[0]
    if os.path.isdir(path):
        return bool(_parquet_in(path)) and not holds_pictures(Path(path))
    return path.endswith(".parquet") and (os.path.isfile(path) or _is_pattern(path))


def _open_parquet(spec: str) -> Source:
    path = _split_query(spec)[0]
    return open_parquet(path, _parquet_in(path) if os.path.isdir(path) else expand_shards(path), _columns(spec))


def _parquet_in(folder: str) -> list[Path]:
    return [Path(path) for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.parquet")))]


def _open_folder(spec: str) -> Source:
    """Open `pictures/` or `pictures/?templates=a photo of a {}.|a drawing of a {}.`."""
    templates = tuple(filter(None, _options(spec, "templates").get("templates", "").split("|")))
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"'{spec}': the template '{template}' has no {{}} for the folder's name")
    return FolderSource(Path(_split_query(spec)[0]), templates)


_QUERY = re.compile(r"(.+?)\?(\w+=.*)", re.DOTALL)
_COLUMN_OPTIONS = ("image", "caption", "tags", "label")


READERS: dict[str, Reader] = {
    "shards": Reader(
        "WebDataset shards (a .tar file, a pattern such as 'shards/{0000..0012}.tar' or 'shards/*.tar', "
        "or a folder of .tar files)",
        _is_shards,
        _open_shards,
    ),
    "table": Reader(
        "a table (.csv or .tsv with a column of image paths and one of captions)",
        _is_file(".csv", ".tsv", ".tab"),
        lambda spec: TableSource(Path(_split_query(spec)[0]), _columns(spec)),
    ),
    "json lines": Reader(
        "JSON lines (.jsonl with an image path and a caption, or several, in each object)",
        _is_file(".jsonl", ".ndjson"),
        lambda spec: JsonSource(Path(_split_query(spec)[0]), _columns(spec)),
    ),
    "json": Reader("a .json file (COCO captions, or a list of objects)", _is_file(".json"), _open_json),
    "parquet": Reader(
        "Parquet (a .parquet file, a pattern or a folder of them, with the pictures or their paths)",
        _is_parquet,
        _open_parquet,
    ),
    "folder": Reader(
        "a folder of pictures with .txt captions beside them, or of class folders",
        lambda spec: os.path.isdir(_split_query(spec)[0]),
        _open_folder,
    ),
}
