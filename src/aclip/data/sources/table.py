"""CSV and TSV tables: one row a pair, the picture by its path."""

import csv
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

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
            self.columns = settle_columns(path, header, columns)
            super().__init__(path, _parse(path, header, rows, self.columns, delimiter), images)
        except (csv.Error, UnicodeError) as error:
            raise DataError(f"{path} cannot be read as a table: {error}") from error
        _log.info("%s: %d rows, delimiter %r, %s", path, self.rows, delimiter, self.columns)


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
    with open_text(path, encoding, newline="") as file:
        yield from (row for row in csv.reader(file, delimiter=delimiter) if row)
