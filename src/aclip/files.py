"""Files: atomic writes, portable names, and where caches and data sets live."""

import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

_log = logging.getLogger(__name__)


def as_file_name(name: str) -> str:
    """Return a name with "_" for what does not belong in a file name: "a/b, c" becomes "a_b_c"."""
    return re.sub(r"[^\w-]+", "_", name)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends, whole or not at all, also after a crash.

    Its folder is created. An OSError (the disk is full, the folder cannot be written) leaves what was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, because process ids repeat between containers that share a folder.
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file as `atomic_file` does; text as UTF-8, with escapes for the undecodable bytes of file names."""
    with atomic_file(path) as file:
        file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file of JSON lines, and how many lines hold none, as a torn one; nothing without a file.
    """
    if not path.is_file():
        return [], 0
    # not splitlines: a caption may hold U+2028 and its like, which JSON leaves as they are
    lines = list(filter(str.strip, path.read_text(encoding="utf-8", errors="replace").split("\n")))
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    records = [one for one in found if isinstance(one, dict)]
    return records, len(lines) - len(records)


def cache_root() -> Path:
    """Return the folder of what can be computed or downloaded again: `$ACLIP_CACHE`, else `~/.cache/aclip`.

    Without a writable home folder, as in a container whose user has no passwd entry, a temporary folder takes its
    place.
    """
    return _root("ACLIP_CACHE", "")


def data_root() -> Path:
    """Return the folder of fetched data sets: `$ACLIP_DATA`, else `~/.cache/aclip/data`; see `cache_root`."""
    return _root("ACLIP_DATA", "data")


def _root(variable: str, below: str) -> Path:
    chosen = os.environ.get(variable)
    if chosen:
        return Path(os.path.expanduser(chosen))  # Path.expanduser raises without a home folder
    home = Path(os.path.expanduser("~")) / ".cache" / "aclip" / below
    return home if _can_create(home) else _temporary_root(variable) / below


def _can_create(folder: Path) -> bool:
    existing = next((one for one in (folder, *folder.parents) if one.exists()), None)
    return folder.is_absolute() and existing is not None and os.access(existing, os.W_OK)


@cache
def _temporary_root(variable: str) -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"aclip-{user}"
    _log.warning("no writable home folder: using %s; set %s to choose another", folder, variable)
    return folder
