"""Small packages, and clients that serve them from a folder."""

import hashlib
import io
import json
import stat
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from aclip.data.sets.packages import Package

RED = '<path fill="#f00" d="M0 0h16v16H0z"/>'

# Stand in for `npm pack NAME@VERSION` and `apt-get download ... NAME=VERSION`: copy the file, and log the call.
_CLIENT = """#!{python}
import os, shutil, sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
file = {file}
shutil.copy(os.path.join({shelf!r}, file), file)
"""
_NPM = 'sys.argv[2].lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"'
_APT = 'sys.argv[-1].replace("=", "_") + "_all.deb"'


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


def debian(files: Mapping[str, bytes], compression: str = "xz") -> bytes:
    """Return a Debian package, see deb(5); members of odd length are padded."""
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


class Shelf:
    """Packages that the clients in `bin` can download."""

    def __init__(self, folder: Path) -> None:
        self.packages, self.bin, self._log = folder / "shelf", folder / "bin", folder / "calls.txt"
        self.packages.mkdir()
        self.bin.mkdir()
        here = {"python": sys.executable, "log": str(self._log), "shelf": str(self.packages)}
        self.client(_CLIENT.format(**here, file=_NPM))
        self.client(_CLIENT.format(**here, file=_APT), "apt-get")

    def client(self, script: str, name: str = "npm") -> None:
        """Replace a client by another executable script."""
        program = self.bin / name
        program.write_text(script)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def put(self, name: str, members: Mapping[str, Any], client: Literal["npm", "apt"] = "npm") -> Package:
        """Publish version 1.0.0 of a package and return its pin."""
        data = tarball(members) if client == "npm" else debian(members)
        package = Package(name, "1.0.0", hashlib.sha256(data).hexdigest(), len(data), client)
        (self.packages / package.filename).write_bytes(data)
        return package

    @property
    def calls(self) -> list[str]:
        """The arguments of each call of a client so far."""
        return self._log.read_text().splitlines() if self._log.exists() else []


def samples(folder: Path, split: str) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Return the JSON and the image of each sample of a split by its name, in the order of the shards."""
    members: dict[str, bytes] = {}
    for path in sorted((folder / split).glob("*.tar")):
        with tarfile.open(path) as archive:
            members |= {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    keys = dict.fromkeys(name.partition(".")[0] for name in members)
    return {key: (json.loads(members[f"{key}.json"]), members[f"{key}.png"]) for key in keys}


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
