"""Sources of image-text pairs; `open_source` finds the reader for what the user named, by looking inside."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aclip.data.decode import IMAGE_EXTENSIONS
from aclip.data.sources.base import RawSample, Source, Summary
from aclip.data.sources.columnar import ColumnarSource, is_columnar, is_saved, open_columnar, open_saved
from aclip.data.sources.columns import settle_columns
from aclip.data.sources.combined import Joined, Mixture, Part, Stretched, open_mixture, weights_of
from aclip.data.sources.folder import LIST_ENDINGS, SPLIT_NAMES, FolderSource, Listing, beside, list_folder
from aclip.data.sources.lists import ListSource, open_list_source
from aclip.data.sources.records import choose_split, open_list
from aclip.data.sources.remote import RemoteShardSource, expand_urls
from aclip.data.sources.shards import ShardSource, reading_of
from aclip.data.sources.torchvision_sets import PREFIX as TORCHVISION
from aclip.data.sources.torchvision_sets import TorchvisionSource
from aclip.data.spec import Spec, expand_paths, locate, parse_spec, split_sizes
from aclip.errors import ConfigError, DataError

__all__ = [
    "ColumnarSource", "FolderSource", "Joined", "ListSource", "Mixture", "Part", "RawSample", "RemoteShardSource",
    "ShardSource", "Source", "Summary", "TorchvisionSource", "open_source", "open_training", "weights_of",
]  # fmt: skip

SOURCES: dict[str, Callable[[str], Source]] = {}
"""Your own: `SOURCES["mine"] = MySource` opens `mine:REST` by `MySource(REST)`.

Example:
    >>> aclip.SOURCES["mine"] = MySource  # doctest: +SKIP
