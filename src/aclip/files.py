"""Atomic file writes, and portable file names."""

import os
import re
from pathlib import Path


def as_file_name(name: str) -> str:
    """Return `name` with "_" in place of characters that are not portable in file names.

    >>> as_file_name("val[0:60], karpathy")
    'val_0_60_karpathy'
    """
    return re.sub(r"[^\w-]+", "_", name)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file atomically: after a crash it has either its old or its new content.

    Args:
        path: created or replaced, with its parent folders.
        data: the content; text is written as UTF-8.

    Raises:
        OSError: the disk is full or the folder is not writable; an existing file stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id separates processes that write the same file.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
