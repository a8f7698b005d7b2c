"""CSV and TSV tables: one row a pair, the picture by its path."""

import csv
import logging
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from aclip.data.decode import IMAGE_EXTENSIONS
from aclip.data.sources.manifest import (
    Columns,
    ManifestSource,
    Row,
    find_encoding,
    guess_columns,
    open_text,
    settle_columns,
    split_tags,
)
from aclip.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

_DELIMITERS = (",", "\t", ";", "|")
_SNIFFED_ROWS = 50
_LOOKED_AT = 2**16  # bytes of a file of unknown kind
_HEADER = ("image", "caption")
_PICTURE = re.compile(rf"\w\.({'|'.join(sorted(IMAGE_EXTENSIONS))})\b", re.IGNORECASE)


class TableSource(ManifestSource):
    """Pairs in a CSV or TSV file with a header row.

    The delimiter (comma, tab, semicolon, bar), the encoding (UTF-8, UTF-16 with a mark; bytes that are no
    UTF-8 are taken for Windows-1252) and the columns are found out and logged. Fields may be quoted as RFC 4180 has
    it, line breaks within included.

    Attributes:
        name: the file.
        columns: those that are read.
    """

    def __init__(self, path: Path, columns: Columns | None = None, images: Path | None = None) -> None:
        """Read the table `path`; `columns` replaces the guess, `images` its own folder as that of the pictures.

        Raises:
            DataError: no rows, a file that is not a table, or no pictures (`ManifestSource`).
            ConfigError: a column that does not exist or cannot be guessed; the columns there are.
        """
        encoding = find_encoding(path)
        try:
            delimiter = _find_delimiter(path, encoding)
            rows = _rows(path, encoding, delimiter)
            header = [name.strip() for name in next(rows, [])]
            self.columns = _settle(path, header, columns, delimiter)
            super().__init__(path, _parse(path, header, rows, self.columns, delimiter), images)
        except (csv.Error, UnicodeError) as error:
            raise DataError(f"{path} cannot be read as a table: {error}") from error
        _log.info("%s: %d rows, delimiter %r, %s", path, self.rows, delimiter, self.columns)


def table_ending(path: Path) -> str | None:
    """Return the ending with which a file of another one would be read, or None if it does not look like a table."""
    try:
        with path.open("rb") as file:
            if b"\0" in file.read(_LOOKED_AT):
                return None
    except OSError:
        return None
    delimiter = _find_delimiter(path, "utf-8-sig")
    guessable, fitting, width = _merit(path, "utf-8-sig", delimiter)
    if not guessable and (fitting < 1.0 or width < 2):
        return None
    return ".tsv" if delimiter == "\t" else ".csv"


def _settle(path: Path, header: list[str], columns: Columns | None, delimiter: str) -> Columns:
    """Return the columns to read.

    Raises:
        ConfigError: as `settle_columns`; a first row that names a picture is no header.
    """
    try:
        return settle_columns(path, header, columns)
    except ConfigError as error:
        picture = next((name for name in header if _PICTURE.search(name)), None)
        if picture is None:
            raise
        raise ConfigError(f"{path}: the header is missing, its first line already names a picture ('{picture}'): put a "
                          f"line above it that names the columns, such as {delimiter.join(_HEADER)!r}") from error


def _parse(
    path: Path, header: list[str], rows: Iterator[list[str]], columns: Columns, delimiter: str
) -> Iterator[Row]:
    """Yield the pairs, and say afterwards whether a quote seems to swallow rows."""
    position = {name: header.index(name) for name in columns.names()}
    swallowing: list[int] = []
    for number, fields in enumerate(rows):
        if any("\n" in field and delimiter in field.partition("\n")[2] for field in fields):
            swallowing.append(number + 1)
        cells = {name: fields[at].strip() if at < len(fields) else "" for name, at in position.items()}
        fits = len(fields) == len(header)
        yield Row(
            cells[columns.image],
            tuple(cells[name] for name in columns.captions),
            split_tags([cells[columns.tags]]) if columns.tags is not None else (),
            cells[columns.label] if columns.label is not None else "",
            "" if fits else f"{len(fields)} fields in the row, {len(header)} in the header",
        )
    if swallowing:
        _log.warning(
            "%s: %d rows have a quoted field that holds line breaks and delimiters, the first is row %d; "
            "if that is not meant, a quote there is not closed and swallows the rows after it",
            path, len(swallowing), swallowing[0],
        )  # fmt: skip


def _find_delimiter(path: Path, encoding: str) -> str:
    """Return the delimiter under which the header makes sense and the first rows fit it best."""
    return max(_DELIMITERS, key=lambda delimiter: _merit(path, encoding, delimiter))


def _merit(path: Path, encoding: str, delimiter: str) -> tuple[bool, float, int]:
    """Return whether columns can be guessed under a delimiter, the share of first rows that fit, how many columns."""
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


def _rows(path: Path, encoding: str, delimiter: str) -> Iterator[list[str]]:
    """Yield the rows that are not blank."""
    with open_text(path, encoding, newline="") as file:
        yield from (row for row in csv.reader(file, delimiter=delimiter) if row)
