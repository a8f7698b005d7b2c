"""Parquet and Arrow files, and what Hugging Face's `save_to_disk` and hub hold: columns on a disk, read by groups."""

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aclip.data.sources.base import WINDOW, RawSample, Runs, Source, Summary, digest_of, printable, relative_names
from aclip.data.sources.columns import OPTIONS, Columns, Row, row_of, settle_columns
from aclip.data.sources.image_files import ImageFiles, embedded_image, looks_embedded, read_image
from aclip.data.sources.lists import ListSource
from aclip.data.sources.records import choose_split
from aclip.data.spec import Spec
from aclip.errors import BadSampleError, ConfigError, DataError, MissingDependencyError

_ROWS_AT_ONCE = 4096
_SAVED = "dataset_dict.json"
_SAVED_SPLIT = "state.json"


@dataclass(frozen=True)
class _File:
    """One file of columns, closed."""

    path: Path
    groups: tuple[int, ...]  # rows of its row groups, or record batches
    schema: Any
    parquet: bool  # else Arrow

    def read(self, columns: list[str], group: int) -> list[Any]:
        """Return some columns of a row group of Parquet, or of all batches of Arrow, which are mapped."""
        import pyarrow.parquet

        if not self.parquet:
            return [batch.select(columns) for batch in _arrow_batches(self.path)]
        with pyarrow.parquet.ParquetFile(self.path) as file:
            return [file.read_row_group(group, columns=columns)]

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """Yield the columns piece by piece."""
        import pyarrow.parquet

        if self.parquet:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                yield from file.iter_batches(columns=columns, batch_size=_ROWS_AT_ONCE)
            return
        for batch in self.read(columns, 0):
            batch.validate(full=True)
            yield batch


class ColumnarSource(Source):
    """Pairs whose images lie in the files themselves, as Hugging Face and img2dataset write them.

    An image is bytes, or a struct of `bytes` and `path`; where its bytes are null, the file is read whose path
    may be relative to the columnar file's folder.

    Parquet is read a row group at a time, so each process keeps the last `WINDOW` of them, as many as
    training draws from at a time. Arrow files are mapped and give any row at once. No file stays open.
    """

    def __init__(self, spec: str, files: Sequence[_File], columns: Columns, notes: Sequence[str] = ()) -> None:
        self.spec = spec
        self._files, self._columns, self._notes = tuple(files), columns, tuple(notes)
        self._places = [(file, group) for file, one in enumerate(files) for group in range(len(one.groups))]
        sizes = tuple(size for one in files for size in one.groups)
        self._runs, self.groups = Runs(sizes), sizes if files[0].parquet else ()
        self._labels = _class_names(files[0].schema, columns.label)
        self._names = relative_names([one.path.absolute().as_posix() for one in files])
        self._kept: OrderedDict[tuple[int, bool], list[Any]] = OrderedDict()
        self._sound: set[tuple[int, bool, int]] = set()
        if not len(self):
            raise DataError(f"{spec} holds no rows")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict(), "_sound": set()}

    def __len__(self) -> int:
        return len(self._runs)

    def name(self, index: int) -> str:
        place, row = self._runs.place(index)
        file, group = self._places[place]
        return printable(f"{self._names[file]}: group {group + 1}, row {row + 1}")

    def captions(self, index: int) -> tuple[str, ...]:
        return self._row(self._fields(index, with_image=False)).captions

    def read(self, index: int) -> RawSample:
        fields = self._fields(index, with_image=True)
        file, _ = self._places[self._runs.place(index)[0]]
        data = _image_bytes(fields.get(self._columns.image), self._files[file].path.parent)
        row = self._row(fields)
        return RawSample(self.name(index), data, row.captions, row.tags, row.label or None)

    @property
    def summary(self) -> Summary:
        return Summary(self.spec, len(self), len(self), notes=self._notes)

    def digest(self) -> str:
        return digest_of([(one.path.name, one.groups) for one in self._files], self._columns)

    def _row(self, fields: Mapping[str, Any]) -> Row:
        row = row_of({**fields, self._columns.image: ""}, self._columns)
        if not row.label.isdecimal() or int(row.label) >= len(self._labels):
            return row
        label = self._labels[int(row.label)]
        only_classes = self._columns.captions == (self._columns.label,)
        return row._replace(label=label, captions=(label,) if only_classes else row.captions)

    def _fields(self, index: int, with_image: bool) -> dict[str, Any]:
        place, row = self._runs.place(index)
        file, group = self._places[place]
        key = (place if self.groups else file, with_image)
        try:
            batches = self._kept.pop(key, None)
            if batches is None:
                names = [name for name in self._columns.names() if with_image or name != self._columns.image]
                batches = self._files[file].read(names, group)
                while len(self._kept) >= 2 * WINDOW:
                    self._kept.popitem(last=False)
            self._kept[key] = batches
            batch = batches[0 if self.groups else group]
            if not self.groups and (*key, group) not in self._sound:
                batch.validate(full=True)  # Arrow follows the offsets of mapped files unchecked
                self._sound.add((*key, group))
            fields: dict[str, Any] = batch.slice(row, 1).to_pylist()[0]
        except _errors() as error:
            raise BadSampleError(f"cannot read {self._names[file]}: {error}") from error
        return fields


