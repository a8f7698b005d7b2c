"""Manifests: lists of pairs, one row each, the picture by its path; what CSV, JSON, Parquet and COCO files share."""

import codecs
import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from aclip.data.sources.base import PackedStrings, RawSample, printable
from aclip.errors import BadSampleError, ConfigError, DataError, unknown_name

_log = logging.getLogger(__name__)

IMAGE_COLUMNS = (
    "filepath", "image", "image_path", "image_file", "img", "img_path", "path", "file", "file_path",
    "filename", "file_name", "picture", "photo", "jpg",
)  # fmt: skip
"""Column names that are taken for the picture's path, in this order, whatever their case."""

CAPTION_COLUMNS = (
    "caption", "captions", "title", "text", "label", "description", "alt_text", "alt", "sentence", "prompt",
    "name",
)  # fmt: skip
"""Likewise for the caption; of `title` and `description` both are captions, as in YFCC."""

TAG_COLUMNS = ("tags", "keywords")
"""Likewise for tags, separated by commas or semicolons."""

LABEL_COLUMNS = ("label", "class", "category")
"""Likewise for the class."""

_LOOKED_FOR = 20
"""Pictures, evenly over a list, that are looked for when it is opened; one will do, the others are bad samples."""

_LOOKED_INTO = 1000
"""Entries of a folder among which one with the pictures is sought."""

_DOWNLOAD = "download the pictures first, for example with img2dataset, whose shards are read as they are"

_URL_ENDINGS = ("url", "urls", "uri")
"""How columns are called that hold addresses of pictures."""

