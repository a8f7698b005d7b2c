"""Sources of image-text pairs; `open_source` finds the reader for what the user named."""

import glob
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs

from aclip.data.sources.base import Grouped, PackedStrings, RawSample, Source
from aclip.data.sources.folder import FolderSource, holds_pictures, holds_texts
from aclip.data.sources.hugging_face import HuggingFaceSource, is_hugging_face
from aclip.data.sources.joined import Joined
from aclip.data.sources.json_files import CocoSource, JsonSource, KarpathySource, open_json
from aclip.data.sources.manifest import Columns, ManifestSource
from aclip.data.sources.parquet import EmbeddedPictures, open_parquet
from aclip.data.sources.part import Part, split_slice, take_part
from aclip.data.sources.remote import RemoteShardSource, expand_urls
from aclip.data.sources.shards import ShardSource, expand_pattern
from aclip.data.sources.slip import open_slip
from aclip.data.sources.table import TableSource, table_ending
from aclip.data.sources.torchvision_sets import PREFIX as TORCHVISION
from aclip.data.sources.torchvision_sets import TorchvisionSource
from aclip.errors import ConfigError, DataError, unknown_name

__all__ = [
    "READERS",
    "CocoSource",
    "Columns",
    "EmbeddedPictures",
    "FolderSource",
    "Grouped",
    "HuggingFaceSource",
    "Joined",
    "JsonSource",
    "KarpathySource",
    "ManifestSource",
    "PackedStrings",
    "Part",
    "RawSample",
    "Reader",
    "RemoteShardSource",
    "ShardSource",
    "Source",
    "TableSource",
    "TorchvisionSource",
    "open_source",
    "split_query",
    "split_slice",
]

_log = logging.getLogger(__name__)


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
        return take_part(open_source(spec), *part)
    for reader in READERS.values():
        if reader.accepts(spec):
            return reader.open(spec)
    path, query = split_query(spec)
    whole, part = split_slice(path)
    if query and part is not None:
        raise ConfigError(f"'{spec}': a part comes after the fields, as in '{whole}?{query}{path.removeprefix(whole)}'")
    if query and any(reader.accepts(path) for reader in READERS.values()):
        raise ConfigError(f"'{spec}': '{path}' takes no fields, and so no '{query.partition('=')[0]}'")
    accepted = "; ".join(reader.about for reader in READERS.values())
    if "://" in spec:
        raise DataError(f"'{spec}' cannot be read from afar: {READERS['remote shards'].about} can, the rest is local")
    ending = table_ending(Path(path)) if os.path.isfile(path) else None
    if ending is not None:
        raise DataError(f"'{path}' looks like a table, and tables are known by their ending: rename it to "
                        f"'{Path(path).with_suffix(ending)}'")
    problem = "is none of what can be read" if os.path.exists(spec) else "does not exist"
    raise DataError(f"'{spec}' {problem}: give {accepted}")


def _is_shards(spec: str) -> bool:
    if os.path.isdir(spec):
        return bool(_tars_in(spec)) and not holds_pictures(Path(spec))
    return spec.endswith((".tar", ".tar.gz", ".tgz")) and (os.path.isfile(spec) or _is_pattern(spec))


def _open_shards(spec: str) -> Source:
    return ShardSource(spec, _tars_in(spec) if os.path.isdir(spec) else expand_pattern(spec))


def _tars_in(folder: str) -> list[Path]:
    return [Path(path) for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))]


def _is_pattern(spec: str) -> bool:
    return "{" in spec or glob.has_magic(spec)


def split_query(spec: str) -> tuple[str, str]:
    """Return a specification without its `?name=value&...`, and that; a bare `?` is a wildcard."""
    match = _QUERY.fullmatch(spec)
    return (match[1], match[2]) if match else (spec, "")


def _options(spec: str, *known: str) -> dict[str, str]:
    """Return what the query of `spec` says, by name.

    Raises:
        ConfigError: a name that is not `known`, or one without a value.
    """
    chosen = {name: values[-1] for name, values in parse_qs(split_query(spec)[1], keep_blank_values=True).items()}
    for name, value in chosen.items():
        if name not in known:
            raise ConfigError(f"'{spec}': {unknown_name('field', name, known)}")
        if not value:
            raise ConfigError(f"'{spec}': the field '{name}' is empty")
    return chosen


class _Asked(NamedTuple):
    """What the query of a list of pairs asks for."""

    columns: Columns | None
    images: Path | None
    split: str | None


def _asked(spec: str, *known: str) -> _Asked:
    """Return what the query of `spec` asks for; a list takes the fields `known`.

    Raises:
        ConfigError: another field, one column without the other, or a folder of pictures that is none.
    """
    chosen = _options(spec, *known)
    columns = images = None
    if chosen.keys() & set(_COLUMNS):
        if "image" not in chosen or "caption" not in chosen:
            path = split_query(spec)[0]
            raise ConfigError(f"'{spec}': name both columns, as in '{path}?image=COLUMN&caption=COLUMN'")
        columns = Columns(chosen["image"], tuple(chosen["caption"].split(",")), chosen.get("tags"), chosen.get("label"))
    if "images" in chosen:
        images = Path(chosen["images"]).expanduser()
        if not images.is_dir():
            raise ConfigError(f"'{spec}': the folder of pictures '{images}' does not exist")
    return _Asked(columns, images, chosen.get("split"))


def _is_list(*endings: str) -> Callable[[str], bool]:
    """Return a test for a file with one of these endings, or a pattern of such files."""

    def accepts(spec: str) -> bool:
        path = split_query(spec)[0]
        return path.lower().endswith(endings) and (os.path.isfile(path) or _is_pattern(path))

    return accepts


