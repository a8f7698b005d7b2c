"""CSV and TSV tables: one row a pair, the picture by its path."""

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from aclip.data.sources.base import PackedStrings, RawSample
from aclip.errors import BadSampleError, ConfigError, DataError, unknown_name

_log = logging.getLogger(__name__)

IMAGE_COLUMNS = (
    "filepath", "image", "image_path", "image_file", "img", "img_path", "path", "file", "file_path",
    "filename", "file_name", "picture", "photo",
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

_DELIMITERS = (",", "\t", ";", "|")
_SNIFFED_ROWS = 50


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


class TableSource:
    """Pairs in a CSV or TSV file with a header row.

    The delimiter (comma, tab, semicolon, bar), the encoding (UTF-8, UTF-16 with a mark, else
    Windows-1252) and the columns are found out and logged. Paths of pictures are absolute or relative to
    the table's folder. Fields may be quoted as RFC 4180 has it, line breaks within included.

    Attributes:
        name: the file.
        columns: those that are read.
    """

    def __init__(self, path: Path, columns: Columns | None = None) -> None:
        """Read the table `path`; `columns` replaces the guess.

        Raises:
            DataError: no rows, or a file that is not a table.
            ConfigError: a column that does not exist or cannot be guessed; the columns there are.
        """
        self.name = str(path)
        self._folder = path.parent
        encoding = _find_encoding(path)
        try:
            delimiter = _find_delimiter(path, encoding)
            rows = _rows(path, encoding, delimiter)
            header = [name.strip() for name in next(rows, [])]
            self.columns = columns or guess_columns(path, header)
            self._check_columns(header)
            self._store(header, rows, delimiter)
        except (csv.Error, UnicodeError) as error:
            raise DataError(f"{path} cannot be read as a table: {error}") from error
        if not len(self):
            raise DataError(f"{path} has a header and no rows")
        _log.info(
            "%s: %d rows, delimiter %r, image from column '%s', caption from '%s'",
            path, len(self), delimiter, self.columns.image, "' and '".join(self.columns.captions),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        """Return the row's number, counted from 1 after the header, and its picture's path."""
        return f"row {index + 1}: {self._images[index]}"

    def read(self, index: int) -> RawSample:
        """Read a row's picture.

        Raises:
            BadSampleError: a row with too many or too few fields, or a picture that cannot be read.
        """
        if index in self._malformed:
            raise BadSampleError(self._malformed[index])
        image = self._images[index]
        if not image:
            raise BadSampleError("missing image path")
        if "://" in image:
            raise BadSampleError("the image is a URL, not a file: download it first")
        try:
            data = (self._folder / image).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            reason = getattr(error, "strerror", None) or str(error)
            raise BadSampleError(f"cannot read the image file: {reason}") from error
        tags = self._tags[index].replace(";", ",").split(",") if self._tags is not None else []
        return RawSample(
            self.key(index),
            data,
            tuple(column[index] for column in self._captions),
            tags=tuple(tag.strip() for tag in tags if tag.strip()),
            label=(self._labels[index] or None) if self._labels is not None else None,
        )

    def _check_columns(self, header: Sequence[str]) -> None:
        for column in (self.columns.image, *self.columns.captions, self.columns.tags, self.columns.label):
            if column is not None and column not in header:
                raise ConfigError(f"{self.name}: {unknown_name('column', column, header)}")

    def _store(self, header: Sequence[str], rows: Iterator[list[str]], delimiter: str) -> None:
        """Keep the columns that are read, packed, and which rows do not fit the header."""
        wanted = [self.columns.image, *self.columns.captions]
        wanted += [name for name in (self.columns.tags, self.columns.label) if name is not None]
        positions = [header.index(name) for name in wanted]
        packed = [PackedStrings() for _ in wanted]
        self._malformed: dict[int, str] = {}
        swallowing: list[int] = []
        for number, row in enumerate(rows):
            if any("\n" in field and delimiter in field.partition("\n")[2] for field in row):
                swallowing.append(number + 1)
            if len(row) != len(header):
                self._malformed[number] = f"{len(row)} fields in the row, {len(header)} in the header"
            for column, position in zip(packed, positions, strict=True):
                column.append(row[position].strip() if position < len(row) else "")
        if swallowing:
            _log.warning(
                "%s: %d rows have a quoted field that holds line breaks and delimiters, the first is row %d; "
                "if that is not meant, a quote there is not closed and swallows the rows after it",
                self.name, len(swallowing), swallowing[0],
            )  # fmt: skip
        count = 1 + len(self.columns.captions)
        self._images, self._captions = packed[0], packed[1:count]
        optional = iter(packed[count:])
        self._tags = next(optional) if self.columns.tags is not None else None
        self._labels = next(optional) if self.columns.label is not None else None


def guess_columns(path: Path, header: Sequence[str]) -> Columns:
    """Return which columns of `header` hold the picture, its captions, tags and class.

    Raises:
        ConfigError: no picture or no caption among them; the columns there are, and what to do.
    """
    image = _first(IMAGE_COLUMNS, header)
    rest = [name for name in header if name != image]
    caption = _first(CAPTION_COLUMNS, rest)
    for what, found, known in (("image", image, IMAGE_COLUMNS), ("caption", caption, CAPTION_COLUMNS)):
        if found is None:
            raise ConfigError(
                f"{path}: no column looks like the {what}; there are: {', '.join(header) or 'none'}; name it "
                f"'{known[0]}', or say which with '{path.name}?image=COLUMN&caption=COLUMN'"
            )
    assert image is not None
    assert caption is not None
    captions = [caption]
    if caption.lower() == "title" and (description := _first(("description",), rest)):
        captions.append(description)
    return Columns(image, tuple(captions), _first(TAG_COLUMNS, rest), _first(LABEL_COLUMNS, rest))


def _first(known: Sequence[str], header: Sequence[str]) -> str | None:
    """Return the column that comes first in `known`, compared without case, `-` and space being `_`."""
    normalised = {name.lower().replace("-", "_").replace(" ", "_"): name for name in reversed(header)}
    return next((normalised[name] for name in known if name in normalised), None)


def _find_encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            return "utf-16"
        file.seek(0)
        try:
            with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
                while text.read(1 << 20):
                    pass
        except UnicodeDecodeError:
            _log.warning("%s is not UTF-8: read as Windows-1252", path)
            return "cp1252"
    return "utf-8-sig"


def _find_delimiter(path: Path, encoding: str) -> str:
    """Return the delimiter under which the header makes sense and the first rows fit it best."""

    def merit(delimiter: str) -> tuple[bool, float, int]:
        try:
            rows = list(islice(_rows(path, encoding, delimiter), _SNIFFED_ROWS))
        except csv.Error:
            return False, 0.0, 0
        if not rows or len(rows[0]) < 2:
            return False, 0.0, 0
        header = [name.strip() for name in rows[0]]
        try:
            guess_columns(path, header)
            guessable = True
        except ConfigError:
            guessable = False
        fitting = sum(len(row) == len(header) for row in rows) / len(rows)
        return guessable, fitting, len(header)

    return max(_DELIMITERS, key=merit)


def _rows(path: Path, encoding: str, delimiter: str) -> Iterator[list[str]]:
    """Yield the rows that are not blank."""
    errors = "replace" if encoding == "cp1252" else "strict"
    with path.open(encoding=encoding, errors=errors, newline="") as file:
        yield from (row for row in csv.reader(file, delimiter=delimiter) if row)
