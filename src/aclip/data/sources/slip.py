"""The metadata files of SLIP (YFCC15M, CC3M, CC12M), which are pickled: read without running what is in them."""

import logging
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from aclip.data.sources.manifest import ManifestSource, Row, full_path, texts
from aclip.errors import BadSampleError, DataError

_log = logging.getLogger(__name__)

MAX_PICTURE_BYTES = 256 * 2**20
"""A picture in a zip file that would unpack to more is a bad sample."""

_NAMES = ("image_id", "image_name")  # CC3M's and CC12M's field of the picture's file


class ZippedPictures(ManifestSource):
    """Pairs whose pictures lie in zip files, as YFCC15M's do: `images/00/123.zip` holds `456.jpg`."""

    def file(self, image: str) -> str:
        """Return the archive."""
        return image.rpartition("/")[0]

    def picture(self, image: str) -> bytes:
        """Return the bytes of `archive.zip/member`.

        Raises:
            BadSampleError: no such archive or member, or one that is damaged or too large.
        """
        archive, member = self.folder / self.file(image), image.rpartition("/")[2]
        try:
            with zipfile.ZipFile(archive) as opened:
                size = opened.getinfo(member).file_size
                if size > MAX_PICTURE_BYTES:
                    raise BadSampleError(f"{size:,} bytes in {image}, the limit is {MAX_PICTURE_BYTES:,}")
                return opened.read(member)
        except KeyError as error:
            raise BadSampleError(f"no {member} in {full_path(archive)}") from error
        # zipfile raises RuntimeError for an encrypted member, NotImplementedError for an unknown compression
        except (OSError, EOFError, zipfile.BadZipFile, RuntimeError, ValueError) as error:
            raise BadSampleError(f"cannot read {full_path(archive)}: {error}") from error


def open_slip(path: Path, images: Path | None = None) -> ManifestSource:
    """Open `yfcc15m.pkl`, `cc3m.npy` or `cc12m.npy` as SLIP's data preparation writes them.

    Known by their first record: (number, title, description) is YFCC15M, whose number 123456 is `456.jpg` in
    `images/00/123.zip`; an object with `image_id` or `image_name` and `captions` is CC3M or CC12M, whose pictures
    are files below `images`, by default the metadata's own folder.

    The files are pickles, which could run any program when they are loaded. They are read with nothing but
    lists, tuples, dictionaries, strings and numbers; any other object in them is an error.

    Raises:
        DataError: another layout, a damaged file, or one that asks for code.
    """
    records = _records(path)
    folder = path.parent if images is None else images
    first = records[0] if records else None
    if isinstance(first, tuple | list) and len(first) == 3:
        source: ManifestSource = ZippedPictures(path, map(_yfcc_row, records), folder)
    elif isinstance(first, dict) and "captions" in first and any(name in first for name in _NAMES):
        source = ManifestSource(path, map(_conceptual_row, records), folder)
    else:
        raise DataError(f"{path} is not laid out as YFCC15M, CC3M or CC12M of SLIP: its first record is "
                        f"{str(first)[:80]!r}")
    _log.info("%s: %d pairs, pictures in %s", path, len(source), folder)
    return source


def _yfcc_row(record: Any) -> Row:
    if not isinstance(record, tuple | list) or len(record) != 3 or type(record[0]) is not int:
        return Row("", problem="not (number, title, description)")
    if not 0 <= record[0] < 10**8:
        return Row("", problem="a number of more than eight digits")
    number = f"{record[0]:08}"
    captions = tuple(text for text in texts(list(record[1:])) if text.strip())
    return Row(f"images/{number[:2]}/{number[2:5]}.zip/{number[5:]}.jpg", captions)


def _conceptual_row(record: Any) -> Row:
    if not isinstance(record, dict):
        return Row("", problem="not an object with a picture and captions")
    image = next((record[name] for name in _NAMES if isinstance(record.get(name), str)), "")
    return Row(image, texts(record.get("captions")))


def _records(path: Path) -> list[Any]:
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".npy":
                kind = _array_type(file)
                if not kind.hasobject:
                    raise DataError(f"{path} holds numbers ({kind}), not pairs")
            _check_memo(file)
            content = _PlainUnpickler(file).load()
    except (DataError, OSError):
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} cannot be read as metadata of SLIP: {error}") from error
    if not isinstance(content, list):
        raise DataError(f"{path} holds {type(content).__name__}, not a list of pairs")
    return content


def _check_memo(file: BinaryIO) -> None:
    """Refuse a small file that asks for a table of billions of places, which fills the memory before it fails.

    A number of a place that is beyond the length of the file can only be damage. Files of many megabytes are not
    gone through: it would take as long as reading them.
    """
    start = file.tell()
    content = file.read(_CHECKED)
    file.seek(start)
    if len(content) < _CHECKED:
        for code, value, _ in pickletools.genops(content):
            if code.name in _PLACES and isinstance(value, int) and value > len(content):
                raise pickle.UnpicklingError(f"damaged: place {value} in a file of {len(content)} bytes")


_CHECKED = 2**20  # bytes
_PLACES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})


def _array_type(file: BinaryIO) -> np.dtype[Any]:
    """Read the header of an `.npy` file, up to its content."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a file of Python 2 takes longer
        kind: np.dtype[Any] = read(file)[2]
    return kind


class _Array(list[Any]):
    """What stands for a numpy array of objects: the list of them."""

    def __setstate__(self, state: tuple[int, Any, Any, bool, Any]) -> None:
        values = state[4]  # (version, shape, dtype, Fortran order, values), as numpy writes it
        if not isinstance(values, list):
            raise pickle.UnpicklingError("an array of something else than objects")
        self[:] = values


class _Kind(str):
    """What stands for a numpy dtype: its name, such as 'i8'."""

    def __setstate__(self, state: Any) -> None:
        """Forget byte order and alignment; what `_number` reads is little-endian."""


def _array(*_: Any) -> _Array:
    return _Array()


def _kind(name: str, *_: Any) -> _Kind:
    return _Kind(name)


def _number(kind: _Kind, data: bytes) -> int:
    if not kind.startswith(("i", "u")):
        raise pickle.UnpicklingError(f"a single value of type {kind}")
    return int.from_bytes(data, "little", signed=kind.startswith("i"))


def _latin_1(text: str, _: str) -> bytes:
    return text.encode("latin-1")  # how protocols before 3 write bytes


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _array,
    ("numpy", "dtype"): _kind,
    ("_codecs", "encode"): _latin_1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _number for core in ("core", "_core")},
}
"""All that a file may call: functions of this module that build plain values."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickles of plain values; no name in them leads outside `_STAND_INS`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain values are read")
        return _STAND_INS[module, name]