def _each(open_one: Callable[[Path, str], Source]) -> Callable[[str], Source]:
    """Return a function that opens every file of a pattern with `open_one(path, query)` and joins them."""

    def open_all(spec: str) -> Source:
        pattern, query = split_query(spec)
        paths = expand_pattern(pattern)
        sources = [open_one(path, f"{path}?{query}" if query else str(path)) for path in paths]
        return sources[0] if len(sources) == 1 else Joined(spec, sources)

    return open_all


def _open_table(path: Path, spec: str) -> Source:
    asked = _asked(spec, *_COLUMNS, "images")
    return TableSource(path, asked.columns, asked.images)


def _open_json_lines(path: Path, spec: str) -> Source:
    asked = _asked(spec, *_COLUMNS, "images")
    return JsonSource(path, asked.columns, asked.images)


def _open_json(path: Path, spec: str) -> Source:
    return open_json(path, *_asked(spec, *_COLUMNS, "images", "split"))


def _open_slip(path: Path, spec: str) -> Source:
    return open_slip(path, _asked(spec, "images").images)


def _open_hugging_face(spec: str) -> Source:
    asked = _asked(spec, *_COLUMNS, "split")
    return HuggingFaceSource(Path(split_query(spec)[0]), asked.columns, asked.split)


def _is_parquet(spec: str) -> bool:
    path = split_query(spec)[0]
    if os.path.isdir(path):
        return bool(_parquet_in(path)) and not holds_pictures(Path(path))
    return path.lower().endswith(".parquet") and (os.path.isfile(path) or _is_pattern(path))


def _open_parquet(spec: str) -> Source:
    path, asked = split_query(spec)[0], _asked(spec, *_COLUMNS, "images")
    paths = _parquet_in(path) if os.path.isdir(path) else expand_pattern(path)
    return open_parquet(path, paths, asked.columns, asked.images)


def _parquet_in(folder: str) -> list[Path]:
    return [Path(path) for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.parquet")))]


def _open_folder(spec: str) -> Source:
    """Open `pictures/` or `pictures/?templates=a photo of a {}.|a drawing of a {}.`.

    Where a list of pairs lies beside the pictures, and no text files do, the list has the captions: to take the
    folders' names in its place would train on "a photo of a images.".
    """
    folder = Path(split_query(spec)[0])
    templates = tuple(filter(None, _options(spec, "templates").get("templates", "").split("|")))
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"'{spec}': the template '{template}' has no {{}} for the folder's name")
    lists = sorted(path for path in folder.iterdir() if path.suffix.lower() in _LISTS and path.is_file())
    if templates or not lists or holds_texts(folder):
        return FolderSource(folder, templates)
    if len(lists) > 1:
        raise DataError(f"{folder} holds several lists of pairs, {', '.join(path.name for path in lists)}: name one of "
                        "them, or say with '?templates=a photo of a {}.' that its folders are classes")
    _log.info("%s: its captions are taken from %s", folder, lists[0].name)
    return open_source(str(lists[0]))


_LISTS = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".json", ".parquet")
_QUERY = re.compile(r"(.+?)\?(\w+=.*)", re.DOTALL)
_COLUMNS = ("image", "caption", "tags", "label")


def _open_torchvision(spec: str) -> Source:
    options = _options(spec, "root", "split", "labels")
    path = split_query(spec)[0]
    if "root" not in options:
        raise ConfigError(f"'{spec}': say where it lies, as in '{path}?root=FOLDER&split=test'")
    return TorchvisionSource(path, Path(options["root"]).expanduser(), options.get("split"),
                             options.get("labels", "name"))


READERS: dict[str, Reader] = {
    "torchvision": Reader(
        "a classification set as torchvision lays it out ('torchvision:food101?root=FOLDER&split=test')",
        lambda spec: spec.startswith(TORCHVISION),
        _open_torchvision,
    ),
    "remote shards": Reader(
        "WebDataset shards elsewhere ('s3://bucket/{0000..0012}.tar', 'http://...')",
        lambda spec: "://" in spec and ".tar" in spec,
        lambda spec: RemoteShardSource(spec, expand_urls(spec)),
    ),
    "shards": Reader(
        "WebDataset shards (a .tar file, a pattern such as 'shards/{0000..0012}.tar' or 'shards/*.tar', "
        "or a folder of .tar files)",
        _is_shards,
        _open_shards,
    ),
    "table": Reader(
        "a table (.csv or .tsv with a column of image paths and one of captions)",
        _is_list(".csv", ".tsv", ".tab"),
        _each(_open_table),
    ),
    "json lines": Reader(
        "JSON lines (.jsonl with an image path and a caption, or several, in each object)",
        _is_list(".jsonl", ".ndjson"),
        _each(_open_json_lines),
    ),
    "json": Reader(
        "a .json file (COCO captions, Karpathy's splits, or a list of objects)",
        _is_list(".json"),
        _each(_open_json),
    ),
    "parquet": Reader(
        "Parquet (a .parquet file, a pattern or a folder of them, with the pictures or their paths)",
        _is_parquet,
        _open_parquet,
    ),
    "slip": Reader(
        "metadata of SLIP (yfcc15m.pkl, cc3m.npy or cc12m.npy)",
        _is_list(".pkl", ".npy"),
        _each(_open_slip),
    ),
    "hugging face": Reader(
        "a folder that Hugging Face's save_to_disk wrote",
        lambda spec: is_hugging_face(Path(split_query(spec)[0])),
        _open_hugging_face,
    ),
    "folder": Reader(
        "a folder of pictures with .txt captions beside them, or of class folders",
        lambda spec: os.path.isdir(split_query(spec)[0]),
        _open_folder,
    ),
}
