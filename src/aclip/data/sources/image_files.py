"""From what a list writes for an image to the file on this machine.

Lists travel: their paths have another machine's folders, Windows separators, missing or other endings, `file://`
addresses, or are mere ids. If files are not where a list says, some of its cells tell where they are: below another
folder, with the first parts of their paths removed, or else wherever a file of that name is found.
"""

import base64
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, takewhile
from pathlib import Path
from urllib.parse import unquote

from aclip.data.decode import HEIC_EXTENSIONS, IMAGE_EXTENSIONS
from aclip.data.sources.base import evenly, printable
from aclip.errors import BadSampleError

ENDINGS = IMAGE_EXTENSIONS | HEIC_EXTENSIONS
"""Endings, lower case and without the dot, by which names of images are known."""

DOWNLOAD = "download the images first, for example with img2dataset, whose shards are read as they are"
_MOST_FOLDERS, _MOST_FILES = 200, 1_000_000  # beside a list, and below it, among which its images are sought
_OF_LISTS = ("annotations", "annotation", "captions", "labels", "meta", "metadata", "lists")  # folders beside images
_DRIVE = re.compile(r"^[A-Za-z]:[\\/]|^[\\/]{2}")
_LOCAL_FILES = re.compile(r".*[?&]d=(.+)")  # Label Studio: /data/local-files/?d=FOLDER/FILE
_UPLOADED = re.compile(r"^[0-9a-f]{8}-(?=.)")  # Label Studio puts it before the names of uploaded files
_ADDRESS = re.compile(r"^(https?|ftp)://", re.IGNORECASE)
_BUCKET = re.compile(r"^[A-Za-z][\w+.-]+://")  # s3://bucket/..., whose files may have been copied here
_BASE64 = re.compile(r"(?:data:image/[\w.+-]+;base64,)?([A-Za-z0-9+/_=\s-]{60,})")
_Place = tuple[str, int]  # where files lie, and the leading parts of cells that are left out; -1 takes cells as written
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0")


class ImageFiles:
    """Finds the images of a list.

    Attributes:
        folder: that paths are relative to, absolute: that of the option `images`, else the list's own.
        notes: sentences about how cells are read, where that is not exactly as written.
        around: whether folders beside `folder` are looked at, too.
    """

    def __init__(self, folder: Path, chosen: Path | None = None, hints: Sequence[str] = ()) -> None:
        """Look below `chosen` if it is given, else in `folder` and the folders around it, those named `hints` first."""
        self.folder = (folder if chosen is None else chosen).absolute()
        self.notes: list[str] = []
        self.around = chosen is None
        self._hints = (*hints, "images", "image", "img", "imgs")
        self._place: _Place = (str(self.folder), -1)

    def path(self, cell: str) -> str:
        """Return where the file of a cell should lie."""
        return _below(self._place, cell)

    def find(self, cell: str) -> Path | None:
        """Return the file of a cell, or None if there is none."""
        path = self.path(cell)
        return Path(path) if os.path.isfile(path) else None

    def learn(self, cells: Sequence[str]) -> Callable[[str], str | None] | None:
        """Find out from some cells where their files lie.

        Returns:
            What gives the path of a cell, relative to `folder`, if only a search by name finds them; else None.
        """
        as_written = _found(self._place, cells)
        if cells and not as_written:
            self._place = self._best_place([cells[at] for at in evenly(len(cells), 20)])
        found = _found(self._place, cells)
        root, drop = self._place
        how = [f"in {root}"] if root != str(self.folder) else []
        how += [f"without the first {f'{drop} parts' if drop > 1 else 'part'} of their paths"] if drop > 0 else []
        self.notes = [f"images found {', '.join(how)}"] if how else []
        if found > 0.9 * len(cells):
            return None
        index = self._index(around=not as_written)

        def by_name(cell: str) -> str | None:
            return _alike(index, cell, same_folder=as_written > 0)

        alike = {cell: path for cell in cells if (path := by_name(cell)) is not None}
        example = next((one for one in alike.items() if one[0] != one[1]), None)
        below = all(not path.startswith("../") for path in alike.values())
        if example is None or len(alike) <= found or len(alike) < _least(len(cells), below):
            return None
        self._place = str(self.folder), -1
        self.notes = [f"images found by name, such as {printable(example[1])} for {printable(example[0][:80])!r}"]
        return by_name

    def _best_place(self, cells: Sequence[str]) -> _Place:
        roots = [str(self.folder), *self._folders_in(self.folder)]
        if self.around:
            above = Path(os.path.normpath(self.folder.parent))
            roots += [str(above), *self._folders_in(above)]
        places = ((cell, (root, drop)) for cell in cells[:5] for drop in range(len(_parts(cell))) for root in roots)
        counts = {place: _found(place, cells) for cell, place in places if os.path.isfile(_below(place, cell))}
        best = max(counts, key=lambda place: counts[place], default=self._place)
        least = _least(len(cells), below=Path(best[0]).is_relative_to(self.folder))
        return best if counts.get(best, 0) >= least else self._place

    def _folders_in(self, folder: Path) -> list[str]:
        try:
            with os.scandir(folder) as entries:
                found = [entry.name for entry in islice(entries, _MOST_FILES) if entry.is_dir()]
        except OSError:
            return []
        return [os.path.join(folder, name) for name in sorted(found, key=self._rank)[:_MOST_FOLDERS]]

    def _rank(self, name: str) -> tuple[int, str]:
        known = name.lower() in self._hints
        return self._hints.index(name.lower()) if known else len(self._hints), name

    def _index(self, around: bool) -> dict[str, list[str]]:
        """Return name without ending, as it is and without regard to case, and number at its end, -> images below or
        `around` the folder, relative to it."""
        index: dict[str, list[str]] = {}
        for path in islice(self._all_files(around), _MOST_FILES):
            stem, ending = os.path.splitext(unicodedata.normalize("NFC", os.path.basename(path)))
            if ending[1:].lower() in ENDINGS:
                digits = re.search(r"\d+$", stem)
                for key in {stem, f"~{stem.casefold()}", f"#{digits[0].lstrip('0')}" if digits else stem}:
                    index.setdefault(key, []).append(path)
        return index

    def _all_files(self, around: bool) -> Iterator[str]:
        walks: list[Iterator[tuple[str, list[str], list[str]]]] = [os.walk(self.folder)]
        if around and self.around:
            beside = [one for one in self._folders_in(self.folder.parent) if one != str(self.folder)]
            deep = self.folder.name.lower() in _OF_LISTS
            walks += [os.walk(one) if deep else islice(os.walk(one), 1) for one in beside]
        for parent, folders, names in chain.from_iterable(walks):
            folders.sort(key=self._rank)
            below = os.path.relpath(parent, self.folder).replace(os.sep, "/")
            yield from (name if below == "." else f"{below}/{name}" for name in sorted(names))