_BETWEEN = "\0"  # strings of one row; no caption needs it, and no path can hold it


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    Attributes:
        image: the picture's path.
        captions: one or more columns of captions.
        tags, label: or None.
    """

    image: str
    captions: tuple[str, ...]
    tags: str | None = None
    label: str | None = None

    def names(self) -> tuple[str, ...]:
        """Return all of them, each once."""
        optional = (name for name in (self.tags, self.label) if name is not None)
        return tuple(dict.fromkeys((self.image, *self.captions, *optional)))

    def __str__(self) -> str:
        captions = "' and '".join(self.captions)
        return f"image from column '{self.image}', caption from '{captions}'"


class Row(NamedTuple):
    """One pair of a manifest.

    Attributes:
        image: the picture's path, absolute or relative to the manifest's folder.
        captions, tags, label: as in `RawSample`; an empty label is none.
        problem: why the row cannot be used, if it cannot.
    """

    image: str
    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    label: str = ""
    problem: str = ""


class ManifestSource:
    """Pairs listed in a file, kept packed in memory: some 40 bytes a row beside the text itself.

    Rows of one picture, wherever they stand, are one sample with all of their captions: as samples of their own
    they would be each other's negatives in training, and right answers that count as wrong in retrieval.

    Attributes:
        name: the file.
        folder: to which paths of pictures are relative.
        rows: how many the file has, repeated pictures and rows that cannot be used included.
    """

    def __init__(self, path: Path, rows: Iterable[Row], folder: Path | None = None) -> None:
        """Keep `rows`; paths of pictures are relative to `folder`, else to that of `path`.

        Raises:
            DataError: no rows, or no pictures: all of them are URLs, or none of some is there.
        """
        self.name = str(path)
        self.folder = path.parent if folder is None else folder
        self._images, self._captions, self._tags, self._labels = (PackedStrings() for _ in range(4))
        self._problems: dict[int, str] = {}
        self._numbers: np.ndarray | None = None  # of each sample's first row, where pictures repeat
        pictures = array("q")
        base = os.path.abspath(self.folder)
        for number, row in enumerate(rows):
            image = _storable(row.image)
            self._images.append(image)
            self._captions.append(_join(row.captions))
            self._tags.append(_join(row.tags))
            self._labels.append(_storable(row.label))
            if row.problem:
                self._problems[number] = row.problem
            pictures.append(hash(_picture_of(number, image, row.problem, base)))
        self.rows = len(pictures)
        if not self.rows:
            raise DataError(f"{path} holds no rows")
        self._merge(np.frombuffer(pictures, dtype=np.int64), base)
        self._check_pictures(path)

    def __len__(self) -> int:
        return len(self._images)

    def _merge(self, pictures: np.ndarray, base: str) -> None:
        """Make one sample of the rows of each picture, at the place of the first, whose tags and label it has.

        Args:
            pictures: (rows,) hashes of `_picture_of`: what tells ten million rows apart without an object for each.
            base: as for `_picture_of`.
        """
        ordered = np.sort(pictures)
        if np.all(ordered[1:] != ordered[:-1]):
            return
        _, first, place = np.unique(pictures, return_index=True, return_inverse=True)
        first = first[place]
        relabelled, of_equal_hash = 0, dict[str, int]()
        for row in np.flatnonzero(first != np.arange(self.rows)).tolist():
            one, other = (_picture_of(number, self._images[number], self._problems.get(number, ""), base)
                          for number in (row, int(first[row])))
            if one != other:
                first[row] = of_equal_hash.setdefault(one, row)
            relabelled += self._labels[row] != self._labels[first[row]]
        numbers = np.flatnonzero(first == np.arange(self.rows))
        sizes = np.bincount(first, minlength=self.rows)[numbers]
        self._captions = PackedStrings(self._together(np.argsort(first, kind="stable"), sizes))
        self._images, self._tags, self._labels = (
            PackedStrings(strings[number] for number in numbers.data)
            for strings in (self._images, self._tags, self._labels))
        self._problems = {int(np.searchsorted(numbers, row)): why for row, why in self._problems.items()}
        self._numbers = numbers
        _log.info("%s: %d of %d rows have the picture of an earlier one: %d samples, each with all its captions%s",
                  self.name, self.rows - len(numbers), self.rows, len(numbers),
                  f"; {relabelled} of them say another label, the first row's is used" if relabelled else "")

    def _together(self, order: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
        """Yield the captions of `sizes` rows at a time, taken in this order, each caption once."""
        rows = iter(order.data)
        for size in sizes.data:
            captions = [self._captions[row] for row in islice(rows, size)]
            yield captions[0] if size == 1 else _BETWEEN.join(
                dict.fromkeys(chain.from_iterable(one.split(_BETWEEN) for one in captions)))

    def _check_pictures(self, path: Path) -> None:
        """Refuse a list whose pictures lie elsewhere: each of them would be skipped, and the run end by that.

        Raises:
            DataError: as for `__init__`.
        """
        absent: list[str] = []
        url = ""
        spread = range(0, len(self), -(-len(self) // _LOOKED_FOR))
        for image in (self._images[index] for index in spread if index not in self._problems):
            if "://" in image:
                url = url or image
            elif image and os.path.isfile(self.folder / self.file(image)):
                return
            elif image:
                absent.append(self.file(image))
        if absent:
            raise DataError(f"{path}: none of {len(absent)} of its pictures is there, looked for "
                            f"{full_path(self.folder / absent[0])} first: {_where_else(path, absent[0])}")
        if url:
            raise DataError(f"{path}: its pictures are URLs, such as {url}: {_DOWNLOAD}")

    def key(self, index: int) -> str:
        """Return the number of the picture's first row, counted from 1, and its path."""
        number = index if self._numbers is None else int(self._numbers[index])
        return f"row {number + 1}: {self._images[index]}"

    def read(self, index: int) -> RawSample:
        """Read a row's picture.

        Raises:
            BadSampleError: a row that cannot be used, or a picture that cannot be read.
        """
        if index in self._problems:
            raise BadSampleError(self._problems[index])
        image = self._images[index]
        if not image:
            raise BadSampleError("missing image path")
        if "://" in image:
            raise BadSampleError("the image is a URL, not a file: download it first")
        return RawSample(
            self.key(index),
            self.picture(image),
            tuple(self._captions[index].split(_BETWEEN)),
            tags=tuple(tag for tag in self._tags[index].split(_BETWEEN) if tag),
            label=self._labels[index] or None,
        )

    def file(self, image: str) -> str:
        """Return the file, as a path in the folder, that holds the picture that a row names: the picture itself."""
        return image

    def picture(self, image: str) -> bytes:
        """Return the bytes of the picture that a row names.

        Raises:
            BadSampleError: they cannot be read.
        """
        return read_picture(self.folder / image)


def _picture_of(number: int, image: str, problem: str, base: str) -> str:
    """Return what the rows of one picture share: its path; a row that cannot be used shares it with none."""
    if problem or not image:
        return f"{_BETWEEN}{number}"
    path = image if image.startswith("/") else f"{base}/{image}"
    return path if "/../" in path else os.path.normpath(path)  # what is above a link to a folder is elsewhere


