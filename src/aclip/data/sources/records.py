"""Files that list things, as records of named fields: tables, JSON lines, JSON documents; content tells which."""

import csv
import io
import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from aclip.data.captions import find_encoding, open_binary, text_errors
from aclip.data.sources.columns import guessable, names_image, texts
from aclip.data.sources.image_files import looks_embedded
from aclip.errors import ConfigError, DataError

SAMPLED = 50  # records by which the fields of a list are understood
LARGE = 2**26  # bytes from which on a JSON list is parsed item by item
_DELIMITERS = (",", "\t", ";", "|")
_WORDS = " "  # "delimiter" of lists of an image's name, white space, and the rest
_SAMPLE_BYTES = 2**23
_OPEN_LINES, _OPEN_TEXT = 500, 2**20  # lines and characters of one quoted field
_SEPARATOR = re.compile(r'"?sep=."?,*')
_SPLIT_KEYS = re.compile(r"train\w*|val\w*|test\w*|dev|restval", re.IGNORECASE)

csv.field_size_limit(2**31 - 1)


class Found(NamedTuple):
    """One record of a file."""

    fields: Mapping[str, Any] | str  # by name; or why there are none, in words
    offset: int = -1  # its bytes in the file; -1 and 0 where it has none of its own
    size: int = 0
    image: str = ""  # what seems to name the image of a record without fields


class ListFile:
    """A file that lists things. Picklable; every call of `rows` reads the file anew."""

    def __init__(self, path: Path, about: str, codec: str, notes: Iterable[str] = ()) -> None:
        self.path, self.about, self.codec = path, about, codec
        self.notes = [note for note in notes if note]  # on how it is read
        self.header: list[str] = []  # names of all fields
        self.sample: list[Mapping[str, Any]] = []  # the first records
        self.given: tuple[str, ...] | None = None  # fields of image, caption, tags, label, if the format says so

    def rows(self) -> Iterator[Found]:
        raise NotImplementedError

    def parse(self, data: bytes) -> Mapping[str, Any] | str:
        """Return the record that `Found.offset` and `Found.size` cut out of the file."""
        raise NotImplementedError

    def _look(self, records: Iterable[Mapping[str, Any] | str]) -> None:
        self.sample = [one for one in islice(records, SAMPLED) if not isinstance(one, str)]
        self.header = list(dict.fromkeys(chain.from_iterable(self.sample)))


class Table(ListFile):
    """A table with or without a header row; without one the fields are "1", "2", ...

    Fields may be quoted as RFC 4180 has it, line breaks included. A quote that is never closed, or whose field would
    swallow lines that are rows by themselves, is taken literally.
    """

    def __init__(self, path: Path, codec: str, notes: Iterable[str]) -> None:
        super().__init__(path, "table", codec, notes)
        lines = list(_head(_table_lines(path, codec)))
        best = max((_merit(lines, delimiter) for delimiter in (*_DELIMITERS, _WORDS)), key=lambda merit: merit[:4])
        self.delimiter, rows = best[4], best[5]
        if not rows:
            raise DataError(f"{path} holds no rows")
        self._headed = best[0] != 1
        names = [name.strip() for name in rows[0]] if self._headed else [str(n + 1) for n in range(len(rows[0]))]
        self.header = names
        self.about = f"table, delimiter {self.delimiter!r}{'' if self._headed else ', no header'}"
        named = [sum(names_image(row[at]) for row in rows if at < len(row)) for at in range(len(names))]
        self._image_at = named.index(max(named)) if max(named) else None
        self.sample = [dict(zip(names, map(str.strip, row), strict=True)) for row in rows[self._headed :]
                       if len(row) == len(names)]

    def rows(self) -> Iterator[Found]:
        lines = _table_lines(self.path, self.codec)
        found = _split_rows(lines, self.delimiter, len(self.header), self._image_at)
        for fields, offset, size in islice(found, int(self._headed), None):
            image = "" if self._image_at is None or self._image_at >= len(fields) else fields[self._image_at]
            yield Found(self._fields(fields), offset, size, image.strip())

    def parse(self, data: bytes) -> Mapping[str, Any] | str:
        text = data.decode(self.codec, errors=text_errors(self.codec))
        lines = ((line, -1, 0) for line in text.splitlines(keepends=True))
        return self._fields(next(_split_rows(lines, self.delimiter, len(self.header), self._image_at))[0])

    def _fields(self, fields: list[str]) -> Mapping[str, Any] | str:
        width = len(self.header)
        if len(fields) > width and not any(field.strip() for field in fields[width:]):
            del fields[width:]
        if len(fields) != width:
            return f"{len(fields)} fields in the row, {width} in the header"
        return dict(zip(self.header, map(str.strip, fields), strict=True))


