"""The converter of SLIP's metadata: plain values come back, and nothing in a file is run."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aclip.data import open_source
from aclip.errors import DataError

SCRIPT = Path(__file__).parents[2] / "docs" / "convert_slip.py"


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def convert(source: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), str(source), str(source.with_suffix(".jsonl"))], text=True,
                          capture_output=True, cwd=source.parent, check=False)  # fmt: skip


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_yfcc15m(tmp_path: Path, protocol: int) -> None:
    rows = [(123456, "a title", "text"), (np.int64(7), "b", "")]
    (tmp_path / "yfcc15m.pkl").write_bytes(pickle.dumps([tuple(map(_plain, row)) for row in rows], protocol))
    image = tmp_path / "images/00/123/456.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"x")
    assert convert(tmp_path / "yfcc15m.pkl").stdout == "2 pairs\n"
    source = open_source(str(tmp_path / "yfcc15m.jsonl"))
    assert (source.read(0).image, source.captions(0), source.captions(1)) == (b"x", ("a title", "text"), ("b",))


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, np.integer) else value


def test_cc3m(tmp_path: Path) -> None:
    rows = [{"image_id": "7.jpg", "captions": ["a", "b"]}, {"image_name": "8.jpg", "captions": np.array(["x"], object)}]
    np.save(tmp_path / "cc3m.npy", np.array(rows, dtype=object), allow_pickle=True)
    (tmp_path / "7.jpg").touch()
    assert convert(tmp_path / "cc3m.npy").stdout == "2 pairs\n"
    source = open_source(str(tmp_path / "cc3m.jsonl"))
    assert [source.captions(n) for n in range(2)] == [("a", "b"), ("x",)]


def test_a_file_that_asks_for_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([Hostile()]))
    assert "asks for posix.system" in convert(tmp_path / "x.pkl").stderr
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match=r"a pickle, .*convert_slip\.py"):
        open_source(str(tmp_path / "x.pkl"))