def open_columnar(paths: Sequence[Path], spec: Spec) -> Source:
    """Open files of one schema, in this order; paths in them are relative to `images`, else to each file."""
    spec.allow(*OPTIONS, "images", "split")
    files = [_open(path) for path in paths]
    header = list(files[0].schema.names)
    for one in files[1:]:
        if list(one.schema.names) != header:
            raise DataError(f"{one.path} has other columns than {paths[0]}: {', '.join(one.schema.names)} "
                            f"in place of {', '.join(header)}")
    columns = settle_columns(spec, header, sample := _sample(files[0], header))
    kind = files[0].schema.field(columns.image).type
    kind = str(getattr(kind, "value_type", kind))  # of a list or dictionary, what is in it
    notes = [f"{len(files)} {'Parquet' if files[0].parquet else 'Arrow'} file{'s' * (len(files) > 1)}, {columns}"]
    images = spec.folder("images")
    is_text = kind in ("string", "large_string", "string_view", "null")
    if is_text and not (sample and looks_embedded(sample[0].get(columns.image))):
        rows = _rows(files, columns, own_folders=images is None)
        return ListSource(spec.path, rows, ImageFiles(paths[0].parent, images), notes=notes)
    if images is not None:
        raise ConfigError(f"{spec.path}: column '{columns.image}' holds {kind}, not paths: 'images' is for lists of "
                          f"paths")
    if is_text or "binary" in kind:  # a struct has its bytes among its fields
        return ColumnarSource(spec.path, files, columns, notes)
    raise DataError(f"{spec.path}: column '{columns.image}' holds {kind}, neither paths nor images")


def open_saved(folder: Path, spec: Spec) -> Source:
    """Open a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    split = spec.get("split")
    if (folder / _SAVED).is_file():
        splits = {path.parent.name: 1 for path in sorted(folder.glob(f"*/{_SAVED_SPLIT}"))}
        if not splits:
            raise DataError(f"{folder} cannot be read as a saved dataset: it has no splits")
        folder = folder / choose_split(folder.name, splits, split, alone=True)[0]
    elif split is not None:
        raise ConfigError(f"{folder} has no splits, so '?split={split}' names none")
    try:
        state = json.loads((folder / _SAVED_SPLIT).read_bytes())
        paths = [folder / Path(one["filename"]).name for one in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} cannot be read as a saved dataset: {error}") from error
    if not paths:
        raise DataError(f"{folder} holds no rows")
    return open_columnar(paths, spec.with_path(folder))


def is_saved(folder: Path) -> bool:
    return (folder / _SAVED).is_file() or all((folder / name).is_file() for name in (_SAVED_SPLIT, "dataset_info.json"))


def is_columnar(path: Path) -> bool:
    """Return whether a file starts as Parquet or Arrow files do."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        return False
    return head.startswith((b"PAR1", b"ARROW1")) or (head[:4] == b"\xff\xff\xff\xff" and path.suffix == ".arrow")


def _image_bytes(value: Any, folder: Path) -> bytes:
    """Return the bytes of an image: of bytes, base64, a path in `folder`, Hugging Face's object of bytes and path."""
    if isinstance(value, list) and value:
        value = value[0]
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    if isinstance(data, bytes):
        return data
    if not isinstance(path, str) or not path:
        raise BadSampleError("missing image")
    return embedded_image(path) or read_image(folder / path)


def _open(path: Path) -> _File:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} needs pyarrow to be read: pip install 'attentive-clip[parquet]'") from error
    with path.open("rb") as head:
        parquet = head.read(4) == b"PAR1" or path.suffix.lower() == ".parquet"
    try:
        if not parquet:
            batches = _arrow_batches(path)
            return _File(path, tuple(batch.num_rows for batch in batches), batches[0].schema, parquet=False)
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = tuple(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            schema = file.schema_arrow
    except _errors() as error:
        raise DataError(f"{path} cannot be read as a {'Parquet' if parquet else 'Arrow'} file: {error}") from error
    if any(size < 0 for size in groups):
        raise DataError(f"{path} cannot be read as a Parquet file: a row group of {min(groups)} rows")
    return _File(path, groups, schema, parquet=True)


def _arrow_batches(path: Path) -> list[Any]:
    import pyarrow

    source = pyarrow.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        file = pyarrow.ipc.open_file(source)
        return [file.get_batch(number) for number in range(file.num_record_batches)]
    source.seek(0)
    batches = list(pyarrow.ipc.open_stream(source))
    if not batches:
        raise DataError(f"{path} holds no rows")
    return batches


def _sample(file: _File, header: Sequence[str]) -> list[dict[str, Any]]:
    plain = [name for name in header if "binary" not in str(file.schema.field(name).type)]
    try:
        batch = next(file.batches(plain), None)
        return [] if batch is None or not plain else batch.slice(0, 20).to_pylist()
    except _errors():
        return []


def _class_names(schema: Any, label: str | None) -> list[str]:
    """Return the names of a column of class numbers, which Hugging Face keeps in the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, ValueError, TypeError):
        return []


def _errors() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for damaged files, text that is no UTF-8 and groups shorter than they say."""
    import pyarrow

    return (DataError, IndexError, OSError, ValueError, pyarrow.ArrowException)


def _rows(files: Sequence[_File], columns: Columns, own_folders: bool) -> Iterator[Row]:
    """Yield the pairs; with `own_folders`, an image's path is relative to the folder of its file, not of the first."""
    for file in files:
        elsewhere = own_folders and file.path.parent != files[0].path.parent
        try:
            for batch in file.batches(list(columns.names())):
                for fields in batch.to_pylist():
                    row = row_of(fields, columns)
                    if elsewhere and row.image:
                        row = row._replace(image=str(file.path.parent.absolute() / row.image))
                    yield row
        except _errors() as error:
            raise DataError(f"{file.path} cannot be read: {error}") from error
