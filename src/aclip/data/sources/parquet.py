"""Parquet files: pairs with the picture's path in a column, or with the picture itself."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aclip.data.sources.base import WINDOW, RawSample, Runs
from aclip.data.sources.manifest import Columns, ManifestSource, Row, read_picture, row_of, settle_columns
from aclip.errors import BadSampleError, ConfigError, DataError, MissingDependencyError

_log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 4096


def open_parquet(
    name: str, paths: list[Path], columns: Columns | None = None, images: Path | None = None
) -> "ManifestSource | EmbeddedPictures":
    """Open Parquet files of one schema, in this order; paths in them are relative to `images`, else to each file.

    Raises:
        DataError: a file that is not Parquet, of another schema, no rows, or no pictures (`ManifestSource`).
        ConfigError: a column that does not exist or cannot be guessed; the columns there are. A folder of pictures
            for files that hold the pictures themselves.
        MissingDependencyError: pyarrow is not installed.
    """
    files = [_open(path) for path in paths]
    header = files[0].schema_arrow.names
    for path, file in zip(paths, files, strict=True):
        if file.schema_arrow.names != header:
            raise DataError(f"{path} has other columns than {paths[0]}: {', '.join(file.schema_arrow.names)} "
                            f"in place of {', '.join(header)}")
    columns = settle_columns(name, header, columns)
    _log.info("%s: %d rows, %s", name, sum(file.metadata.num_rows for file in files), columns)
    kind = files[0].schema_arrow.field(columns.image).type
    if _is_one_of(kind, "string", "large_string", "string_view"):
        return ManifestSource(paths[0], _rows(files, paths, columns, own_folders=images is None), images)
    if images is not None:
        raise ConfigError(f"{name}: column '{columns.image}' holds {kind}, not paths: 'images' is for lists of paths")
    if _is_one_of(kind, "binary", "large_binary", "binary_view") or _has_bytes(kind):
        return EmbeddedPictures(name, paths, [_group_sizes(*one) for one in zip(files, paths, strict=True)], columns)
    raise DataError(f"{name}: column '{columns.image}' holds {kind}, neither paths nor pictures")


class EmbeddedPictures:
    """Pairs whose pictures lie in the Parquet files themselves, as Hugging Face and img2dataset write them.

    A picture is bytes, or a struct of `bytes` and `path`; where its bytes are null, the file is read, whose path
    may be relative to the Parquet file's folder.

    Parquet is read a row group at a time, so each process keeps the last `WINDOW` of them, as many as
    training draws from at a time (`aclip.data.order.window_order`).

    Attributes:
        name: what the user called it.
        groups: see `Grouped`; the row groups.
    """

    def __init__(self, name: str, paths: list[Path], groups: list[list[int]], columns: Columns) -> None:
        """Number the rows of `paths`, which have row groups of these sizes."""
        self.name = name
        self.groups = tuple(size for sizes in groups for size in sizes)
        self._paths, self._columns = paths, columns
        self._places = [(file, group) for file, sizes in enumerate(groups) for group in range(len(sizes))]
        self._runs = Runs(self.groups)
        self._kept: dict[int, Any] = {}
        if not len(self):
            raise DataError(f"{name} holds no rows")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kept row groups behind when the source goes to a worker."""
        return self.__dict__ | {"_kept": {}}

    def __len__(self) -> int:
        return len(self._runs)

    def key(self, index: int) -> str:
        """Return the file's name and the number of the row group and of the row in it."""
        place, row = self._runs.place(index)
        file, group = self._places[place]
        return f"{self._paths[file].name}: group {group + 1}, row {row + 1}"

    def read(self, index: int) -> RawSample:
        """Read one row.

        Raises:
            BadSampleError: no picture, or a file that cannot be read any more.
        """
        place, row = self._runs.place(index)
        path = self._paths[self._places[place][0]]
        try:
            fields: dict[str, Any] = self._group(place).slice(row, 1).to_pylist()[0]
        except _errors() as error:
            raise BadSampleError(f"cannot read {path.name}: {error}") from error
        data = picture_bytes(fields.get(self._columns.image), path.parent)
        parsed = row_of(fields, self._columns)
        return RawSample(self.key(index), data, parsed.captions, tags=parsed.tags, label=parsed.label or None)

    def _group(self, place: int) -> Any:
        """Return a row group, and keep it as the one used last."""
        table = self._kept.pop(place, None)
        if table is None:
            file, group = self._places[place]
            table = _open(self._paths[file]).read_row_group(group, columns=list(self._columns.names()))
            if len(self._kept) >= WINDOW:
                del self._kept[next(iter(self._kept))]
        self._kept[place] = table
        return table


def _open(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} needs pyarrow to be read: pip install 'attentive-clip[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except _errors() as error:
        raise DataError(f"{path} cannot be read as a Parquet file: {error}") from error


def _group_sizes(file: Any, path: Path) -> list[int]:
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if any(size < 0 for size in sizes):
        raise DataError(f"{path} cannot be read as a Parquet file: a row group of {min(sizes)} rows")
    return sizes


def _is_one_of(kind: Any, *names: str) -> bool:
    """Return whether an Arrow type, or that of the values of a dictionary, has one of these names."""
    return str(getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind) in names


def _has_bytes(kind: Any) -> bool:
    return str(kind).startswith("struct") and any(field.name == "bytes" for field in kind)


def picture_bytes(value: Any, folder: Path) -> bytes:
    """Return the bytes of a picture's cell: bytes, a path in `folder`, or Hugging Face's object of both.

    Raises:
        BadSampleError: there are none, or the file that is named in their place cannot be read.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return data
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path:
        raise BadSampleError("missing picture")
    return read_picture(folder / path)


def _errors() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises for damaged files, text that is no UTF-8 and groups shorter than they say."""
    import pyarrow

    return (DataError, IndexError, OSError, ValueError, pyarrow.ArrowException)


def _rows(files: list[Any], paths: list[Path], columns: Columns, own_folders: bool) -> Iterator[Row]:
    """Yield the pairs; with `own_folders`, a picture's path is relative to the folder of its file, not of the first."""
    for file, path in zip(files, paths, strict=True):
        try:
            for batch in file.iter_batches(columns=list(columns.names()), batch_size=_ROWS_AT_ONCE):
                for fields in batch.to_pylist():
                    row = row_of(fields, columns)
                    elsewhere = own_folders and path.parent != paths[0].parent and row.image
                    yield row._replace(image=str(path.parent.absolute() / row.image)) if elsewhere else row
        except _errors() as error:
            raise DataError(f"{path} cannot be read: {error}") from error
