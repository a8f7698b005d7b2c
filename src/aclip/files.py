"""Files: written whole or not at all, under names that any system takes."""

import os
import re
from pathlib import Path


def as_file_name(name: str) -> str:
    """Return a name with "_" for what does not belong in a file name.

    >>> as_file_name("val[0:60], karpathy")
    'val_0_60_karpathy'
    """
    return re.sub(r"[^\w-]+", "_", name)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that it appears whole or not at all, also when the machine stops meanwhile.

    Args:
        path: replaced if it is there; its folder is made if it is not.
        data: the content; text is written as UTF-8.

    Raises:
        OSError: the disk is full or the folder cannot be written; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two processes that write the same file apart.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
