"""Atomic writes, and folders of caches and data."""

import os
from pathlib import Path

import pytest

from aclip.files import as_file_name, atomic_file, cache_root, data_root, write_atomically


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, "first")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        fail()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_undecodable_names_are_escaped(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "file").read_bytes() == b"caf\\udce9"


def test_processes_of_one_id_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers
    with atomic_file(tmp_path / "file") as one, atomic_file(tmp_path / "file") as other:
        one.write(b"1" * 10)
        other.write(b"2" * 10)
    assert (tmp_path / "file").read_bytes() in (b"1" * 10, b"2" * 10)


def test_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ACLIP_CACHE", raising=False)
    monkeypatch.delenv("ACLIP_DATA", raising=False)
    assert cache_root() == tmp_path / ".cache" / "aclip"
    assert data_root() == tmp_path / ".cache" / "aclip" / "data"
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACLIP_DATA", "~/data")
    assert cache_root() == tmp_path / "cache"
    assert data_root() == tmp_path / "data"


@pytest.mark.parametrize("home", [None, "/proc"])
def test_a_user_without_a_home_gets_a_temporary_folder(
    home: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from aclip import files

    files._temporary_root.cache_clear()
    monkeypatch.delenv("ACLIP_CACHE", raising=False)
    if home is None:  # and no passwd entry: expanduser then returns its argument
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv("HOME", home)
        monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache_root().name == f"aclip-{os.getuid()}"
    assert "set ACLIP_CACHE to choose another" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("val[0:60], karpathy", "val_0_60_karpathy"), ("a/b\\c:d", "a_b_c_d"), ("été-1", "été-1")],
)
def test_file_names_have_no_special_characters(name: str, expected: str) -> None:
    assert as_file_name(name) == expected


def test_creates_folders_and_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_atomically(path, "été")
    assert path.read_bytes() == "été".encode()
    write_atomically(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
