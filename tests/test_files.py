"""Files are written atomically, under portable names."""

from pathlib import Path

import pytest

from aclip.files import as_file_name, write_atomically


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
