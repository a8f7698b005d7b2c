"""Debian packages: the client, and reading without unpacking."""

import sys
from pathlib import Path

import pytest
from made_packs import Shelf, debian

from aclip.data.fetch import debian as module
from aclip.data.fetch.debian import DebianPackage, read_files
from aclip.data.fetch.packages import download
from aclip.data.fetch.progress import Silent
from aclip.errors import DataError, MissingDependencyError

FILES = {"usr/share/made/one.png": b"odd", "usr/share/made/two.txt": b"even", "usr/share/doc/copyright": b""}


def test_download_asks_apt_for_the_pinned_version(shelf: Shelf, tmp_path: Path) -> None:
    package = shelf.put_debian("made-up", "1.0-1", FILES)
    path = download([package], tmp_path / "cache", Silent())["made-up"]
    assert path == tmp_path / "cache" / "made-up_1.0-1_all.deb"
    assert shelf.calls == ["download --quiet made-up=1.0-1"]
    assert list((tmp_path / "cache").iterdir()) == [path]


@pytest.mark.usefixtures("no_client")
def test_without_apt_it_is_said_what_the_package_needs(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"no apt-get on the PATH: made is a Debian package"):
        download([DebianPackage("made", "1.0-1", "0" * 64, 1)], tmp_path, Silent())


@pytest.mark.parametrize(
    ("complaint", "cause"),
    [
        ("W: noise\nE: Version '1' for 'made' was not found\nE: another\n", "Version '1' for 'made' was not found"),
        ("E: Unable to locate package made.\n", "Unable to locate package made"),
        ("env: python: No such file\n", "env: python: No such file"),
        ("", "it gave no reason"),
    ],
)
def test_the_cause_of_a_failure_is_passed_on(
    complaint: str, cause: str, shelf: Shelf, tmp_path: Path
) -> None:
    package = shelf.put_debian("made", "1", FILES)
    script = f"#!{sys.executable}\nimport sys\nsys.stderr.write({complaint!r})\nsys.exit(100)\n"
    shelf.client(script, "apt-get")
    with pytest.raises(DataError) as caught:
        download([package], tmp_path, Silent())
    assert str(caught.value).startswith(f"apt-get could not download made=1: {cause} (`apt-get update`")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2"])
def test_wanted_files_are_read_by_their_path(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "made.deb"
    path.write_bytes(debian(FILES, compression))
    assert read_files(path, lambda name: "made" in name) == {
        name: data for name, data in FILES.items() if "made" in name
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["made.deb"]


def test_a_large_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "made.deb"
    path.write_bytes(debian(FILES))
    monkeypatch.setattr(module, "MAX_MEMBER", 3)
    with pytest.raises(DataError, match=r"two\.txt of 4 bytes: too large"):
        read_files(path, lambda name: True)


def test_a_broken_package_is_named(tmp_path: Path) -> None:
    path = tmp_path / "made.deb"
    whole = debian({"usr/made": bytes(range(256)) * 100})
    without = whole.replace(b"data.tar", b"none.tar")
    for damaged in (whole[: len(whole) * 3 // 4], whole[:70], without, b"no archive", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"made\.deb cannot be read as a Debian package"):
            read_files(path, lambda name: True)