class JsonLines(ListFile):
    """One JSON object a line; a line that cannot be read is a bad record."""

    def __init__(self, path: Path, codec: str, notes: Iterable[str]) -> None:
        super().__init__(path, "JSON lines", codec, notes)
        self._look(one.fields for one in self.rows())

    def rows(self) -> Iterator[Found]:
        for line, offset, size in _lines(self.path, self.codec):
            if line.strip():
                yield Found(_parse_line(line), offset, size)

    def parse(self, data: bytes) -> Mapping[str, Any] | str:
        return _parse_line(data.decode(self.codec, errors=text_errors(self.codec)))


class JsonDocument(ListFile):
    """One JSON document, whatever shape its records have in it."""

    def __init__(self, path: Path, codec: str, notes: Iterable[str], split: str | None) -> None:
        super().__init__(path, "JSON", codec, notes)
        self._kept: Iterator[Mapping[str, Any] | str] = iter(())
        self._large = path.stat().st_size >= LARGE and codec == "utf-8-sig" and _starts_with(path, b"[")
        if self._large:
            self._look(one.fields for one in self.rows())
            return
        shape = _shape_of(path, _load(path, codec), split)
        self.about, self.given = shape.about, shape.given
        self.notes += shape.notes
        head = list(islice(shape.rows, SAMPLED))
        self._look(head)
        self._kept = chain(head, shape.rows)

    def rows(self) -> Iterator[Found]:
        """Yield the records; those of a document that is held whole can be read once."""
        if not self._large:
            yield from map(Found, self._kept)
            return
        import ijson

        try:
            with open_binary(self.path) as file:
                for one in ijson.items(file, "item", use_float=True):
                    yield Found(_item(one))
        except (ijson.JSONError, UnicodeError) as error:
            raise DataError(f"{self.path} is not JSON: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": iter(())}


def open_list(path: Path, encoding: str | None = None, split: str | None = None) -> ListFile:
    """Open a file that lists things; its content tells its format."""
    if _starts_binary(path) or _starts_with(path, b"PK\3\4"):
        packed = "unpack it first" if _starts_with(path, b"PK\3\4") else "it is neither text nor Parquet nor Arrow"
        raise DataError(f"{path} lists no images: {packed}")
    codec, note = find_encoding(path, encoding)
    with open_binary(path) as file:
        first = file.read(4096).decode(codec, text_errors(codec)).lstrip("\ufeff \t\r\n")[:1]
    if not first:
        raise DataError(f"{path} holds no rows")
    head = [] if first == "[" else _first_lines(path, codec)
    if any(not isinstance(_parse_line(line), str) for line in head) and not _is_document(head):
        return JsonLines(path, codec, [note])
    if first in "[{":
        return JsonDocument(path, codec, [note], split)
    table = Table(path, codec, [note])
    if len(table.header) < 2:
        raise DataError(f"{path} lists no images: it is no JSON, and a table of one column ({table.header[0][:80]!r})")
    return table


def _first_lines(path: Path, codec: str) -> list[str]:
    """Return some lines that are not blank; of a very long one the beginning alone, which is no JSON then."""
    if codec.startswith(("utf-16", "utf-32")):
        lines = [line for line, *_ in islice(_lines(path, codec), 20)]
    else:
        with open_binary(path) as file:
            lines = [file.readline(_SAMPLE_BYTES).decode(codec, text_errors(codec)) for _ in range(20)]
    return [line for line in lines if line.strip("\ufeff \t\r\n")]


def _is_document(head: Sequence[str]) -> bool:
    """Return whether a single line of JSON is a document of records rather than a record."""
    return len(head) == 1 and not _is_record(json.loads(head[0].lstrip("\ufeff")))


def _is_record(value: dict[str, Any]) -> bool:
    """Return whether an object names an image and its caption, itself or in the one object in it."""
    nested = sum(isinstance(one, dict) for one in value.values())
    if _objects(value.get("images")) or (all(isinstance(one, dict | list) for one in value.values()) and nested != 1):
        return False
    return guessable(list(flat(value) if nested == 1 else value))


