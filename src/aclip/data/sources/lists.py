"""Lists of pairs: tables, JSON and Parquet with a row a pair, the image by its path, its id or in base64."""

import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

from aclip.data.sources.base import PackedStrings, RawSample, Source, Summary, digest_of, evenly, printable
from aclip.data.sources.columns import MAX_STORED, OPTIONS, Columns, Row, image_cell, row_of, settle_columns, texts
from aclip.data.sources.folder import SPLIT_NAMES
from aclip.data.sources.image_files import DOWNLOAD, ImageFiles, embedded_image, is_address, looks_embedded, read_image
from aclip.data.sources.records import Fields, Found, ListFile, choose_split, open_list
from aclip.data.spec import Spec
from aclip.errors import BadSampleError, ConfigError, DataError

_CHECKED = 5_000  # images of a list that are looked for when it is opened, evenly over a longer one
_LEARNT = 100  # images by which it is found out how a list writes their paths
_BETWEEN = "\0"  # strings of one row; no caption needs it, and no path can hold it
_PLACE = "\x1a"  # before the place in the list's own file where the image lies
_SPLIT_COLUMNS = ("split", "set", "partition", "subset", "fold")


class ListSource(Source):
    """Pairs listed in a file, kept packed in memory: some 40 bytes a row beside the text itself.

    Rows of one image, wherever they stand, are one sample with all of their captions: as samples of their own
    they would be each other's negatives in training, and right answers that count as wrong in retrieval.
    """

    def __init__(self, spec: str, rows: Iterable[Row], files: ImageFiles, *, notes: Sequence[str] = (),
                 embedded: Callable[[int], str] | None = None) -> None:
        """Keep `rows`, whose images `files` finds, or `embedded` reads as base64 from a place in the list."""
        self.spec = spec
        self._files, self._notes = files, list(notes)
        self._embedded: Callable[[int], str] | None = None  # only where needed: it may hold a whole document
        self._images, self._captions, self._tags, self._labels = (PackedStrings() for _ in range(4))
        self._problems: dict[int, str] = {}
        self._numbers: np.ndarray | None = None  # of each sample's first row, where images repeat
        keys, long = array("q"), 0
        base = str(files.folder)
        for number, row in enumerate(rows):
            image = _storable(row.image)
            self._images.append(image)
            self._captions.append(_join(row.captions))
            self._tags.append(_join(row.tags))
            self._labels.append(_storable(row.label))
            long += MAX_STORED in map(len, row.captions)
            usable = image and not row.problem
            if not usable:
                self._problems[number] = row.problem or "missing image path"
            if image.startswith(_PLACE):
                self._embedded = embedded
                usable = False  # no path to merge rows by
            keys.append(hash(_identity(image, base)) if usable else number)
        if not keys:
            raise DataError(f"{spec} holds no rows")
        if long:
            self._notes.append(f"{long:,} captions are truncated to {MAX_STORED:,} characters")
        self._merge(np.frombuffer(keys, dtype=np.int64))
        self._missing = self._find_images()

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        number = index if self._numbers is None else int(self._numbers[index])
        image = self._images[index]
        short = "" if image.startswith(_PLACE) else image[:40] if looks_embedded(image) else image
        return printable(f"row {number + 1}: {short}" if short else f"row {number + 1}")

    def captions(self, index: int) -> tuple[str, ...]:
        if index in self._problems:
            raise BadSampleError(self._problems[index])
        return tuple(self._captions[index].split(_BETWEEN))

    def path(self, index: int) -> Path | None:
        image = self._images[index]
        return None if index in self._problems or image.startswith(_PLACE) else self._files.find(image)

    def read(self, index: int) -> RawSample:
        captions = self.captions(index)
        tags = tuple(tag for tag in self._tags[index].split(_BETWEEN) if tag)
        return RawSample(self.name(index), self._image(self._images[index]), captions, tags,
                         self._labels[index] or None)

    @property
    def summary(self) -> Summary:
        unusable = len(self._problems)
        missing, example, looked = self._missing
        left_out = {"rows that cannot be read": unusable}
        notes = [*self._notes, *self._files.notes]
        if looked == len(self) - unusable or not missing:
            left_out[f"file missing: {example}" if example else "file missing"] = missing
        else:
            notes.append(f"{missing:,} of {looked:,} images that were looked for are missing: {example}")
            missing = 0
        used = len(self) - unusable - missing
        short = np.flatnonzero(self._captions.sizes() < 16).tolist()  # others cannot be blank
        blank = sum(not self._captions[index].strip("\0 ") for index in short if index not in self._problems)
        return Summary(self.spec, len(self), used - min(blank, used), min(blank, used), left_out, tuple(notes))

    def digest(self) -> str:
        return digest_of(self._images, self._captions, self._tags, self._labels, sorted(self._problems))

    def _image(self, image: str) -> bytes:
        if image.startswith(_PLACE) and self._embedded is not None:
            data = embedded_image(self._embedded(int(image[1:])))
            if data is None:
                raise BadSampleError("the image is not base64")
            return data
        path = self._files.path(image)
        try:
            with open(path, "rb") as file:
                return file.read()
        except (OSError, ValueError):
            if is_address(image):
                raise BadSampleError("the image is a URL, not a file: download it first") from None
            data = embedded_image(image)
            return read_image(Path(path)) if data is None else data

    def _merge(self, keys: np.ndarray) -> None:
        """Make one sample of the rows of each image, at the place of the first, whose tags and label it has.

        The (rows,) hashes of `_identity` tell ten million rows apart without an object for each.
        """
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        rows = len(keys)
        if len(first) == rows:
            return
        first_of = first[inverse]
        relabelled = sum(self._labels[row] != self._labels[int(first_of[row])]
                         for row in np.flatnonzero(first_of != np.arange(rows)).tolist())
        self._numbers = np.sort(first)
        self._captions = PackedStrings(self._together(
            np.argsort(first_of, kind="stable"), np.bincount(first_of, minlength=rows)[self._numbers]))
        self._images, self._tags, self._labels = (
            PackedStrings(strings[number] for number in self._numbers.data)
            for strings in (self._images, self._tags, self._labels))
        self._problems = {int(np.searchsorted(self._numbers, row)): why for row, why in self._problems.items()}
        other = f"; {relabelled} have another label, and the first is kept" if relabelled else ""
        self._notes.append(f"{rows - len(first):,} of {rows:,} rows repeat an image, which gets all captions{other}")

    def _together(self, order: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
        """Yield the captions of `sizes` rows at a time, taken in this order, each caption once."""
        rows = iter(order.data)
        for size in sizes.data:
            captions = [self._captions[row] for row in islice(rows, size)]
            if size > 1:
                every = dict.fromkeys(chain.from_iterable(one.split(_BETWEEN) for one in captions))
                captions = [_BETWEEN.join([one for one in every if one.strip()] or [""])]
            yield captions[0]

    def _find_images(self) -> tuple[int, str, int]:
        """Learn where the images lie; return how many of some are missing, the first of them, and how many are some."""
        cells = [(index, cell) for index in evenly(len(self), _CHECKED) if index not in self._problems
                 and not (cell := self._images[index]).startswith(_PLACE)]
        local = [cell for _, cell in cells if not is_address(cell) and not looks_embedded(cell)]
        if by_name := self._files.learn([local[at] for at in evenly(len(local), _LEARNT)]):
            every = map(self._images.__getitem__, range(len(self)))
            self._images = PackedStrings(by_name(cell) or cell for cell in every)
            local = [self._images[index] for index, _ in cells]
        missing = [cell for cell in local if self._files.find(cell) is None]
        if local and len(missing) == len(local) and not any(looks_embedded(cell) for _, cell in cells):
            where = printable(self._files.path(missing[0][:1000]))[:1200]
            advice = f": say where they lie with '{self.spec}?images=FOLDER'" * self._files.around
            raise DataError(f"{self.spec}: none of its images is there, {len(local):,} were looked for, first {where}"
                            f"{advice}")
        if cells and not local and is_address(cells[0][1]):
            raise DataError(f"{self.spec}: its images are URLs, such as {cells[0][1][:200]}: {DOWNLOAD}")
        return len(missing), printable(missing[0][:200]) if missing else "", len(cells)


def _identity(image: str, folder: str) -> str:
    """Return what the rows of one image share: its path."""
    path = image.replace("\\", "/")
    path = path if path.startswith("/") else f"{folder}/{path}"
    return path if "/../" in path else os.path.normpath(path)  # what is above a link to a folder is elsewhere


def open_list_source(path: Path, spec: Spec) -> ListSource:
    """Open a table, JSON lines or a JSON document."""
    spec.allow(*OPTIONS, "images", "split", "encoding")
    split = spec.get("split")
    file = open_list(path, spec.get("encoding"), split)
    stored = _open_stored(file)
    if stored is not None:
        return stored
    if file.given is not None:
        if spec.options.keys() & set(OPTIONS):
            raise ConfigError(f"{path} is {file.about}, whose fields are known: it takes no 'image' and 'caption'")
        columns = Columns(file.given[0], file.given[1:2], *file.given[2:])
    else:
        columns = settle_columns(spec.with_path(path), file.header, file.sample)
    notes = [f"{file.about}, {columns}", *file.notes]
    wanted, split_of = _splits(file, columns.image, split, notes)
    found = file.rows()
    if wanted:
        found = (one for one in found if isinstance(one.fields, str) or split_of(one.fields) in wanted)
    files = ImageFiles(path.parent, spec.folder("images"), (path.stem.rpartition("_")[2].lower(),))
    embedded = partial(_read_embedded, file.rows, columns.image)
    return ListSource(str(path), _rows(found, columns), files, notes=notes, embedded=embedded)


def _rows(records: Iterable[Found], columns: Columns) -> Iterator[Row]:
    for fields, offset, image in records:
        if isinstance(fields, str):
            yield Row(image, problem=fields)
        elif offset >= 0 and looks_embedded(fields.get(columns.image)):
            yield row_of({**fields, columns.image: f"{_PLACE}{offset}"}, columns)
        else:
            row = row_of(fields, columns)
            name, mark, number = row.image.rpartition("#")  # Flickr8k.token.txt: 123.jpg#0
            numbered = mark and number.isdecimal() and not os.path.exists(row.image)
            yield row._replace(image=name) if numbered else row


def _read_embedded(rows: Callable[..., Iterator[Found]], column: str, offset: int) -> str:
    """Return the image in base64 of the row at a place in a list."""
    try:
        fields = next(rows(offset=offset)).fields
    except (OSError, StopIteration) as error:
        raise BadSampleError(f"cannot read the list: {error}") from error
    return "" if isinstance(fields, str) else str(fields.get(column, "")).strip()


def _splits(file: ListFile, image: str, split: str | None, notes: list[str]
            ) -> tuple[list[str], Callable[[Fields], str]]:
    """Return the splits that were asked for, none to take all rows, and what tells the split of a row."""
    column = next((name for name in file.header if name.strip().lower() in _SPLIT_COLUMNS), None)

    def split_of(fields: Fields) -> str:
        if isinstance(fields, str):
            return ""
        if column is not None:
            return str(fields.get(column)).strip()
        folders = image_cell(fields.get(image)).replace("\\", "/").split("/")[:-1]
        return next((name for name in folders if name.lower() in SPLIT_NAMES), "")

    if file.given is not None or "split" in file.about or not (split or any(map(split_of, file.sample))):
        return [], split_of
    sizes = Counter(filter(None, (split_of(one.fields) for one in file.rows())))
    if split is not None and not sizes:
        raise ConfigError(f"{file.path} has no splits: no column 'split', and no folders such as 'train' in its paths")
    if split is not None:
        return choose_split(file.path.name, sizes, split), split_of
    if len(sizes) > 1 and all(name.lower() in SPLIT_NAMES for name in sizes):
        there = ", ".join(f"{name} ({count:,})" for name, count in sizes.items())
        notes.append(f"all of its splits are read, {there}: '?split={next(iter(sizes))}' takes one")
    return [], split_of


def _open_stored(file: ListFile) -> ListSource | None:
    """Open the layout of Chinese-CLIP: a table of ids and images in base64, `train_imgs.tsv`, beside JSON lines of
    captions that name `image_ids`, `train_texts.jsonl`; given either. None: the file is neither."""
    folder, name = file.path.parent, file.path.name
    if "image_ids" in file.header:
        stem = name.partition("_texts")[0]
        other = next((path for path in (folder / f"{stem}_imgs.tsv", folder / f"{stem}.tsv") if path.is_file()), None)
        if other is None:
            return None
        images, captions = open_list(other), file
    else:
        if len(file.header) != 2 or not file.sample or not any(map(looks_embedded, file.sample[0].values())):
            return None
        other = folder / f"{name.rpartition('_imgs')[0]}_texts.jsonl"
        if not other.is_file():
            if file.header != ["1", "2"]:
                return None
            raise DataError(f"{file.path} holds images in base64 and no captions: they belong into {other.name} beside "
                            "it")
        images, captions = file, open_list(other)
    said: dict[str, list[str]] = {}
    for fields, *_ in captions.rows():
        if not isinstance(fields, str) and isinstance(ids := fields.get("image_ids"), list):
            for one in ids:
                said.setdefault(str(one), []).extend(texts(fields.get("text")))
    key, image = sorted(images.header, key=lambda name: looks_embedded(images.sample[0][name]))
    rows = (row._replace(captions=tuple(said.get(row.label, ())), label="")
            for row in _rows(images.rows(), Columns(image, (), label=key)))
    notes = (f"images in base64 from {images.path.name}, captions from {captions.path.name}",)
    embedded = partial(_read_embedded, images.rows, image)
    return ListSource(str(file.path), rows, ImageFiles(folder), notes=notes, embedded=embedded)


def _join(strings: Sequence[str]) -> str:
    return _storable(_BETWEEN.join(string.replace(_BETWEEN, " ") for string in strings))


def _storable(string: str) -> str:
    """Return the string with halves of surrogate pairs replaced, which JSON can hold and UTF-8 cannot."""
    try:
        string.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return string.encode("utf-8", errors="replace").decode("utf-8")
    return string
