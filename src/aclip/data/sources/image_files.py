"""From what a list writes for an image to the file on this machine.

Lists travel: their paths have another machine's folders, Windows separators, missing or other endings, `file://`
addresses, or are mere ids. Some cells of a list are tried in every way; the ways that find files (`_Way`) are
then applied to every cell, so that finding one costs no more than looking whether a file is there.
"""

import base64
import binascii
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from aclip.data.decode import HEIC_EXTENSIONS, IMAGE_EXTENSIONS
from aclip.data.sources.base import printable
from aclip.errors import BadSampleError

ENDINGS = IMAGE_EXTENSIONS | HEIC_EXTENSIONS
"""Endings, lower case and without the dot, by which names of images are known."""

_LOOKED_INTO = 200  # folders beside a list in which its images are sought
_OF_LISTS = ("annotations", "annotation", "captions", "labels", "meta", "metadata", "lists")  # folders beside images
_ENTRIES = 1_000_000  # files of one folder that are listed
_DRIVE = re.compile(r"^[A-Za-z]:[\\/]|^[\\/]{2}")
_LOCAL_FILES = re.compile(r".*[?&]d=(.+)")  # Label Studio: /data/local-files/?d=FOLDER/FILE
_UPLOADED = re.compile(r"^[0-9a-f]{8}-(?=.)")  # Label Studio puts it before the names of uploaded files
_ADDRESS = re.compile(r"^(https?|ftp)://", re.IGNORECASE)
_BUCKET = re.compile(r"^[A-Za-z][\w+.-]+://")  # s3://bucket/..., whose files may have been copied here
_BASE64 = re.compile(r"(?:data:image/[\w.+-]+;base64,)?([A-Za-z0-9+/_=\s-]{60,})")
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0")


class _Way(NamedTuple):
    """One way from a cell to a file: `root` / `prefix` + the cell's parts after `drop` + `ending`."""

    root: str  # "" for paths that are absolute
    drop: int = -1  # leading parts of the cell's path that are left out; -1 takes the cell exactly as it is written
    ending: str = ""  # put behind the name; in place of its own with `swap`
    swap: bool = False
    prefix: str = ""  # before a number, and
    digits: int = 0  # its width with leading zeros
    form: str = ""  # Unicode normalisation of the file names
    decoded: bool = False  # %XX are decoded
    uploaded: bool = False  # Label Studio's prefix is left out

    def path(self, cell: str) -> str:
        if self.drop < 0:
            return os.path.join(self.root, cell)
        *folders, name = _parts(cell)[self.drop :] or [""]
        name = unquote(name) if self.decoded else name
        name = _UPLOADED.sub("", name) if self.uploaded else name
        name = unicodedata.normalize(self.form, name) if self.form else name  # type: ignore[arg-type]
        stem = name.rpartition(".")[0] or name if self.swap else name
        return os.path.join(self.root or os.sep, *folders, self.prefix + stem.zfill(self.digits) + self.ending)


