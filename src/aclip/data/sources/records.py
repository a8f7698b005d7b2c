"""Files that list things, as records of named fields: tables, JSON lines, JSON documents; content tells which."""

import csv
import io
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import ijson

from aclip.data.captions import find_encoding, open_binary, text_errors
from aclip.data.sources.columns import guessable, names_image, texts
from aclip.data.sources.image_files import looks_embedded
from aclip.errors import ConfigError, DataError

SAMPLED = 50  # records by which the fields of a list are understood
LARGE = 2**26  # bytes from which on a JSON list is parsed item by item
_DELIMITERS = (",", "\t", ";", "|")
_WORDS = " "  # "delimiter" of lists of an image's name, white space, and the rest
_SAMPLE_BYTES = 2**23
_OPEN_LINES = 500  # lines of one quoted field
_SEPARATOR = re.compile(r'"?sep=."?,*')  # first line of a spreadsheet's table
_SPLIT_KEYS = re.compile(r"train\w*|val\w*|test\w*|dev|restval", re.IGNORECASE)

csv.field_size_limit(2**31 - 1)

Fields = Mapping[str, Any] | str  # of a record by name; or why there are none, in words
Line = tuple[str, int]  # and its place in the file, -1 where the encoding or compression leaves it none


class Found(NamedTuple):
    """One record of a file."""

    fields: Fields
    offset: int = -1  # where it begins in the file, in bytes; -1 where it has no place of its own
    image: str = ""  # what seems to name the image of a record without fields


@dataclass
class ListFile:
    """A file that lists things."""

    path: Path
    about: str  # format, for people
    rows: Callable[..., Iterator[Found]]  # reads the records anew, from the one at an offset on, else from the first
    notes: list[str]  # on how it is read
    header: list[str] = field(default_factory=list)  # names of all fields
    sample: list[Mapping[str, Any]] = field(default_factory=list)  # the first records
    given: tuple[str, ...] | None = None  # fields of image, caption, tags, label, if the format says so

    def __post_init__(self) -> None:
        if not self.header:
            self.sample = [one.fields for one in islice(self.rows(), SAMPLED) if not isinstance(one.fields, str)]
            self.header = list(dict.fromkeys(chain.from_iterable(self.sample)))