"""

_log = logging.getLogger(__name__)
_LIST_NAMES = ("metadata", "captions", "annotations")  # whatever their ending
_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_DEPTHS = ("*", "*/*", "*/*/*")
_SPLIT_OF_FILE = re.compile(rf"(?:.*[-_.])?({'|'.join(SPLIT_NAMES)})\d*(?:[-_.].*)?", re.IGNORECASE)


def open_source(spec: str) -> Source:
    """Open the source that `spec` names, see `aclip.data.spec`; how it was read is logged in one line.

    Raises:
        DataError: there is nothing of that name, or no reader for it; what is accepted.
        ConfigError: columns of a list that do not exist or cannot be guessed, a split that must be chosen, an option
            that this kind of source does not take.
    """
    parsed = parse_spec(spec)
    if parsed.weight is not None:
        raise ConfigError(f"'{spec}': a weight such as ={parsed.weight:g} is for sources that are mixed in training")
    return _open(parsed)


def open_training(specs: str | Sequence[str]) -> Source:
    """Open what is trained on: `a.csv=2 b.tar=1` is a mixture by weight, one source is itself.

    Raises:
        DataError: no image of a source has a caption.
        ConfigError: a weight that is not positive, or weights behind some sources only.
        AclipError: as `open_source`.
    """

    def open_one(spec: str) -> Source:
        source = _open(parse_spec(spec))
        if source.summary.captioned == 0:
            raise DataError(f"no image of {source.spec} has a caption, and training needs them: put a .txt beside "
                            f"each, name a list of captions, or caption folders with "
                            f"'{spec}?templates=a photo of a {{}}.'")
        return source

    return open_mixture(specs, open_one)


def _open(spec: Spec) -> Source:
    kind, colon, rest = spec.path.partition(":")
    if colon and kind in SOURCES and not os.path.exists(spec.path):
        source = SOURCES[kind](rest)
        source.spec = source.spec or spec.path
    else:
        source = _open_whole(spec.without("stretch"))
        _log.info("%s", source.summary)
        if (white := spec.get("stretch")) is not None:
            source = Stretched(source, white)
    return source if spec.part is None else Part(source, *spec.part)


def _open_whole(spec: Spec) -> Source:
    path = locate(spec.path)
    if not os.path.exists(path):
        if path.startswith(TORCHVISION):
            return TorchvisionSource(spec)
        if "://" in path:
            if not any(ending in path for ending in _TAR_ENDINGS):
                raise DataError(f"'{path}' cannot be read remotely: WebDataset shards can, the rest is local")
            return RemoteShardSource(path, expand_urls(path), reading_of(spec))
    spec = spec.with_path(path)
    return _open_folder(Path(path), spec) if os.path.isdir(path) else _open_files(expand_paths(path), spec)


def _open_files(paths: Sequence[Path], spec: Spec) -> Source:
    """Open files of one kind; what the first is decides."""
    first = paths[0]
    with first.open("rb") as file:
        is_tar = first.name.lower().endswith(_TAR_ENDINGS) or file.read(262)[257:] == b"ustar"
    if is_tar:
        return ShardSource(spec.path, paths, reading_of(spec))
    if is_columnar(first) or first.suffix.lower() == ".parquet":
        return open_columnar(paths, spec)
    if first.suffix.lower() in (".pkl", ".npy", ".pickle"):
        raise DataError(f"{first} is a pickle, which can run any program when it is read: docs/convert_slip.py makes a "
                        "table of SLIP's metadata")
    return _joined(spec, [open_list_source(path, spec.with_path(path)) for path in paths])


def _joined(spec: Spec, sources: Sequence[Source]) -> Source:
    return sources[0] if len(sources) == 1 else Joined(spec.path, sources)


def _open_folder(folder: Path, spec: Spec) -> Source:
    """Open what a folder holds: a saved data set, shards, Parquet, or images with their captions."""
    if is_saved(folder):
        return open_saved(folder, spec)
    if sizes := split_sizes(folder):  # a set that was fetched
        return _open_split_folders(folder, sizes, spec)
    listing = list_folder(folder)
    if not listing.images and not listing.unread:
        for pattern in (f"{depth}.{ending}" for ending in ("tar", "parquet", "arrow") for depth in _DEPTHS):
            if paths := [path for path in sorted(folder.glob(pattern)) if path.is_file()]:
                return _open_data_files(folder, paths, spec)
    if "templates" in spec.options or any(map(listing.captions_of, listing.images)):
        return _open_images(listing, spec)
    if lists := _lists_in(folder):
        return _open_listed(folder, lists, spec)
    in_folders = Counter(image.partition("/")[0] for image in listing.images if "/" in image)
    if 0 < in_folders.total() == len(listing.images) and all(name.lower() in SPLIT_NAMES for name in in_folders):
        return _open_split_folders(folder, in_folders, spec, alone=True)
    if lists := _lists_in(folder, below=True):
        return _open_listed(folder, lists, spec)
    if len(listing.top) == 1 and all(image.count("/") > 1 for image in listing.images) and not beside(listing):
        inner = folder / listing.top[0]  # set/set/..., images/train/...
        return _open_folder(inner, spec.with_path(inner))
    return _open_images(listing, spec)


def _open_split_folders(folder: Path, sizes: Mapping[str, int], spec: Spec, alone: bool = False) -> Source:
    wanted = choose_split(str(folder), sizes, spec.get("split"), alone)
    plain = spec.without("split")
    return _joined(spec, [_open_folder(folder / name, plain.with_path(folder / name)) for name in wanted])


def _open_data_files(folder: Path, paths: list[Path], spec: Spec) -> Source:
    by_split = _by_split(folder, paths)
    if by_split is None:
        return _open_files(paths, spec)
    if len(by_split) > 1 or "split" in spec.options:
        wanted = choose_split(str(folder), {name: len(some) for name, some in by_split.items()}, spec.get("split"))
        paths = [path for name in wanted for path in by_split[name]]
    return _open_files(paths, spec.without("split").with_path(folder))


def _open_images(listing: Listing, spec: Spec) -> Source:
    spec.allow("templates", "captions", "encoding")
    templates = tuple(filter(None, (spec.get("templates") or "").split("|")))
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"'{spec.text}': the template '{template}' has no {{}} for the folder's name")
    whole = spec.one_of("captions", ("lines", "whole")) == "whole"
    return FolderSource(listing, templates, whole_texts=whole, encoding=spec.get("encoding"))


def _lists_in(folder: Path, below: bool = False) -> list[Path]:
    """Return the files of a folder, or of the folders right below it, that list images and captions."""
    parents = [entry.path for entry in _entries(folder) if entry.is_dir()] if below else [str(folder)]
    paths = [Path(entry.path) for parent in parents for entry in _entries(parent)
             if entry.name.lower().endswith(LIST_ENDINGS) or entry.name.lower().startswith(_LIST_NAMES)]
    found = [path for path in sorted(paths)
             if not path.name.startswith(".") and "submission" not in path.name and path.is_file()
             and path.suffix[1:].lower() not in IMAGE_EXTENSIONS and _lists_captions(path)]
    about_captions = [path for path in found if "caption" in path.stem.lower()]
    return about_captions if len(about_captions) < len(found) and about_captions else found


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _lists_captions(path: Path) -> bool:
    if is_columnar(path):
        return True
    try:
        file = open_list(path, split="")
        return file.given is not None or bool(settle_columns(parse_spec(str(path)), file.header, file.sample).captions)
    except ConfigError as error:
        return "splits" in str(error)
    except DataError:
        return False


def _open_listed(folder: Path, lists: Sequence[Path], spec: Spec) -> Source:
    """Open the list that describes a folder, or those of the splits that are asked for."""
    if len({path.with_suffix("") for path in lists}) == 1:  # one list, perhaps in two formats
        if len(lists) > 1:
            _log.info("%s: its captions are taken from %s, not from %s", folder, lists[0].name, lists[1].name)
        return _open_files(lists[:1], spec.with_path(lists[0]))
    by_split = _by_split(folder, lists)
    if by_split is None or any(len(paths) > 1 for paths in by_split.values()):
        names = ", ".join(str(path.relative_to(folder)) for path in lists)
        raise DataError(f"{folder} holds several lists of pairs, {names}: name one of them, or say with "
                        "'?templates=a photo of a {}.' that its folders are classes")
    wanted = choose_split(str(folder), dict.fromkeys(by_split, 1), spec.get("split"))
    plain = spec.without("split")
    return _joined(spec, [_open_files(by_split[name], plain.with_path(by_split[name][0])) for name in wanted])


def _by_split(folder: Path, paths: Sequence[Path]) -> dict[str, list[Path]] | None:
    """Return split -> files, or None if the names of some tell no split."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        folders = [name for name in path.relative_to(folder).parts[:-1] if name.lower() in SPLIT_NAMES]
        match = _SPLIT_OF_FILE.fullmatch(path.name.partition(".")[0])
        if not folders and match is None:
            return None
        found.setdefault(folders[0] if folders else match[1] if match else "", []).append(path)
    return found