class ImageFiles:
    """Finds the images of a list.

    Attributes:
        folder: that paths are relative to: that of the option `images`, else the list's own.
        notes: sentences about how cells are read, where that is not exactly as written.
    """

    def __init__(self, folder: Path, chosen: Path | None = None, hints: Sequence[str] = ()) -> None:
        """Look below `chosen` if it is given, else in `folder` and the folders around it, those named `hints` first."""
        self.folder = folder if chosen is None else chosen
        self.notes: list[str] = []
        self._around = chosen is None
        self._hints = hints
        self._ways = [_Way(str(self.folder))]
        self._listings: dict[str, dict[str, str]] = {}

    def read(self, cell: str) -> bytes | None:
        """Return the bytes of a cell's file, or None if it is not where most are."""
        try:
            with open(self._ways[0].path(cell), "rb") as file:
                return file.read()
        except (OSError, ValueError):
            return None

    def find(self, cell: str) -> Path | None:
        """Return the file of a cell, or None if there is none."""
        for way in self._ways:
            path = way.path(cell)
            if os.path.isfile(path):
                return Path(path)
        return None

    def learn(self, cells: Sequence[str]) -> dict[str, str]:
        """Find out how cells are written, from some of them.

        Returns:
            What `by_name` finds files in, if only a search of all folders finds them; else nothing.
        """
        used: Counter[_Way] = Counter()
        lost: list[str] = []
        as_written = any(os.path.isfile(self._ways[0].path(cell)) for cell in cells)
        for cell in cells:
            way = next((way for way in self._ways if os.path.isfile(way.path(cell))), None)
            if way is None and len(lost) < 20:
                way = self._way_to(cell, elsewhere=not as_written)
            if way is None:
                lost.append(cell)
                continue
            if way not in self._ways:
                self._ways.append(way)
            used[way] += 1
        # A file of the same name beside another list is not this list's: a way must find a good part of the images.
        self._ways = [way for way, count in used.most_common()
                      if count * (10 if _holds(str(self.folder), way.root) else 2) >= len(cells)] or self._ways[:1]
        self.notes = [note for way in self._ways if (note := self._note(way))]
        names: dict[str, str] = {}
        if not used and lost:
            names = _all_names(self.folder)
            if not names and self._around and self.folder.name.lower() in _OF_LISTS:
                names = _all_names(self.folder.parent)
            if any(by_name(names, cell) for cell in lost):
                self.notes = ["images found by name in folders below"]
            else:
                names = {}
        self._listings.clear()
        return names

    def _way_to(self, cell: str, elsewhere: bool) -> _Way | None:
        """Return the plainest way that finds a cell's file, in other folders only if `elsewhere`; None for no way."""
        parts = _parts(cell)
        if os.path.isfile("/".join(parts)) and (cell.startswith("file:") or os.path.isabs(cell)):
            return _Way("", 0)
        roots = list(self._roots()) if elsewhere else [str(self.folder)]
        for rename in (_same_name, _like_name):
            for drop in range(len(parts) if elsewhere else 1):
                *folders, name = parts[drop:]
                for root in roots:
                    names = self._names(os.path.join(root, *folders))
                    if names and (way := rename(_Way(root, drop), name, names)):
                        return way
        return None

    def _roots(self) -> Iterator[str]:
        yield str(self.folder)
        yield from _folders_in(self.folder, self._hints)
        if self._around:
            above = Path(os.path.normpath(self.folder.absolute().parent))
            yield str(above)
            yield from _folders_in(above, self._hints)

    def _names(self, folder: str) -> dict[str, str]:
        if folder not in self._listings:
            names: dict[str, str] = {}
            try:
                with os.scandir(folder) as entries:
                    for entry in islice(entries, _ENTRIES):
                        stem, _, ending = entry.name.rpartition(".")
                        if ending.lower() in ENDINGS:
                            names[stem if stem not in names else entry.name] = entry.name
            except (OSError, ValueError):
                pass
            self._listings[folder] = names
        return self._listings[folder]

    def _note(self, way: _Way) -> str:
        said = []
        if way.root and way.root != str(self.folder):
            said.append(f"found in {way.root}")
        if way.drop > 0:
            said.append(f"the first {way.drop} parts of their paths left out")
        if way.ending:
            said.append(f"'{way.ending}' {'in place of their endings' if way.swap else 'added to their names'}")
        if way.prefix or way.digits:
            said.append(f"numbers written as {way.prefix}{'0' * way.digits}")
        return "images " + ", ".join(said) if said else ""


def _same_name(way: _Way, name: str, names: dict[str, str]) -> _Way | None:
    files = names.values()
    if name in files:
        return way
    if unquote(name) in files:
        return way._replace(decoded=True)
    forms = (form for form in ("NFC", "NFD") if unicodedata.normalize(form, name) in files)
    return next((way._replace(form=form) for form in forms), None)


