"""Convert SLIP's metadata (YFCC15M, CC3M, CC12M) to JSON lines: `python docs/convert_slip.py cc3m.npy cc3m.jsonl`.

SLIP keeps its lists as pickles, which can run any program when Python loads them, so aclip does not read them. This
script reads them with lists, tuples, dictionaries, strings and numbers alone, and refuses a file that asks for more.

`yfcc15m.pkl` holds (number, title, description); number 123456 is `456.jpg` in `images/00/123.zip`. Unpack each archive
into a folder of its name without ".zip", as this script's list expects. `cc3m.npy` and `cc12m.npy` hold objects with
`image_id` or `image_name` and `captions`. Train with `--data 'cc3m.jsonl?images=FOLDER'`.
"""

import json
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


class _Array(list[Any]):
    """Stands for a numpy array of objects: the list of them."""

    def __setstate__(self, state: tuple[int, Any, Any, bool, Any]) -> None:
        values = state[4]  # (version, shape, dtype, Fortran order, values), as numpy writes it
        if not isinstance(values, list):
            raise pickle.UnpicklingError("an array of something else than objects")
        self[:] = values


class _Kind(str):
    """Stands for a numpy dtype: its name, such as 'i8'."""

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


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _array,
    ("numpy", "dtype"): _kind,
    ("_codecs", "encode"): _latin_1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _number for core in ("core", "_core")},
}
"""All that a file may call: functions of this script that build plain values."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain values are read")
        return STAND_INS[module, name]


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield objects with `image` and `captions`.

    Raises:
        SystemExit: a damaged file, one that asks for code, or another layout.
    """
    try:
        with path.open("rb") as file:
            if path.suffix == ".npy":
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # files of Python 2 take longer
                    read(file)
            content = _PlainUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise SystemExit(f"{path} cannot be read as metadata of SLIP: {error}") from error
    for record in content if isinstance(content, list) else ():
        if isinstance(record, tuple | list) and len(record) == 3 and isinstance(record[0], int):
            number = f"{record[0]:08}"
            texts = [text for text in record[1:] if isinstance(text, str) and text.strip()]
            yield {"image": f"images/{number[:2]}/{number[2:5]}/{number[5:]}.jpg", "captions": texts}
        elif isinstance(record, dict) and isinstance(image := record.get("image_id", record.get("image_name")), str):
            yield {"image": image, "captions": [text for text in record.get("captions", ()) if isinstance(text, str)]}
        else:
            raise SystemExit(f"{path} is not laid out as YFCC15M, CC3M or CC12M of SLIP: {str(record)[:80]}")


def main() -> None:
    """Convert one file."""
    if len(sys.argv) != 3:
        raise SystemExit("python docs/convert_slip.py METADATA OUTPUT.jsonl")
    lines = [json.dumps(record) + "\n" for record in records(Path(sys.argv[1]))]
    Path(sys.argv[2]).write_text("".join(lines), encoding="utf-8")
    count = len(lines)
    sys.stdout.write(f"{count:,} pairs\n")


if __name__ == "__main__":
    main()
