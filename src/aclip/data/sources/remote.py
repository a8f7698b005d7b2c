"""Shards that lie elsewhere (`s3://`, `http://`, whatever fsspec knows), read through a bounded cache on the disk."""

import errno
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aclip.data.sources.base import WINDOW, RawSample, Runs
from aclip.data.sources.shard_index import SIZES, cached_path
from aclip.data.sources.shards import ShardSource, check_lost, expand_braces
from aclip.errors import BadSampleError, DataError, MissingDependencyError
from aclip.files import write_atomically

TRIES = 4
"""How often a shard is asked for before it counts as lost."""

FIRST_PAUSE = 0.5
"""Seconds before the second try; each further pause is twice as long."""

TIMEOUT = 30.0
"""Seconds without a byte after which an HTTP server counts as stalled; other stores have limits of their own."""

REST = 300.0
"""Seconds for which a shard that could not be had is not asked for again."""

CACHE_GB = 32.0
"""Size of the cache, unless `$ACLIP_CACHE_GB` says another."""

_AT_ONCE = 8  # downloads while shards are counted

_log = logging.getLogger(__name__)


class RemoteShardSource:
    """Shards behind addresses; each is fetched whole when it is first needed, and dropped when the cache is full.

    Whole, because training wants nearly all of a shard within a short time (`Grouped`: `WINDOW` shards are
    mixed at a time), and one stream is what stores and their pricing are made for. The cache is shared by
    all processes of a machine.

    The number of samples in each shard must be known before training. It is taken from `sizes.json` beside
    the shards; without one, every shard is fetched and counted once, and the counts are kept.

    Attributes:
        name: what the user called it.
        groups: samples in each shard.
    """

    def __init__(self, name: str, urls: Sequence[str]) -> None:
        """Count the samples of the shards `urls`.

        Raises:
            DataError: more shards out of reach or unreadable than `MAX_LOST`, or no sample in any.
            MissingDependencyError: fsspec, or what it needs for this kind of address, is not installed.
        """
        self.name = name
        file_system(urls[0])
        known = _known_sizes(urls)
        counts = _count([url for url in urls if url not in known], name, len(urls)) | known
        self._urls = [url for url in urls if counts.get(url)]
        self.groups = tuple(counts[url] for url in self._urls)
        self._runs = Runs(self.groups)
        self._opened: dict[str, tuple[Path, ShardSource]] = {}
        self._lost: dict[str, tuple[float, DataError]] = {}
        if not self._urls:
            raise DataError(f"no samples in {name}: its {len(urls)} shards hold no picture")

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what this process has opened."""
        return self.__dict__ | {"_opened": {}, "_lost": {}}

    def __len__(self) -> int:
        return len(self._runs)

    def key(self, index: int) -> str:
        """Return the shard's file name and the number of the sample in it, counted from 1."""
        shard, row = self._runs.place(index)
        return f"{self._urls[shard].rpartition('/')[2]}: sample {row + 1}"

    def read(self, index: int) -> RawSample:
        """Read one sample, and fetch its shard if that is not here.

        Raises:
            BadSampleError: a bad sample, or a shard that cannot be had.
            DataError: too many shards cannot be had, see `MAX_LOST`.
        """
        shard, row = self._runs.place(index)
        source = self._open(self._urls[shard])
        if row >= len(source):
            raise BadSampleError(f"the shard holds {len(source)} samples, not {self.groups[shard]} as {SIZES} has it")
        return source.read(row)

    def _open(self, url: str) -> ShardSource:
        """Return a shard, and keep it among the last that were used."""
        path, source = self._opened.pop(url, (None, None))
        if path is None or source is None or not _touch(path):
            path, source = self._fetch(url)
        self._opened[url] = path, source
        if len(self._opened) > 2 * WINDOW:  # two windows are in use where one ends
            del self._opened[next(iter(self._opened))]
        return source

    def _fetch(self, url: str) -> tuple[Path, ShardSource]:
        """Fetch and index a shard; one that has just been out of reach is not asked for again yet."""
        since, error = self._lost.get(url, (-REST, DataError("")))
        if time.monotonic() - since < REST:
            raise BadSampleError(str(error))
        try:
            opened = _fetch_and_index(url)
        except DataError as reason:
            self._lost[url] = time.monotonic(), reason
            check_lost(self.name, [lost for _, lost in self._lost.values()], len(self._urls))
            raise BadSampleError(str(reason)) from reason
        self._lost.pop(url, None)
        return opened


def expand_urls(spec: str) -> list[str]:
    """Return the addresses that a pattern names: braces anywhere, `*` where the store can list its files.

    Raises:
        DataError: a pattern that matches nothing, or a store that cannot be reached.
        MissingDependencyError: as `file_system`.
    """
    urls: list[str] = []
    for pattern in expand_braces(spec):
        if "*" not in pattern:
            urls.append(pattern)
            continue
        store = file_system(pattern)
        try:
            found = sorted(store.glob(pattern))
        except Exception as error:  # every store has errors of its own
            raise DataError(f"{pattern} cannot be listed: {_why(error)}") from error
        if not found:
            raise DataError(f"no such file: {pattern}")
        urls.extend(store.unstrip_protocol(path) for path in found)
    return urls