def _like_name(way: _Way, name: str, names: dict[str, str]) -> _Way | None:
    """Return the way to a file whose name has another ending, zeros and a prefix before a number, or lost a prefix."""
    if name in names:
        return way._replace(ending=names[name][len(name) :])
    stem, _, ending = name.rpartition(".")
    if ending.lower() in ENDINGS and stem in names:
        return way._replace(ending=names[stem][len(stem) :], swap=True)
    if _UPLOADED.sub("", name) in names.values():
        return way._replace(uploaded=True)
    if name.isdecimal():
        number = re.compile(rf"(.*?[^\d])?(0*{int(name)})")
        for other, file in names.items():
            if match := number.fullmatch(other):
                return way._replace(ending=file[len(other) :], prefix=match[1] or "", digits=len(match[2]))
    return None


def _all_names(folder: Path) -> dict[str, str]:
    """Return name, name without ending, and number -> the image, in all folders below."""
    found: dict[str, str] = {}
    for parent, _, names in os.walk(folder.absolute()):
        for name in names:
            stem, _, ending = name.rpartition(".")
            if ending.lower() in ENDINGS:
                for key in (name, stem, stem.lstrip("0") if stem.isdecimal() else stem):
                    found.setdefault(key, os.path.join(parent, name))
        if len(found) > 2 * _ENTRIES:
            break
    return found


def by_name(names: Mapping[str, str], cell: str) -> str | None:
    """Return the file of a cell that a search of all folders found, see `ImageFiles.learn`."""
    name = _parts(cell)[-1]
    keys = (name, name.rpartition(".")[0], name.lstrip("0") if name.isdecimal() else name)
    return next((names[key] for key in keys if key in names), None)


def _holds(folder: str, path: str) -> bool:
    return path in ("", folder) or path.startswith(folder.rstrip(os.sep) + os.sep)


def _parts(cell: str) -> list[str]:
    """Return the parts of a path or `file:` address in either system's notation; an absolute one starts with ""."""
    if cell.startswith("file:"):
        cell = unquote(re.sub(r"^file:(//(localhost)?)?", "", cell))
        cell = cell[1:] if _DRIVE.match(cell[1:]) and cell.startswith("/") else cell
    elif match := _LOCAL_FILES.fullmatch(cell):
        cell = unquote(match[1])
    elif match := _BUCKET.match(cell):
        cell = cell[match.end() :]
    if _DRIVE.match(cell):
        cell = cell[2:].lstrip("\\/")
    return cell.replace("\\", "/").split("/")


def _folders_in(folder: Path, hints: Sequence[str]) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = [entry.path for entry in islice(entries, _ENTRIES) if entry.is_dir()]
    except OSError:
        return []
    first = (*hints, "images", "image", "img", "imgs")
    names = {path: os.path.basename(path).lower() for path in found}
    return sorted(found, key=lambda path: (first.index(names[path]) if names[path] in first else len(first), path))[
        :_LOOKED_INTO]


def is_address(cell: str) -> bool:
    return _ADDRESS.match(cell) is not None


def embedded_image(cell: str) -> bytes | None:
    """Return the bytes of an image written in base64, with or without `data:`, or None if the cell is none."""
    match = _BASE64.fullmatch(cell)
    if match is None:
        return None
    try:
        data = base64.b64decode(match[1].replace("-", "+").replace("_", "/") + "==")
    except (binascii.Error, ValueError):
        return None
    return data if data.startswith(_MAGIC) else None


def looks_embedded(value: object) -> bool:
    """Return whether a value starts as an image in base64 does."""
    if not isinstance(value, str) or len(value) < 60:
        return False
    start = value.lstrip()[:100]
    head = start.rpartition(",")[2] if start.startswith("data:image/") else start[:60]
    head = head[: len(head) // 4 * 4]
    return embedded_image(head.ljust(60, "A")) is not None


def read_image(path: Path) -> bytes:
    """Return the bytes of an image file."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or str(error)
        raise BadSampleError(f"cannot read the image file: {reason}: {full_path(path)}") from error


def full_path(path: Path) -> str:
    return printable(str(path.absolute()))