def _parse_line(line: str) -> Mapping[str, Any] | str:
    try:
        one = json.loads(line.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        return f"JSON that cannot be read: {error}"
    return _item(one) if isinstance(one, dict) else "not a JSON object"


# Lines and rows of text


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(start)


def _starts_binary(path: Path) -> bool:
    with open_binary(path) as file:
        try:
            head = file.read(4096)
        except (OSError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    return not marked and len(head) // 50 < head.count(0) < len(head) // 4


def _lines(path: Path, codec: str) -> Iterator[tuple[str, int, int]]:
    """Yield each line with its place in the file, (-1, 0) where the encoding or compression leaves it none."""
    with open_binary(path) as file:
        start = file.read(_SAMPLE_BYTES // 8)
        file.seek(0)
        if codec.startswith(("utf-16", "utf-32")) or (b"\r" in start and b"\n" not in start):
            with io.TextIOWrapper(file, codec, errors=text_errors(codec)) as text:
                yield from ((line, -1, 0) for line in text)
            return
        errors, offset = text_errors(codec), 0
        placed = isinstance(file, io.BufferedReader)
        for line in file:
            yield line.decode(codec, errors), offset if placed else -1, len(line)
            offset += len(line)
            codec = "utf-8" if codec == "utf-8-sig" else codec  # which looks for a mark in every line, slowly


def _table_lines(path: Path, codec: str) -> Iterator[tuple[str, int, int]]:
    """Yield the lines of a table without the first where that says `sep=;`, as spreadsheets write it."""
    for number, line in enumerate(_lines(path, codec)):
        if number or not _SEPARATOR.fullmatch(line[0].strip("\ufeff\r\n")):
            yield line


def _head(lines: Iterator[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    size = 0
    for number, line in enumerate(lines):
        size += len(line[0])
        if number > 4 * SAMPLED or (size > _SAMPLE_BYTES and number > 3):
            return
        yield line


def _split_rows(
    lines: Iterator[tuple[str, int, int]], delimiter: str, width: int | None = None, image_at: int | None = None
) -> Iterator[tuple[list[str], int, int]]:
    """Yield the fields and the place of rows that are not blank.

    Quotes that swallow rows are known by the `width` of the header and by the place of the image in it.
    """
    waiting: deque[tuple[str, int, int]] = deque()
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        text, offset, size = line
        text = text.rstrip("\r\n")
        if not text.strip():
            continue
        if delimiter == _WORDS:
            yield text.split(None, 1), offset, size
            continue
        if '"' not in text:
            yield text.split(delimiter), offset, size
            continue
        fields, whole = _quoted([text], delimiter)
        taken = [line]
        while not whole and len(taken) < _OPEN_LINES and sum(len(one[0]) for one in taken[-1:]) < _OPEN_TEXT:
            more = waiting.popleft() if waiting else next(lines, None)
            if more is None:
                break
            taken.append(more)
            if '"' in more[0]:
                fields, whole = _quoted([one[0].rstrip("\r\n") for one in taken], delimiter)
        if not whole or (len(taken) > 1 and _are_rows(taken, delimiter, width, image_at)):
            waiting.extendleft(reversed(taken[1:]))
            del taken[1:]
            if not whole or len(fields) != width or "\n" in "".join(fields):
                fields = text.split(delimiter)
        yield fields, offset, sum(one[2] for one in taken)


def _quoted(lines: list[str], delimiter: str) -> tuple[list[str], bool]:
    text = "\n".join(lines) + "\n"
    fields = next(csv.reader(text.splitlines(keepends=True), delimiter=delimiter, skipinitialspace=True), [])
    return fields, not fields or not fields[-1].endswith("\n")


def _are_rows(lines: Sequence[tuple[str, int, int]], delimiter: str, width: int | None, image_at: int | None) -> bool:
    """Return whether the lines that a quoted field spans are rows by themselves."""
    if width is None or width < 2:
        return False
    later = [line[0].rstrip("\r\n").split(delimiter) for line in lines[1:]]
    if any(len(fields) != width for fields in later):
        return False
    return all(names_image(fields[image_at]) for fields in later) if image_at is not None else width > 2


def _merit(
    lines: Sequence[tuple[str, int, int]], delimiter: str
) -> tuple[int, int, float, int, str, list[list[str]]]:
    """Return how well a delimiter fits: 2 for a header that tells image and caption, 1 for images without a header;
    whether some column has images; the fraction of rows that fit; how many columns; the delimiter; the first rows."""
    rows = [fields for fields, *_ in islice(_split_rows(iter(lines), delimiter), SAMPLED)]
    if not rows or len(rows[0]) < 2:
        return 0, 0, 0.0, 0, delimiter, rows if delimiter == "," else []
    header = [name.strip() for name in rows[0]]
    first_is_row = any(names_image(cell) or looks_embedded(cell.strip()) for cell in header)
    with_images = max(sum(names_image(row[at]) for row in rows[1:] if at < len(row)) for at in range(len(header)))
    fitting = sum(len(row) == len(header) for row in rows) / len(rows)
    if delimiter == _WORDS:
        if not names_image(header[0]):
            return 0, 0, 0.0, 0, delimiter, []
        return 1, 1, 0.5 * fitting, 0, delimiter, rows
    named = 2 if not first_is_row and guessable(header) else int(first_is_row)
    return named, int(2 * with_images > len(rows) - 1 > 0), fitting, len(header), delimiter, rows


# Shapes of JSON documents


class _Shape(NamedTuple):
    about: str
    rows: Iterator[Mapping[str, Any] | str]
    given: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def _load(path: Path, codec: str) -> Any:
    """Return a document; objects one behind the other are the list of them."""
    with open_binary(path) as file:
        text = file.read().decode(codec, errors=text_errors(codec))
    import ijson

    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("{"):
            raise DataError(f"{path} is not JSON: {error}") from error
    try:
        return list(ijson.items(text.encode(), "", multiple_values=True, use_float=True))
    except (ijson.JSONError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def _shape_of(path: Path, content: Any, split: str | None) -> _Shape:
    if isinstance(content, list):
        return _Shape("JSON list", map(_item, content))
    if not isinstance(content, dict):
        raise DataError(f"{path} is JSON without a list of records")
    images = _objects(content.get("images"))
    if any("sentences" in one for one in images[:1]):
        return _karpathy(path, images, split)
    if images and isinstance(content.get("annotations"), list):
        return _coco(content, images)
    columns = _columnar(content)
    if columns is not None:
        return _Shape("JSON columns", columns)
    lists = {name: value for name, value in content.items() if _objects(value) and not names_image(name)}
    splits = [name for name in lists if _SPLIT_KEYS.fullmatch(name)]
    if splits and len(splits) == len(lists) and (len(lists) > 1 or split):
        names = choose_split(path.name, {name: len(lists[name]) for name in splits}, split)
        return _Shape("JSON by split", map(_item, chain.from_iterable(lists[name] for name in names)))
    if lists:
        name = max(lists, key=lambda one: len(lists[one]))
        return _Shape(f"JSON, list '{name}'", map(_item, lists[name]))
    if _is_record(content):
        return _Shape("JSON object", iter([flat(content)]))
    keyed = _keyed(content)
    if keyed is not None:
        return _Shape("JSON by image", keyed)
    inner = [value for value in content.values() if isinstance(value, dict | list) and value]
    if len(inner) == 1:
        return _shape_of(path, inner[0], split)
    raise DataError(f"{path} is JSON, but neither a list of objects, nor captions by image, nor COCO captions "
                    "('images' and 'annotations')")


def _item(one: Any) -> Mapping[str, Any] | str:
    if isinstance(one, dict):
        name = next(iter(one)) if len(one) == 1 else ""
        return {"image": name, "caption": one[name]} if names_image(name) else flat(one)
    if isinstance(one, list) and len(one) >= 2:
        return {str(number): value for number, value in enumerate(one, start=1)}
    return "not a JSON object"


def flat(one: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with the fields of objects in it beside its own, as `outer.inner`."""
    nested = [(name, value) for name, value in one.items() if isinstance(value, dict)]
    fields = dict(one)
    for name, value in nested:
        if not any(key in value for key in ("bytes", "path")):
            fields.pop(name)
            fields |= {f"{name}.{inner}": item for inner, item in flat(value).items()}
    if isinstance(one.get("data"), dict) and isinstance(one.get("annotations"), list):
        fields |= _label_studio(one["annotations"])
    return fields


def _label_studio(annotations: list[Any]) -> dict[str, Any]:
    results = [one.get("value", {}) for note in _objects(annotations) for one in _objects(note.get("result"))]
    values = [value for value in results if isinstance(value, dict)]
    said = [text for value in values for text in texts(value.get("text"))]
    chosen = [text for value in values for text in texts(value.get("choices"))]
    return ({"caption": said} if said else {}) | ({"label": chosen[0]} if len(chosen) == 1 else {})


def _keyed(content: dict[str, Any]) -> Iterator[dict[str, Any]] | None:
    """Return the records of `{"a.jpg": "caption"}`, `{"a.jpg": ["one", "two"]}` or `{"a.jpg": {"caption": ...}}`."""
    values = list(islice(content.values(), SAMPLED))
    if all(isinstance(value, str | list | int | float) for value in values):
        return ({"image": name, "caption": value} for name, value in content.items())
    named = any(names_image(name) for name in islice(content, SAMPLED))
    if not all(isinstance(value, dict) for value in values) or (len(content) == 1 and not named):
        return None

    def record(name: str, value: dict[str, Any]) -> dict[str, Any]:
        fields = flat(value)
        return fields | {"image" if named or not any(map(names_image, fields.values())) else "key": name}

    return (record(name, value) for name, value in content.items() if isinstance(value, dict))


def _columnar(content: dict[str, Any]) -> Iterator[dict[str, Any]] | None:
    names, data = content.get("columns"), content.get("data")
    if isinstance(names, list) and isinstance(data, list):
        return (dict(zip(map(str, names), row, strict=False)) for row in data if isinstance(row, list))
    if len(content) < 2 or not guessable(list(content)):
        return None
    columns = list(content.values())
    if all(isinstance(column, list) for column in columns) and len(set(map(len, columns))) == 1:
        return (dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True))
    if all(isinstance(column, dict) for column in columns) and len({frozenset(column) for column in columns}) == 1:
        return ({name: column[key] for name, column in content.items()} for key in columns[0])
    return None


def _coco(content: dict[str, Any], images: list[dict[str, Any]]) -> _Shape:
    """Join COCO's captions with their images; ids may be numbers in one list and texts in the other."""
    captions: dict[str, list[str]] = {}
    classes: dict[str, dict[str, None]] = {}
    names = {str(one.get("id")): str(one.get("name")) for one in _objects(content.get("categories"))}
    for note in _objects(content["annotations"]):
        image = _id(note.get("image_id"))
        if said := texts(note.get("caption")):
            captions.setdefault(image, []).extend(said)
        elif (name := names.get(str(note.get("category_id")))) is not None:
            classes.setdefault(image, {})[name] = None
    rows = []
    for one in images:
        key = _id(one.get("id"))
        kinds = list(classes.get(key, ()))
        file = one.get("file_name") or one.get("filename") or one.get("path") or one.get("id")
        rows.append({"image": file, "caption": captions.get(key, []), "tags": kinds,
                     "label": kinds[0] if len(kinds) == 1 else ""})
    notes = () if captions else ("no captions among its annotations, only categories: they are read as tags",)
    return _Shape("COCO captions", iter(rows), ("image", "caption", "tags", "label"), notes)


def _id(value: Any) -> str:
    """Return an id as text, alike for 3, 3.0, "3" and "0003"."""
    text = "".join(texts(value))
    return str(int(text)) if text.isdecimal() else text


def _karpathy(path: Path, images: list[dict[str, Any]], split: str | None) -> _Shape:
    sizes = Counter(str(one.get("split", "?")) for one in images)
    wanted = choose_split(path.name, sizes, split)
    rows = ({"image": "/".join(part for part in (one.get("filepath"), one.get("filename")) if isinstance(part, str)),
             "caption": one.get("sentences")} for one in images
            if one.get("split") in wanted and isinstance(one.get("filename"), str))
    return _Shape(f"Karpathy's split {'+'.join(wanted)}", rows, ("image", "caption"))


def choose_split(name: str, sizes: Mapping[str, int], split: str | None, alone: bool = False) -> list[str]:
    """Return the splits that were asked for: `split` is one of `sizes`, or several joined by "+".

    Where there is only one, it need not be named if `alone` is true.
    """
    if alone and split is None and len(sizes) == 1:
        return list(sizes)
    there = ", ".join(f"{one} ({count:,})" for one, count in sizes.items())
    example = "train" if "train" in sizes else next(iter(sizes))
    wanted = re.split(r"[+ ]", split) if split and split not in sizes else [split] if split else []
    if not wanted:
        raise ConfigError(f"{name} holds the splits {there}: say which, as in '{name}?split={example}'")
    for one in wanted:
        if one not in sizes:
            raise ConfigError(f"{name} has no split '{one}': it holds {there}")
    return wanted


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