def read_picture(path: Path) -> bytes:
    """Return the bytes of a picture's file.

    Raises:
        BadSampleError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or str(error)
        raise BadSampleError(f"cannot read the image file: {reason}: {full_path(path)}") from error


def full_path(path: Path) -> str:
    """Return where a file was looked for, so that it can be printed."""
    return printable(str(path.absolute()))


def _where_else(path: Path, image: str) -> str:
    """Return what to do about a list `path` whose pictures are not there, `image` being the first."""
    if os.path.isabs(image):
        return "its paths are absolute, make them relative to the list, or to the folder of '?images=FOLDER'"
    above = Path(os.path.normpath(path.parent / ".."))
    for folder in (above, *_folders_in(path.parent), *_folders_in(above)):
        if os.path.isfile(folder / image):
            return f"it lies in {folder}, say '{path}?images={folder}'"
    return f"say where they lie with '{path}?images=FOLDER'"


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in islice(entries, _LOOKED_INTO) if entry.is_dir())
    except OSError:
        return []


def settle_columns(path: Path | str, header: Sequence[str], chosen: Columns | None) -> Columns:
    """Return the columns to read: those that were `chosen`, which must exist, else the guess.

    Raises:
        ConfigError: a column that does not exist, cannot be guessed or is there twice.
    """
    for column in chosen.names() if chosen else ():
        if column not in header:
            raise ConfigError(f"{path}: {unknown_name('column', column, header)}")
    columns = chosen or guess_columns(path, header)
    for column in columns.names():
        if header.count(column) > 1:
            raise ConfigError(f"{path} has {header.count(column)} columns named '{column}': rename all but one")
    return columns


def guess_columns(path: Path | str, header: Sequence[str]) -> Columns:
    """Return which columns of `header` hold the picture, its captions, tags and class.

    Raises:
        ConfigError: no picture or no caption among them; the columns there are, and what to do.
    """
    image = _first(IMAGE_COLUMNS, header)
    urls = [name for name in header if name.lower().endswith(_URL_ENDINGS)]
    if image is None and urls:
        raise ConfigError(f"{path}: column '{urls[0]}' has URLs, and none has paths of pictures: {_DOWNLOAD}")
    rest = [name for name in header if name != image]
    caption = _first(CAPTION_COLUMNS, rest)
    for what, found, known in (("image", image, IMAGE_COLUMNS), ("caption", caption, CAPTION_COLUMNS)):
        if found is None:
            raise ConfigError(
                f"{path}: no column looks like the {what}; there are: {', '.join(header) or 'none'}; name it "
                f"'{known[0]}', or say which with '{Path(path).name}?image=COLUMN&caption=COLUMN'"
            )
    assert image is not None
    assert caption is not None
    captions = [caption]
    if caption.lower() == "title" and (description := _first(("description",), rest)):
        captions.append(description)
    return Columns(image, tuple(captions), _first(TAG_COLUMNS, rest), _first(LABEL_COLUMNS, rest))


def row_of(fields: dict[str, Any], columns: Columns) -> Row:
    """Return the row of an object whose values may be strings, lists of strings, numbers or nothing."""
    image = fields.get(columns.image)
    label = fields.get(columns.label) if columns.label is not None else None
    return Row(
        image if isinstance(image, str) else "",
        tuple(text for name in columns.captions for text in texts(fields.get(name))),
        split_tags(texts(fields.get(columns.tags))) if columns.tags is not None else (),
        str(label) if isinstance(label, str | int) else "",
    )


def texts(value: Any) -> tuple[str, ...]:
    """Return the strings in a value that may be one, a list of them, or something else."""
    return tuple(item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, str))


def split_tags(values: Iterable[str]) -> tuple[str, ...]:
    """Return the tags in texts that separate them by commas or semicolons."""
    return tuple(tag.strip() for value in values for tag in value.replace(";", ",").split(",") if tag.strip())


def find_encoding(path: Path) -> str:
    """Return the encoding of a text file, UTF-16 with a mark or UTF-8; lines that are neither are logged.

    A file put together from several often has a few lines of Windows-1252. To read all of it as that would
    spoil the captions of the other lines without a word, so `open_text` reads only the bytes so that are no UTF-8.
    """
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        file.seek(0)
        broken = [number for number, line in enumerate(file, start=1) if not _is_utf8(line)]
    if broken:
        _log.warning("%s: %d lines are not UTF-8, the first is line %d: what is not in them is read as Windows-1252",
                     path, len(broken), broken[0])  # fmt: skip
    return "utf-8-sig"


def open_text(path: Path, encoding: str, newline: str | None = None) -> TextIO:
    """Open a text file of an encoding that `find_encoding` returned; `newline` as for `open`."""
    return path.open(encoding=encoding, errors="strict" if encoding == "utf-16" else _AS_CP1252, newline=newline)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _as_cp1252(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("cp1252", errors="replace"), error.end


_AS_CP1252 = "aclip-cp1252"
codecs.register_error(_AS_CP1252, _as_cp1252)


def _first(known: Sequence[str], header: Sequence[str]) -> str | None:
    """Return the column that comes first in `known`, compared without case, `-` and space being `_`."""
    normalised = {name.lower().replace("-", "_").replace(" ", "_"): name for name in reversed(header)}
    return next((normalised[name] for name in known if name in normalised), None)


def _join(strings: Iterable[str]) -> str:
    """Pack several strings into one."""
    return _BETWEEN.join(_storable(string.replace(_BETWEEN, " ")) for string in strings)


def _storable(string: str) -> str:
    """Return the string with halves of surrogate pairs replaced, which JSON can hold and UTF-8 cannot."""
    try:
        string.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return string.encode("utf-8", errors="replace").decode("utf-8")
    return string