def open_list(path: Path, encoding: str | None = None, split: str | None = None) -> ListFile:
    """Open a file that lists things; its content tells its format."""
    with open_binary(path) as file:
        try:
            head = file.read(4096)
        except (OSError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    if head.startswith(b"PK\3\4"):
        if b"[Content_Types].xml" in head:
            raise DataError(f"{path} is a workbook or another Office file: save it as CSV (UTF-8), and name that file")
        raise DataError(f"{path} lists no images: unpack it first")
    if not head.startswith((b"\xff\xfe", b"\xfe\xff")) and len(head) // 50 < head.count(0) < len(head) // 4:
        raise DataError(f"{path} lists no images: it is neither text nor Parquet nor Arrow")
    codec, note = find_encoding(path, encoding)
    notes = [note] if note else []
    first = head.decode(codec, text_errors(codec)).lstrip("\ufeff \t\r\n")[:1]
    if not first:
        raise DataError(f"{path} holds no rows")
    lines = [] if first == "[" else [line for line, _ in islice(_lines(path, codec, _SAMPLE_BYTES), 20) if line.strip()]
    parsed = [line for line in lines if not isinstance(_parse_line(line), str)]
    # A single line may be a document of records rather than a record.
    if parsed and (len(lines) > 1 or _is_record(json.loads(lines[0].lstrip("\ufeff")))):
        return ListFile(path, "JSON lines", partial(_json_rows, path, codec), notes)
    if first == "[" and path.stat().st_size >= LARGE and codec == "utf-8-sig":
        return ListFile(path, "JSON", partial(_json_items, path), notes)
    if first in "[{":
        shape = _shape_of(path, _load(path, codec), split)
        records = list(shape.rows)
        return ListFile(path, shape.about, lambda: map(Found, records), [*notes, *shape.notes], given=shape.given)
    return _open_table(path, codec, notes)


def _is_record(value: dict[str, Any]) -> bool:
    """Return whether an object names an image and its caption, itself or in the one object in it."""
    nested = sum(isinstance(one, dict) for one in value.values())
    if _objects(value.get("images")) or (all(isinstance(one, dict | list) for one in value.values()) and nested != 1):
        return False
    return guessable(list(flat(value) if nested == 1 else value))


def _lines(path: Path, codec: str, longest: int = -1, offset: int = 0) -> Iterator[Line]:
    """Yield the lines from an offset on; of those longer than `longest` bytes the pieces."""
    with open_binary(path) as file:
        start = file.read(_SAMPLE_BYTES // 8)
        file.seek(offset)
        if codec.startswith(("utf-16", "utf-32")) or (b"\r" in start and b"\n" not in start):
            with io.TextIOWrapper(file, codec, errors=text_errors(codec)) as text:
                yield from ((line, -1) for line in text)
            return
        errors, placed = text_errors(codec), isinstance(file, io.BufferedReader)
        for line in file if longest < 0 else iter(partial(file.readline, longest), b""):
            yield line.decode(codec, errors), offset if placed else -1
            offset += len(line)
            codec = "utf-8" if codec == "utf-8-sig" else codec  # which looks for a mark in every line, slowly


# JSON


def _json_rows(path: Path, codec: str, offset: int = 0) -> Iterator[Found]:
    return (Found(_parse_line(line), place) for line, place in _lines(path, codec, offset=offset) if line.strip())


def _parse_line(line: str) -> Fields:
    try:
        one = json.loads(line.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        return f"JSON that cannot be read: {error}"
    return _item(one) if isinstance(one, dict) else "not a JSON object"


def _json_items(path: Path) -> Iterator[Found]:
    try:
        with open_binary(path) as file:
            yield from (Found(_item(one)) for one in ijson.items(file, "item", use_float=True))
    except (ijson.JSONError, UnicodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def _load(path: Path, codec: str) -> Any:
    """Return a document; objects one behind the other are the list of them."""
    with open_binary(path) as file:
        text = file.read().decode(codec, errors=text_errors(codec))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("{"):
            raise DataError(f"{path} is not JSON: {error}") from error
    try:
        return list(ijson.items(text.encode(), "", multiple_values=True, use_float=True))
    except (ijson.JSONError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


# Tables


def _open_table(path: Path, codec: str, notes: list[str]) -> ListFile:
    """Open a table with or without a header row; without one the fields are "1", "2", ..."""
    lines: list[str] = []
    for line, _ in islice(_table_lines(path, codec), 4 * SAMPLED):
        lines.append(line)
        if len(lines) > 3 and sum(map(len, lines)) > _SAMPLE_BYTES:
            break
    fits = [_fit(lines, delimiter) for delimiter in (*_DELIMITERS, _WORDS)]
    best = max(fits, key=lambda fit: fit[:4])
    if not best.rows:
        raise DataError(f"{path} holds no rows")
    width = len(best.rows[0])
    if width < 2:
        raise DataError(f"{path} lists no images: it is not JSON, and as a table it has one column "
                        f"({best.rows[0][0][:80]!r})")
    headed = best.rank != 1
    header = [name.strip() for name in best.rows[0]] if headed else [str(number + 1) for number in range(width)]
    named = [sum(names_image(row[at]) for row in best.rows if at < len(row)) for at in range(width)]
    image_at = named.index(max(named)) if max(named) else None
    sample: list[Mapping[str, Any]] = [dict(zip(header, map(str.strip, row), strict=True))
                                       for row in best.rows[headed:] if len(row) == width]
    about = f"table, delimiter {best.delimiter!r}{'' if headed else ', no header'}"
    rows = partial(_table_rows, path, codec, best.delimiter, header, image_at, headed)
    return ListFile(path, about, rows, notes, header, sample)


class _Fit(NamedTuple):
    """How well a delimiter fits, the better the greater; and what it makes of the first rows."""

    rank: int  # 2: a header tells image and caption, 1: images without a header, 0: neither
    has_images: bool  # in most rows of one column
    fitting: float  # fraction of rows that are as wide as the first
    width: int
    delimiter: str
    rows: list[list[str]]


def _fit(lines: Sequence[str], delimiter: str) -> _Fit:
    rows = [fields for fields, _ in islice(_split_rows(((line, -1) for line in lines), delimiter), SAMPLED)]
    if not rows or len(rows[0]) < 2:
        return _Fit(0, False, 0.0, 0, delimiter, rows if delimiter == "," else [])
    header = [name.strip() for name in rows[0]]
    fitting = sum(len(row) == len(header) for row in rows) / len(rows)
    if delimiter == _WORDS:
        found = names_image(header[0])
        return _Fit(int(found), found, 0.5 * fitting * found, 0, delimiter, rows if found else [])
    first_is_row = any(names_image(cell) or looks_embedded(cell) for cell in header)
    images = max(sum(names_image(row[at]) for row in rows[1:] if at < len(row)) for at in range(len(header)))
    rank = 2 if not first_is_row and guessable(header) else int(first_is_row)
    return _Fit(rank, 2 * images > len(rows) - 1 > 0, fitting, len(header), delimiter, rows)


def _table_lines(path: Path, codec: str, offset: int = 0) -> Iterator[Line]:
    for number, line in enumerate(_lines(path, codec, offset=offset)):
        if number or not _SEPARATOR.fullmatch(line[0].strip("\ufeff\r\n")):
            yield line


def _table_rows(path: Path, codec: str, delimiter: str, header: Sequence[str], image_at: int | None, headed: bool,
                offset: int = 0) -> Iterator[Found]:
    width = len(header)
    found = _split_rows(_table_lines(path, codec, offset), delimiter, width, image_at)
    for fields, place in islice(found, int(headed and not offset), None):
        if len(fields) > width and not any(field.strip() for field in fields[width:]):
            del fields[width:]
        if len(fields) == width:
            yield Found(dict(zip(header, map(str.strip, fields), strict=True)), place)
        else:
            image = fields[image_at].strip() if image_at is not None and image_at < len(fields) else ""
            yield Found(f"{len(fields)} fields in the row, {width} in the header", place, image)


def _split_rows(lines: Iterator[Line], delimiter: str, width: int | None = None, image_at: int | None = None
                ) -> Iterator[tuple[list[str], int]]:
    """Yield the fields and the place of rows that are not blank.

    Fields may be quoted as RFC 4180 has it, line breaks included. A quote that is never closed, or whose field would
    swallow lines that are rows by themselves, known by `width` and by the place of the image, is taken literally.
    """
    waiting: deque[Line] = deque()
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        text, place = line[0].strip("\r\n"), line[1]
        if not text.strip():
            continue
        if delimiter == _WORDS:
            yield text.split(None, 1), place
            continue
        fields, taken = text.split(delimiter), [line]
        if '"' in text:
            quoted, closed = _quoted(taken, delimiter)
            while not closed and len(taken) < _OPEN_LINES:
                more = waiting.popleft() if waiting else next(lines, None)
                if more is None:
                    break
                taken.append(more)
                if '"' in more[0]:
                    quoted, closed = _quoted(taken, delimiter)
            if closed and not (len(taken) > 1 and _are_rows(taken[1:], delimiter, width, image_at)):
                fields = quoted
            else:
                waiting.extendleft(reversed(taken[1:]))
        yield fields, place


def _quoted(lines: Iterable[Line], delimiter: str) -> tuple[list[str], bool]:
    """Return the fields of a row, and whether its last quote is closed."""
    text = (line.strip("\r\n").replace("\r", "\0") + "\n" for line, _ in lines)  # csv would end the row at it
    fields = next(csv.reader(text, delimiter=delimiter, skipinitialspace=True), [])
    fields = [field.replace("\0", "\r") for field in fields]
    return fields, not fields or not fields[-1].endswith("\n")


def _are_rows(lines: Sequence[Line], delimiter: str, width: int | None, image_at: int | None) -> bool:
    rows = [line.rstrip("\r\n").split(delimiter) for line, _ in lines]
    if width is None or width < 2 or any(len(fields) != width for fields in rows):
        return False
    return width > 2 if image_at is None else all(names_image(fields[image_at]) for fields in rows)


# Shapes of JSON documents


class _Shape(NamedTuple):
    about: str
    rows: Iterable[Fields]
    given: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


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
        return _Shape("JSON object", [flat(content)])
    keyed = _keyed(content)
    if keyed is not None:
        return _Shape("JSON by image", keyed)
    inner = [value for value in content.values() if isinstance(value, dict | list) and value]
    if len(inner) == 1:
        return _shape_of(path, inner[0], split)
    raise DataError(f"{path} is JSON, but neither a list of objects, nor captions by image, nor COCO captions "
                    "('images' and 'annotations')")


def _item(one: Any) -> Fields:
    if isinstance(one, dict):
        name = next(iter(one)) if len(one) == 1 else ""
        return {"image": name, "caption": one[name]} if names_image(name) else flat(one)
    if isinstance(one, list) and len(one) >= 2:
        return {str(number): value for number, value in enumerate(one, start=1)}
    return "not a JSON object"


def flat(one: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with the fields of objects in it beside its own, as `outer.inner`."""
    fields = dict(one)
    for name, value in one.items():
        if isinstance(value, dict) and not value.keys() & {"bytes", "path"}:
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
    return _Shape("COCO captions", rows, ("image", "caption", "tags", "label"), notes)


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


