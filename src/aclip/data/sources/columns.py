"""Which fields of a list hold the image, its captions, tags and class, and what counts as text in them."""

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from aclip.data.sources.image_files import DOWNLOAD, ENDINGS, looks_embedded
from aclip.data.spec import Spec, as_named
from aclip.errors import BadSampleError, ConfigError, unknown_name

IMAGE_COLUMNS = (
    "filepath", "image", "image_path", "imagepath", "image_file", "image_filename", "image_file_name", "image_name",
    "img", "img_path", "img_file", "img_name", "path", "paths", "file", "file_path", "filename", "file_name", "fname",
    "picture", "photo", "images", "image_paths", "filenames", "file_names", "files", "jpg", "png", "jpeg", "webp",
    "local_path", "relative_path", "image_id", "imageid", "img_id", "photo_id", "id",
)  # fmt: skip
"""Field names that are taken for the image, in this order, whatever their case; ids count only if they name files."""

CAPTION_COLUMNS = (
    "caption", "captions", "title", "text", "caption_text", "comment", "raw", "label", "description", "alt_text", "alt",
    "sentence", "sentences", "prompt", "caption_reference_description", "short_caption", "long_caption",
    "productdisplayname", "product_name", "product_title", "report", "findings", "impression", "finding_labels",
    "annotations", "txt", "conversations", "name", "category", "class",
)  # fmt: skip
"""Likewise for the caption; of `title` and `description` both are captions, as in YFCC."""

TAG_COLUMNS = ("tags", "keywords")  # likewise for tags, separated by commas or semicolons
LABEL_COLUMNS = ("label", "class", "category", "class_name", "label_name", "species", "target")
"""Likewise for the class."""

OPTIONS = ("image", "caption", "tags", "label")  # the options of a specification that name columns
MAX_STORED = 20_000  # characters of a caption that are kept; ten times what is tokenised

_URL = re.compile(r"https?://", re.IGNORECASE)
_IMAGE_NAME = re.compile(rf"\w\.({'|'.join(sorted(ENDINGS))})(#\d+)?$", re.IGNORECASE)
_WHOLE_FLOAT = re.compile(r"^(-?\d+)\.0+$")
_IDS = ("id", "image_id", "imageid", "img_id", "photo_id", "images")
_TEXTS = ("caption", "raw", "text", "value", "content", "sentence", "title", "label")  # keys of an object's text
_PATHS = ("path", "file_name", "filename", "url", "src", "id")  # likewise of what names an image
_PROSE = 1.5  # words of a typical caption where no column is named like one


@dataclass(frozen=True)
class Columns:
    """Which fields hold what."""

    image: str  # its path, id or bytes
    captions: tuple[str, ...]  # none where the list has classes alone
    tags: str | None = None
    label: str | None = None

    def names(self) -> tuple[str, ...]:
        optional = (name for name in (self.tags, self.label) if name is not None)
        return tuple(dict.fromkeys((self.image, *self.captions, *optional)))

    def __str__(self) -> str:
        if not self.captions:
            return f"image from '{self.image}', no captions"
        captions = "' and '".join(self.captions)
        return f"image from '{self.image}', caption from '{captions}'"


class Row(NamedTuple):
    """One pair of a list; captions, tags and label as in `RawSample`, an empty label is none."""

    image: str  # what names the image, see `aclip.data.sources.image_files`
    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    label: str = ""
    problem: str = ""  # why the row cannot be used, if it cannot


def texts(value: Any) -> tuple[str, ...]:
    """Return the texts in a field: one, a list of them, numbers as they are written, or none.

    A string that is itself a JSON or Python list of strings (`'["a dog", "a brown dog"]'`) is that list, and of
    objects, such as turns of a conversation about an image, the text is taken.
    """
    if isinstance(value, str):
        found = _listed(value)
        return (value[:MAX_STORED],) if found is None else tuple(text[:MAX_STORED] for text in found)
    if isinstance(value, bool) or value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, int | float):
        whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
        return (str(int(value) if whole else value),)
    if isinstance(value, Mapping):
        if value.get("from", value.get("role", "assistant")) in ("human", "user", "system"):
            return ()
        return next((texts(value[name]) for name in _TEXTS if isinstance(value.get(name), str | list)), ())
    return tuple(text for item in value for text in texts(item)) if isinstance(value, list | tuple) else ()


def _listed(value: str) -> list[str] | None:
    """Return the strings in a string that is a JSON or Python list of strings; None: it is not."""
    if value[:2] in ('["', "['") and value.rstrip().endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                items = parse(value)
                if items and all(isinstance(item, str) for item in items):
                    return list(items)
    return None


def label_of(value: Any) -> str:
    """Return a class as text: whole numbers without the ".0" that tables with gaps give them, "" for none."""
    found = (str(value),) if isinstance(value, bool) else texts(value)
    text = found[0].strip() if len(found) == 1 else ""
    return "" if not text or text.lower() in ("nan", "<na>") else _WHOLE_FLOAT.sub(r"\1", text)


def split_tags(values: Iterable[str]) -> tuple[str, ...]:
    """Return the tags in texts that separate them by commas or semicolons."""
    return tuple(tag.strip() for value in values for tag in value.replace(";", ",").split(",") if tag.strip())


def image_cell(value: Any) -> str:
    """Return what names an image: a path, an address or an id; "" for none."""
    if isinstance(value, str):
        return (_listed(value) or [value])[0].strip()
    if isinstance(value, Mapping):
        return next((image_cell(value[name]) for name in _PATHS if value.get(name)), "")
    if isinstance(value, list | tuple):
        return image_cell(value[0]) if value else ""
    return "".join(texts(value))