def _below(place: _Place, cell: str) -> str:
    root, drop = place
    return os.path.join(root, cell if drop < 0 else "/".join(_parts(cell)[drop:]))


def _least(count: int, below: bool) -> float:
    """Return how many of some images must be found: a file of one name beside another list is not this list's."""
    return count / (10 if below else 2)


def _found(place: _Place, cells: Sequence[str]) -> int:
    return sum(os.path.isfile(_below(place, cell)) for cell in cells)


def _alike(index: dict[str, list[str]], cell: str, same_folder: bool) -> str | None:
    """Return the file in an index whose name is most like that of a cell, of several the one in the likest folder."""
    *folders, name = _parts(cell)
    folders = [folder for folder in folders if folder not in ("", ".")]
    names = [unicodedata.normalize("NFC", one) for one in (name, unquote(name), _UPLOADED.sub("", name))]
    stems = [os.path.splitext(one)[0] if one.rpartition(".")[2].lower() in ENDINGS else one for one in names]
    keys = [*stems, *names, os.path.splitext(names[0])[0], *(f"~{stem.casefold()}" for stem in stems),
            f"#{name.lstrip('0')}" if name.isdecimal() else name]
    found = next((index[key] for key in keys if key in index), [])
    if same_folder:
        found = [path for path in found if path.split("/")[:-1] == folders]

    def likeness(path: str) -> tuple[int, bool]:
        *parents, own = path.split("/")
        pairs = zip(reversed(parents), reversed(folders), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)), own == name

    return max(found, key=likeness, default=None)


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


def is_address(cell: str) -> bool:
    return _ADDRESS.match(cell) is not None


def embedded_image(cell: str) -> bytes | None:
    """Return the bytes of an image written in base64, with or without `data:`, or None if the cell is none."""
    if (match := _BASE64.fullmatch(cell)) is None:
        return None
    try:
        data = base64.urlsafe_b64decode(match[1] + "==")  # takes + and /, too
    except ValueError:
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
        raise BadSampleError(f"cannot read the image file: {reason}: {printable(str(path.absolute()))}") from error
