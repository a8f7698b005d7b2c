"""Hugging Face `datasets` that were saved to disk, read through that library."""

import logging
from pathlib import Path
from typing import Any

from aclip.data.sources.base import RawSample
from aclip.data.sources.manifest import Columns, row_of, settle_columns
from aclip.data.sources.parquet import picture_bytes
from aclip.errors import BadSampleError, ConfigError, DataError, MissingDependencyError, unknown_name

_log = logging.getLogger(__name__)

_SPLITS = "dataset_dict.json"
_ONE_SPLIT = "state.json"


class HuggingFaceSource:
    """Pairs of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Arrow files are mapped, not read, and give any row at once, so that the order needs no window. The picture's
    column may hold pictures (`Image`) or paths, relative to the folder; a class label reads as its name.

    Attributes:
        name: the folder.
        columns: those that are read.
    """

    def __init__(self, folder: Path, columns: Columns | None = None, split: str | None = None) -> None:
        """Open one split of `folder`; `columns` replaces the guess.

        Raises:
            DataError: a folder that cannot be read, or no rows.
            ConfigError: a split or a column that does not exist, or none named where there are several.
            MissingDependencyError: `datasets` is not installed.
        """
        self.name = str(folder)
        self._folder = _split_folder(folder, split)
        self._opened: Any = None
        rows = _load(self._folder)
        self._length = len(rows)
        if not self._length:
            raise DataError(f"{self._folder} holds no rows")
        self.columns = settle_columns(folder, rows.column_names, columns)
        label = rows.features.get(self.columns.label) if self.columns.label else None
        self._label_names: list[str] = list(getattr(label, "names", []))
        _log.info("%s: %d rows, %s", self._folder, self._length, self.columns)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped files behind when the source goes to a worker."""
        return self.__dict__ | {"_opened": None}

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        """Return the row's number, counted from 1."""
        return f"{self._folder.name}: row {index + 1}"

    def read(self, index: int) -> RawSample:
        """Read one row.

        Raises:
            BadSampleError: no picture, or files that cannot be read any more.
        """
        try:
            if self._opened is None:
                self._opened = _undecoded(_load(self._folder), self.columns)
            fields: dict[str, Any] = self._opened[index]
        except Exception as error:  # whatever the library and Arrow raise for damaged or vanished files
            raise BadSampleError(f"cannot read {self._folder}: {error}") from error
        data = picture_bytes(fields.get(self.columns.image), self._folder)
        row = row_of(fields, self.columns)
        label = row.label
        if label.isdecimal() and int(label) < len(self._label_names):
            label = self._label_names[int(label)]
        captions = (label,) if self.columns.captions == (self.columns.label,) else row.captions
        return RawSample(self.key(index), data, captions, tags=row.tags, label=label or None)


def is_hugging_face(folder: Path) -> bool:
    """Return whether `folder` is one that `save_to_disk` wrote."""
    return (folder / _SPLITS).is_file() or all(
        (folder / name).is_file() for name in (_ONE_SPLIT, "dataset_info.json")
    )


def _split_folder(folder: Path, split: str | None) -> Path:
    """Return the folder of the split, which a set of one split need not name."""
    if not (folder / _SPLITS).is_file():
        if split is not None:
            raise ConfigError(f"{folder} has no splits, so '?split={split}' names none")
        return folder
    splits = sorted(path.parent.name for path in folder.glob(f"*/{_ONE_SPLIT}"))
    if split is None and len(splits) == 1:
        return folder / splits[0]
    if split is None:
        raise ConfigError(f"{folder} has the splits {', '.join(splits) or 'none'}: choose one with "
                          f"'{folder.name}?split={splits[0] if splits else 'NAME'}'")
    if split not in splits:
        raise ConfigError(f"{folder}: {unknown_name('split', split, splits)}")
    return folder / split


def _load(folder: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{folder} needs the package datasets to be read: pip install 'attentive-clip[huggingface]'"
        ) from error
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # the library lets through what JSON and Arrow raise
        raise DataError(f"{folder} cannot be read as a saved dataset: {error}") from error


def _undecoded(rows: Any, columns: Columns) -> Any:
    """Return the needed columns of `rows`, pictures as they are stored."""
    import datasets

    rows = rows.select_columns(list(columns.names()))
    if isinstance(rows.features[columns.image], datasets.Image):
        rows = rows.cast_column(columns.image, datasets.Image(decode=False))
    return rows