def json_object(data: bytes | str) -> dict[str, Any]:
    """Return the object in a JSON file that describes one image."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"JSON that cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise BadSampleError("JSON that is not an object")
    return fields


def row_of(fields: Mapping[str, Any], columns: Columns) -> Row:
    """Return the row of an object whose values may be strings, lists of strings, numbers or nothing."""
    captions = texts(fields.get(columns.captions[0])) if columns.captions else ()
    for name in columns.captions[1:]:
        captions += texts(fields.get(name))
    if len(captions) > 1:
        captions = tuple(text for text in captions if text.strip())
    tags = () if columns.tags is None else split_tags(texts(fields.get(columns.tags)))
    label = "" if columns.label is None else label_of(fields.get(columns.label))
    return Row(image_cell(fields.get(columns.image)), captions, tags, label)


def settle_columns(spec: Spec, header: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> Columns:
    """Return the columns that a list's specification names, else those that all names and the first rows tell."""
    named = spec.options.keys() & set(OPTIONS)
    columns = _chosen(spec, header) if named else _guess(spec, header, sample)
    for column in columns.names():
        if header.count(column) > 1:
            raise ConfigError(f"{spec.path} has {header.count(column)} columns named '{column}': rename all but one")
    return columns


def _chosen(spec: Spec, header: Sequence[str]) -> Columns:
    if "image" not in spec.options or "caption" not in spec.options:
        raise ConfigError(f"'{spec.text}': name both columns, as in '{spec.path}?image=COLUMN&caption=COLUMN'")

    def exact(name: str) -> str:
        chosen = as_named(name, header.__contains__)
        if chosen not in header:
            raise ConfigError(f"{spec.path}: {unknown_name('column', chosen, [name[:60] for name in header[:40]])}")
        return chosen

    tags, label = (exact(spec.options[name]) if name in spec.options else None for name in ("tags", "label"))
    caption = spec.options["caption"]
    captions = (caption,) if caption in header else tuple(map(exact, caption.split(",")))
    return Columns(exact(spec.options["image"]), captions, tags, label)


def guessable(header: Sequence[str]) -> bool:
    image = _first(IMAGE_COLUMNS, header)
    return image is not None and _first(CAPTION_COLUMNS, [name for name in header if name != image]) is not None


def names_image(value: Any) -> bool:
    """Return whether a value reads like the name of an image file."""
    if not isinstance(value, str) or len(value) > 1000 or _URL.match(value.strip()):
        return False
    return _IMAGE_NAME.search(value.strip()) is not None


def _guess(spec: Spec, header: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> Columns:
    image = _image_column(header, sample)
    urls = [name for name in header if any(_URL.match(image_cell(row.get(name))) for row in sample[:5])]
    if image is None and urls:
        raise ConfigError(f"{spec.path}: column '{urls[0]}' has URLs, and none has paths of images: {DOWNLOAD}")
    rest = [name for name in header if name != image]
    plain = [name for name in CAPTION_COLUMNS if name not in ("raw", "name")]
    caption = _first([*plain, "raw"], rest) or _prose_column(rest, sample) or _first(("name",), rest)
    label = _first(LABEL_COLUMNS, rest)
    if caption is None and header == ["1", "2"]:
        caption = label = rest[0]  # names and numbers of classes
    if image is None or caption is None:
        what, example = ("image", "image") if image is None else ("caption", CAPTION_COLUMNS[0])
        names = ", ".join(name[:60] for name in header[:40]) or "none"
        raise ConfigError(f"{spec.path}: no column looks like the {what}; there are: {names}; name it '{example}', or "
                          f"say which with '{spec.path.rpartition('/')[2]}?image=COLUMN&caption=COLUMN'")
    captions = [caption]
    if _normalised(caption) == "title" and (description := _first(("description",), rest)):
        captions.append(description)
    return Columns(image, tuple(captions), _first(TAG_COLUMNS, rest), label)


def _image_column(header: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the field of images: by name if its values can be files, else the one whose values read like files."""
    cells = {name: [image_cell(row.get(name)) for row in sample] for name in header}
    named = {name: sum(names_image(cell) or looks_embedded(cell) for cell in cells[name]) for name in header}
    by_content = max(named, key=lambda name: named[name], default=None)
    for known in IMAGE_COLUMNS:
        name = _first((known,), header)
        if name is None:
            continue
        addresses = sample and all(map(_URL.match, cells[name]))
        if addresses or (known in _IDS and by_content is not None and named[by_content] > named[name]):
            continue
        return name
    return by_content if by_content is not None and 2 * named[by_content] > len(sample) > 0 else None


def _prose_column(header: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the field with the longest texts of several words."""
    words = {name: sum(len(text.split()) for row in sample for text in texts(row.get(name))) for name in header
             if not any(names_image(row.get(name)) or _URL.match(image_cell(row.get(name))) for row in sample)}
    best = max(words, key=lambda name: words[name], default=None)
    return best if best is not None and words[best] > _PROSE * len(sample) else None


def _first(known: Sequence[str], header: Sequence[str]) -> str | None:
    """Return the column that comes first in `known`: by its name, else by the last part of a nested field's name."""
    whole = {_normalised(name): name for name in reversed(header)}
    last = {_normalised(name).rpartition(".")[2]: name for name in reversed(header)}
    return next((names[name] for name in known for names in (whole, last) if name in names), None)


def _normalised(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")
