"""JSON manifests: one object a line, a list of objects, the captions of COCO, or Karpathy's splits."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from aclip.data.sources.manifest import (
    Columns,
    ManifestSource,
    Row,
    find_encoding,
    open_text,
    row_of,
    settle_columns,
)
from aclip.errors import AclipError, ConfigError, DataError

_log = logging.getLogger(__name__)

_SNIFFED_OBJECTS = 50

_Object = dict[str, Any] | str  # an object, or why there is none


class JsonSource(ManifestSource):
    """Pairs as JSON objects: one a line (`.jsonl`, `.ndjson`), or in one list (`.json`).

    A caption may be a string or a list of strings. The fields are guessed from the first objects as the
    columns of a table are, and logged; an object that cannot be read is a bad sample.

    Attributes:
        name: the file.
        columns: the fields that are read.
    """

    def __init__(
        self, path: Path, columns: Columns | None = None, images: Path | None = None,
        objects: Callable[[], Iterator[_Object]] | None = None,
    ) -> None:
        """Read `path`.

        Args:
            path: the file.
            columns: replace the guess.
            images: replaces the file's own folder as that of the pictures.
            objects: replaces the parsing of lines.

        Raises:
            DataError: no objects, a file that is not text, or no pictures (`ManifestSource`).
            ConfigError: a field that does not exist or cannot be guessed; those there are.
        """
        encoding = find_encoding(path) if objects is None else ""

        def read() -> Iterator[_Object]:
            return _lines(path, encoding) if objects is None else objects()

        try:
            self.columns = settle_columns(path, _fields(read), columns)
            super().__init__(path, (_row(one, self.columns) for one in read()), images)
        except UnicodeError as error:
            raise DataError(f"{path} cannot be read as text: {error}") from error
        _log.info("%s: %d rows, %s", path, self.rows, self.columns)


class CocoSource(ManifestSource):
    """Pictures of a COCO captions file (`images` and `annotations`), each with all of its captions.

    Attributes:
        name: the file.
    """

    def __init__(self, path: Path, content: dict[str, Any], images: Path | None = None) -> None:
        """Join `content`, the parsed file `path`, whose pictures lie in `images`.

        Without `images` they are looked for in the file's folder and beside it, in the folder that the file is
        named after (`captions_train2017.json`: `train2017`), and in `images`.

        Raises:
            DataError: no pictures listed, or none of the folders holds the first of them.
        """
        captions: dict[Any, list[str]] = {}
        for note in _objects(content, "annotations"):
            caption, image = note.get("caption"), note.get("image_id")
            if isinstance(caption, str) and isinstance(image, int | str):
                captions.setdefault(image, []).append(caption)
        rows = [
            Row(name, tuple(captions.get(one.get("id") if isinstance(one.get("id"), int | str) else None, ())))
            for one in _objects(content, "images")
            if isinstance(name := one.get("file_name"), str)
        ]
        if not rows:
            raise DataError(f"{path} lists no pictures: its 'images' have no 'file_name'")
        super().__init__(path, rows, images or _picture_folder(path, rows[0].image))
        _log.info("%s: %d pictures, %d captions", path, len(rows), sum(map(len, captions.values())))


class KarpathySource(ManifestSource):
    """One split of Karpathy's `dataset_coco.json`, `dataset_flickr30k.json` or `dataset_flickr8k.json`.

    Each picture with all of its captions, as they were written. Splits are `train`, `val`, `test`, and for COCO
    `restval`, which the field adds to the training pictures: `train+restval`.

    Attributes:
        name: the file.
        split: the split, or several joined by `+`.
    """

    def __init__(self, path: Path, content: dict[str, Any], images: Path | None = None, split: str = "") -> None:
        """Take `split` of `content`, the parsed file `path`, whose pictures lie in `images`.

        Without `images` they are looked for as those of COCO captions are (`CocoSource`).

        Raises:
            ConfigError: no split is named, or one that the file does not have; those there are.
            DataError: none of the folders holds the first of the pictures.
        """
        pictures = _objects(content, "images")
        sizes = Counter(str(one.get("split", "?")) for one in pictures)
        there = ", ".join(f"{name} ({count:,})" for name, count in sizes.items())
        wanted = split.replace(" ", "+").split("+") if split else []  # "+" in a query reads as a space
        if not wanted:
            raise ConfigError(f"{path} holds the splits {there}: say which, as in '{path.name}?split=test'")
        for name in wanted:
            if name not in sizes:
                raise ConfigError(f"{path} has no split '{name}': it holds {there}")
        rows = [Row(place, _sentences(one)) for one in pictures
                if one.get("split") in wanted and (place := _place(one))]
        if not rows:
            raise DataError(f"{path} lists no pictures: its 'images' have no 'filename'")
        self.split = "+".join(wanted)
        super().__init__(path, rows, images or _picture_folder(path, rows[0].image, f"split={self.split}&"))
        _log.info("%s: %d pictures of %s, %d captions", path, len(rows), self.split,
                  sum(len(row.captions) for row in rows))


def open_json(
    path: Path, columns: Columns | None = None, images: Path | None = None, split: str | None = None
) -> ManifestSource:
    """Open a `.json` file: COCO captions, Karpathy's splits, or a list of objects.

    A list is gone through object by object and never held whole; COCO captions are, as pictures and captions lie
    in different parts of the file.

    Raises:
        DataError: it is none of them.
        ConfigError: a split that the file does not have, or a split or columns that its kind does not.
    """
    try:
        with path.open(encoding=_json_encoding(path), errors="surrogatepass") as file:
            is_list = _ListReader(file).opens_list()
        if is_list:
            if split is not None:
                raise _no_splits(path)
            return JsonSource(path, columns, images, lambda: _listed(path))
        content = json.loads(path.read_bytes())
    except AclipError:  # some are ValueErrors, too
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error} (one object a line is a .jsonl file)") from error
    if isinstance(content, dict) and any("sentences" in one for one in _objects(content, "images")[:1]):
        if columns is not None:
            raise _no_columns(path, "one of Karpathy's files")
        return KarpathySource(path, content, images, split or "")
    if split is not None:
        raise _no_splits(path)
    if isinstance(content, dict) and "images" in content and "annotations" in content:
        if columns is not None:
            raise _no_columns(path, "COCO captions")
        return CocoSource(path, content, images)
    raise DataError(f"{path} is neither a list of objects, nor COCO captions ('images' and 'annotations'), nor "
                    "Karpathy's splits ('images' with 'sentences')")


def _no_splits(path: Path) -> ConfigError:
    return ConfigError(f"{path} has no splits: only Karpathy's files are asked for one")


def _no_columns(path: Path, kind: str) -> ConfigError:
    return ConfigError(f"{path} is {kind}, whose fields are known: it takes no 'image' and 'caption'")


def _json_encoding(path: Path) -> str:
    """Return how a `.json` file is written, as the standard has it, with or without a mark."""
    with path.open("rb") as file:
        encoding = json.detect_encoding(file.read(4))
    return "utf-8-sig" if encoding == "utf-8" else encoding


def _listed(path: Path) -> Iterator[_Object]:
    with path.open(encoding=_json_encoding(path), errors="surrogatepass", newline="") as file:
        for one in _ListReader(file):
            yield one if isinstance(one, dict) else "not a JSON object"


class _ListReader:
    """The items of one JSON list, parsed as they come: what is held is one piece of the file and one item."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._at, self._read = "", 0, 0
        self._decoder = json.JSONDecoder()

    def opens_list(self) -> bool:
        """Return whether the file starts as a list does, and step over its bracket."""
        found = self._next() == "["
        self._at += found
        return found

    def __iter__(self) -> Iterator[Any]:
        """Yield the items.

        Raises:
            ValueError: it is not a list, or not JSON; where.
        """
        if not self.opens_list():
            raise self._error("a list was expected")
        if self._next() == "]":
            self._at += 1
            return self._end()
        while True:
            self._next()
            yield self._item()
            mark = self._next()
            if mark not in (",", "]"):
                raise self._error("a comma or the end of the list was expected")
            self._at += 1
            if mark == "]":
                return self._end()

    def _item(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self._error(error.msg) from error
                continue
            # what is followed by anything else may be the start of a longer number
            if self._text[end : end + 1] in _BETWEEN or not self._more():
                self._at = end
                return value

    def _next(self) -> str:
        """Step over white space and return what follows, not stepped over; nothing at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\n\r":
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Read on, and forget what has been parsed; pieces double while an item does not end, or trying took ages."""
        more = self._file.read(max(_PIECE, len(self._text) - self._at))
        self._read += self._at
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _end(self) -> None:
        if self._next():
            raise self._error("something follows the end of the list")

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{what} at character {self._read + self._at:,}")


_PIECE = 2**20  # characters
_BETWEEN = (" ", "\t", "\n", "\r", ",", "]")


def _lines(path: Path, encoding: str) -> Iterator[_Object]:
    """Yield the lines that are not blank, parsed."""
    with open_text(path, encoding) as file:
        for line in file:
            if not line.strip():
                continue
            try:
                one = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"JSON that cannot be read: {error}"
                continue
            yield one if isinstance(one, dict) else "not a JSON object"


def _fields(read: Callable[[], Iterator[_Object]]) -> list[str]:
    """Return the names in the first good objects, in the order of their appearance."""
    good = (one for one in read() if isinstance(one, dict))
    return list(dict.fromkeys(name for one in islice(good, _SNIFFED_OBJECTS) for name in one))


def _row(one: _Object, columns: Columns) -> Row:
    return Row("", problem=one) if isinstance(one, str) else row_of(one, columns)


def _objects(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    values = content.get(name)
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _place(picture: dict[str, Any]) -> str:
    """Return where a picture of Karpathy's lies in the folder of pictures; nothing if it has no name."""
    folder, name = picture.get("filepath") or "", picture.get("filename")
    return str(Path(folder, name)) if isinstance(folder, str) and isinstance(name, str) and name else ""


def _sentences(picture: dict[str, Any]) -> tuple[str, ...]:
    return tuple(one["raw"] for one in _objects(picture, "sentences") if isinstance(one.get("raw"), str))


def _picture_folder(path: Path, first: str, options: str = "") -> Path:
    """Return the folder that has the picture `first`; `options` go before the one that an error proposes."""
    named = path.stem.rpartition("_")[2]
    around = (path.parent, path.parent.parent)
    folders = [*around, *(folder / name for folder in around for name in (named, "images"))]
    for folder in folders:
        try:
            if (folder / first).is_file():
                return folder
        except (OSError, ValueError):  # a name that is too long, or with a null byte
            break
    looked = ", ".join(map(str, folders))
    raise DataError(f"{path}: no folder has its picture {first!r}, looked in {looked}: say where with "
                    f"'{path.name}?{options}images=FOLDER'")