def file_system(url: str) -> Any:
    """Return fsspec's file system for an address; in every process its own, as its connections do not survive a fork.

    Raises:
        DataError: an unknown kind of address.
        MissingDependencyError: fsspec, or what it needs for this kind of address, is not installed.
    """
    protocol = url.partition("://")[0]
    try:
        import fsspec

        options: dict[str, Any] = {}
        if protocol in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
            options = {"client_kwargs": {"timeout": limits}}
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise MissingDependencyError(
            f"{url} needs more to be read: pip install 'attentive-clip[remote]' ({_why(error)})") from error
    except ValueError as error:
        raise DataError(f"'{protocol}://' is no kind of address that fsspec knows: {_why(error)}") from error


def fetch(url: str) -> Path:
    """Return the file of an address in the cache, which is fetched if it is not there.

    Raises:
        DataError: it cannot be had after `TRIES` tries, or there is no room for it.
    """
    from filelock import FileLock

    path = cached_path("shards", url, ".tar")
    folder = path.parent
    if _touch(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not _touch(path):  # another process may have fetched it meanwhile
                _download(url, path)
                _make_room(folder, path)
    except OSError as error:
        raise DataError(f"no room for {url} in {folder}: {_why(error)}") from error
    return path


def _fetch_and_index(url: str) -> tuple[Path, ShardSource]:
    """Return the file of a shard and what is in it.

    Raises:
        DataError: it cannot be had or read.
    """
    for _ in range(TRIES):
        path = fetch(url)
        try:
            return path, ShardSource(url, [path])
        except DataError:
            if path.exists():
                raise
    raise DataError(f"{url} is dropped from the cache before it is read: set ACLIP_CACHE_GB to more than a few shards")


def _download(url: str, path: Path) -> None:
    """Fetch a file so that it appears whole or not at all.

    Raises:
        DataError: every try has failed.
        OSError: the disk is full.
    """
    part = path.with_suffix(".part")
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        try:
            store = file_system(url)
            expected = store.info(url).get("size")
            store.get_file(url, str(part))
            size = part.stat().st_size
            if expected is None or size == expected:
                part.replace(path)
                return
            problem = f"{size:,} of {expected:,} bytes arrived"
        except MissingDependencyError:
            raise
        except FileNotFoundError:
            problem = "there is no such file"
            break
        except Exception as error:  # every store has errors of its own
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            problem = _why(error)
        finally:
            part.unlink(missing_ok=True)
    raise DataError(f"{url} cannot be fetched: {problem}")


def _make_room(folder: Path, newest: Path) -> None:
    """Remove the files that were used longest ago until the cache has its size; the newest stays."""
    chosen = os.environ.get("ACLIP_CACHE_GB", str(CACHE_GB))
    try:
        limit = float(chosen) * 1e9
    except ValueError as error:
        raise DataError(f"ACLIP_CACHE_GB is a number of gigabytes, not '{chosen}'") from error
    files = []
    for path in folder.glob("*.tar"):
        try:
            status = path.stat()
        except FileNotFoundError:  # removed by another process
            continue
        files.append((status.st_atime_ns, status.st_size, path))
    used = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if used <= limit:
            break
        if path != newest:
            path.unlink(missing_ok=True)
            used -= size


def _touch(path: Path) -> bool:
    """Note that a file of the cache is in use; return whether it is there."""
    try:  # the time of change stays, by which the index of a shard is known
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except OSError:
        return False
    return True


def _known_sizes(urls: Sequence[str]) -> dict[str, int]:
    """Return address -> samples from the `sizes.json` of each folder, where there is one that makes sense."""
    known: dict[str, int] = {}
    for folder in dict.fromkeys(url.rpartition("/")[0] for url in urls):
        try:
            sizes = json.loads(file_system(folder + "/").cat_file(f"{folder}/{SIZES}"))
        except MissingDependencyError:
            raise
        except Exception:  # it is not there, or it is not JSON: the shards are counted
            continue
        if isinstance(sizes, dict):
            known |= {f"{folder}/{name}": n for name, n in sizes.items() if isinstance(n, int) and n > 0}
    return {url: known[url] for url in urls if url in known}


def _count(urls: Sequence[str], name: str, shards: int) -> dict[str, int]:
    """Return address -> samples, from shards that are fetched if they have not been counted before."""
    if not urls:
        return {}
    _log.info("%s: counting the samples of %d shards, once; a %s beside them would save that", name, len(urls), SIZES)

    def count(url: str) -> int | DataError:
        kept = cached_path("counts", url)
        try:
            return int(kept.read_text())
        except (OSError, ValueError):
            pass
        try:
            found = len(_fetch_and_index(url)[1])
        except DataError as error:
            return error
        try:
            write_atomically(kept, str(found))
        except OSError as error:
            _log.info("the count of %s is not kept: %s", url, error)
        return found

    counts: dict[str, int] = {}
    lost: list[DataError] = []
    said = time.monotonic()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done, (url, found) in enumerate(zip(urls, pool.map(count, urls), strict=True), start=1):
            if isinstance(found, DataError):
                lost.append(found)
                try:
                    check_lost(name, lost, shards)
                except DataError:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
            else:
                counts[url] = found
            if time.monotonic() - said > 10:
                _log.info("%s: %d of %d shards counted", name, done, len(urls))
                said = time.monotonic()
    return counts


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
