"""Debian packages: downloaded by apt, read without being unpacked or installed."""

import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

from aclip.data.fetch.packages import MAX_MEMBER, TIMEOUT, Done, Package, run_client
from aclip.errors import DataError, MissingDependencyError

# A Debian package is an `ar` archive (deb(5)): a magic line, then members with a header of 60 bytes, each padded
# to an even length. The files lie in the member `data.tar` with the ending of its compression.
_MAGIC = b"!<arch>\n"
_HEADER = 60


@dataclass(frozen=True)
class DebianPackage(Package):
    """One version of one Debian package that is the same for all architectures, pinned."""

    client: ClassVar[str] = "apt-get"

    @property
    def spec(self) -> str:
        """`name=version`, as apt takes it."""
        return f"{self.name}={self.version}"

    @property
    def filename(self) -> str:
        """The file's name in the cache, e.g. "tuxpaint-stamps-default_2022.06.04-1_all.deb"."""
        return f"{self.name}_{self.version}_all.deb"

    def bring(self, folder: Path) -> Done:
        """See `Package.bring`; nothing is installed, and no special rights are needed."""
        executable = shutil.which("apt-get")
        if executable is None:
            raise MissingDependencyError(
                f"no apt-get on the PATH: {self.name} is a Debian package, which Debian, Ubuntu and their relatives "
                f"can fetch (or put {self.filename} into the folder `packages` of the data sets)"
            )
        return run_client([executable, "download", "--quiet", self.spec], folder, TIMEOUT)

    def cause(self, stderr: str) -> str:
        """Return the first of apt's errors, else the first that it said, and what may help."""
        said = [line for line in stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("E: ") for line in said if line.startswith("E: ")]
        cause = (errors or said or ["it gave no reason"])[0].rstrip(".")
        return f"{cause} (`apt-get update` brings the list of packages that it looks in)"


def read_files(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Read some files of a Debian package into memory.

    Args:
        path: the package.
        wanted: whether the file of this path, e.g. "usr/share/doc/NAME/copyright", is read.

    Returns:
        The bytes of the wanted regular files by their path, in the order of the package.

    Raises:
        DataError: not a Debian package, cut short, compressed in a way that this Python does not know, or a
            file above `MAX_MEMBER` bytes.
    """
    files: dict[str, bytes] = {}
    try:
        with path.open("rb") as package:
            _seek_data(package)
            with tarfile.open(fileobj=package, mode="r|*") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if not member.isreg() or not wanted(name):
                        continue
                    if member.size > MAX_MEMBER:
                        raise DataError(f"{path.name} holds {name} of {member.size} bytes: too large")
                    stream = archive.extractfile(member)
                    assert stream is not None  # regular files always have one
                    files[name] = stream.read()
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read as a Debian package: {error}") from None
    return files


def _seek_data(package: BinaryIO) -> None:
    """Go to the start of the archive of files, which is the last member."""
    if package.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("it does not begin like one")
    while len(header := package.read(_HEADER)) == _HEADER:
        name, size = header[:16].decode("ascii").rstrip(" /"), int(header[48:58])
        if name.startswith("data.tar"):
            return
        package.seek(size + size % 2, 1)
    raise ValueError("it holds no files")
