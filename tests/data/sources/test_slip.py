"""SLIP's metadata files: YFCC15M, CC3M and CC12M, without running what a pickle asks for."""

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aclip.data.sources import open_source, slip
from aclip.errors import AclipError, BadSampleError, DataError


def save(path: Path, content: Any) -> str:
    if path.suffix == ".npy":
        np.save(path, np.array(content, dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(content))
    return str(path)


def zipped(folder: Path, archive: str, **members: bytes) -> None:
    (folder / archive).parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / archive, "w") as opened:
        for name, data in members.items():
            opened.writestr(f"{name}.jpg", data)


def test_yfcc15m(tmp_path: Path) -> None:
    zipped(tmp_path / "yfcc", "images/00/123.zip", **{"456": b"first", "457": b"second"})
    zipped(tmp_path / "yfcc", "images/14/999.zip", **{"001": b"third"})
    rows = [(123456, "a title", "and a description"), (14999001, "", "only this"), (123458, "x", "y"), (99, "x", "y")]
    source = open_source(save(tmp_path / "yfcc15m.pkl", rows) + f"?images={tmp_path / 'yfcc'}")
    source = pickle.loads(pickle.dumps(source))
    first, second = source.read(0), source.read(1)
    assert (first.image, first.captions) == (b"first", ("a title", "and a description"))
    assert (second.image, second.captions) == (b"third", ("only this",))
    for index, reason in (
        (2, f"no 458.jpg in {tmp_path}/yfcc/images/00/123.zip"), (3, f"cannot read {tmp_path}/yfcc/images/00/000.zip"),
    ):
        with pytest.raises(BadSampleError, match=reason):
            source.read(index)


def test_archives_that_lie_elsewhere_are_said_at_once(tmp_path: Path) -> None:
    zipped(tmp_path / "yfcc", "images/00/123.zip")
    spec = save(tmp_path / "yfcc15m.pkl", [(123456, "a title", "and a description")])
    with pytest.raises(DataError, match=rf"looked for .*/images/00/123.zip first: it lies in {tmp_path}/yfcc, "):
        open_source(spec)


@pytest.mark.parametrize("field", ["image_id", "image_name"])
def test_cc3m_and_cc12m(tmp_path: Path, field: str) -> None:
    (tmp_path / "7.jpg").write_bytes(b"seven")
    rows = [{field: "7.jpg", "captions": ["one", "two"]}, {field: "8.jpg", "captions": np.array(["x"], object)}, 5]
    source = open_source(save(tmp_path / "cc.npy", rows))
    assert (source.read(0).image, source.read(0).captions) == (b"seven", ("one", "two"))
    for index, reason in ((1, "No such file"), (2, "not an object with a picture")):
        with pytest.raises(BadSampleError, match=reason):
            source.read(index)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_and_single_numbers(tmp_path: Path, protocol: int) -> None:
    zipped(tmp_path, "images/00/123.zip")
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps([(np.int64(123456), "t", "d"), (int(np.uint32(7)), "u", "")], protocol=protocol))
    source = open_source(str(path))
    assert source.key(0) == "row 1: images/00/123.zip/456.jpg"
    assert source.key(1) == "row 2: images/00/000.zip/007.jpg"


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("ending", [".pkl", ".npy"])
def test_a_pickle_cannot_run_code(tmp_path: Path, ending: str) -> None:
    spec = save(tmp_path / f"x{ending}", [(1, "a", Attack(tmp_path / "made")), (2, "b", "c")])
    with pytest.raises(DataError, match=r"it asks for posix\.mkdir, and only plain values are read"):
        open_source(spec)
    assert not (tmp_path / "made").exists()


def test_files_that_are_something_else(tmp_path: Path) -> None:
    np.save(tmp_path / "numbers.npy", np.arange(3))
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps([(1, "a", "b")])[:-4])
    for name, reason in (
        (save(tmp_path / "a.pkl", {"a": 1}), "holds dict, not a list of pairs"),
        (save(tmp_path / "b.pkl", [1, 2]), "is not laid out as YFCC15M, CC3M or CC12M"),
        (save(tmp_path / "c.pkl", []), "is not laid out as"),
        (str(tmp_path / "numbers.npy"), "holds numbers"),
        (str(tmp_path / "cut.pkl"), "cannot be read as metadata of SLIP"),
    ):
        with pytest.raises(DataError, match=reason):
            open_source(name)


def test_a_zip_bomb_is_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped(tmp_path, "images/00/000.zip", **{"001": bytes(100)})
    monkeypatch.setattr(slip, "MAX_PICTURE_BYTES", 99)
    with pytest.raises(BadSampleError, match=r"100 bytes in images/00/000\.zip/001\.jpg, the limit is 99"):
        open_source(save(tmp_path / "x.pkl", [(1, "a", "b")])).read(0)


@pytest.mark.parametrize("ending", [".pkl", ".npy"])
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(position=st.integers(0, 120), junk=st.binary(max_size=8), cut=st.integers(0, 8))
@example(position=0, junk=b"cbuiltins\neval\n(S'1'\ntR.", cut=120)
def test_any_bytes_give_rows_or_a_clear_error(
    tmp_path: Path, ending: str, position: int, junk: bytes, cut: int
) -> None:
    rows: list[Any] = [(123456, "title", "text")] if ending == ".pkl" else [{"image_id": "7.jpg", "captions": ["a"]}]
    zipped(tmp_path, "images/00/123.zip")
    (tmp_path / "7.jpg").touch()
    path = tmp_path / f"x{ending}"
    save(path, rows)
    content = path.read_bytes()
    path.write_bytes(content[:position] + junk + content[position + cut :])
    try:
        source = open_source(str(path))
    except AclipError:
        return
    for index in range(min(len(source), 3)):
        with contextlib.suppress(BadSampleError):
            source.read(index)
