"""Parquet files: pairs with the picture's path in a column, or with the picture itself."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aclip.data.sources.base import WINDOW, RawSample
from aclip.data.sources.manifest import Columns, ManifestSource, Row, row_of, settle_columns
from aclip.errors import BadSampleError, DataError, MissingDependencyError

_log = logging.getLogger(__name__)


def open_parquet(name: str, paths: list[Path], columns: Columns | None = None) -> "ManifestSource | EmbeddedPictures":
    """Open Parquet files of one schema, in this order.

    Raises:
        DataError: a file that is not Parquet, of another schema, or no rows.
        ConfigError: a column that does not exist or cannot be guessed; the columns there are.
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
    if str(kind) in ("string", "large_string"):
        return ManifestSource(Path(name) if len(paths) == 1 else paths[0], _rows(files, paths, columns))
    if str(kind) in ("binary", "large_binary") or str(kind).startswith("struct<bytes: "):
        return EmbeddedPictures(name, paths, [_group_sizes(file) for file in files], columns)
    raise DataError(f"{name}: column '{columns.image}' holds {kind}, neither paths nor pictures")


class EmbeddedPictures:
    """Pairs whose pictures lie in the Parquet files themselves, as Hugging Face and img2dataset write them.

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
        self._ends = np.cumsum(self.groups, dtype=np.int64)
        self._kept: dict[int, Any] = {}
        if not len(self):
            raise DataError(f"{name} holds no rows")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kept row groups behind when the source goes to a worker."""
        return self.__dict__ | {"_kept": {}}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def key(self, index: int) -> str:
        """Return the file's name and the number of the row group and of the row in it."""
        place, row = self._place(index)
        file, group = self._places[place]
        return f"{self._paths[file].name}: group {group + 1}, row {row + 1}"

    def read(self, index: int) -> RawSample:
        """Read one row.

        Raises:
            BadSampleError: no picture, or a file that cannot be read any more.
        """
        place, row = self._place(index)
        fields: dict[str, Any] = self._group(place).slice(row, 1).to_pylist()[0]
        image = fields.get(self._columns.image)
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            raise BadSampleError("missing picture")
        parsed = row_of(fields, self._columns)
        return RawSample(self.key(index), data, parsed.captions, tags=parsed.tags, label=parsed.label or None)

    def _place(self, index: int) -> tuple[int, int]:
        place = int(np.searchsorted(self._ends, index, side="right"))
        return place, index - int(self._ends[place]) + self.groups[place]

    def _group(self, place: int) -> Any:
        """Return a row group, and keep it as the one used last."""
        table = self._kept.pop(place, None)
        if table is None:
            import pyarrow

            file, group = self._places[place]
            try:
                table = _open(self._paths[file]).read_row_group(group, columns=list(self._columns.names()))
            except (DataError, OSError, pyarrow.ArrowException) as error:
                raise BadSampleError(f"cannot read {self._paths[file].name}: {error}") from error
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
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as a Parquet file: {error}") from error


def _group_sizes(file: Any) -> list[int]:
    return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def _rows(files: list[Any], paths: list[Path], columns: Columns) -> Iterator[Row]:
    """Yield the pairs; of several files' pictures each is relative to its own file's folder."""
    import pyarrow

    for file, path in zip(files, paths, strict=True):
        try:
            for batch in file.iter_batches(columns=list(columns.names())):
                for fields in batch.to_pylist():
                    row = row_of(fields, columns)
                    elsewhere = path.parent != paths[0].parent and row.image
                    yield row._replace(image=str(path.parent.absolute() / row.image)) if elsewhere else row
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
