"""Shards behind addresses (`s3://`, `http://`, whatever fsspec knows), read through a bounded cache on the disk."""

import contextlib
import errno
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

from aclip.data.decode import one_line
from aclip.data.progress import progress
from aclip.data.sources.base import WINDOW, Delegating, Runs, Summary, digest_of, group_advice, relative_names
from aclip.data.sources.shard_index import SIZES, Endings, ShardIndex, cached_index, cached_path, index_shard
from aclip.data.sources.shards import Reading, ShardSource, check_lost
from aclip.data.spec import expand_braces
from aclip.errors import AclipError, BadSampleError, DataError, MissingDependencyError

PATIENCE = 300.0  # seconds of waiting, over all retries of one request, before a shard counts as lost
FIRST_WAIT, MAX_WAIT = 1.0, 60.0  # seconds before the first retry, doubled for each further one, and the most
TIMEOUT = 30.0
"""Seconds without a byte after which an HTTP server counts as stalled; other stores have limits of their own."""

RETRY_AFTER = 300.0  # seconds before a lost shard is requested again
CACHE_GB = 32.0  # size of the cache, unless `$ACLIP_CACHE_GB` says otherwise
_AT_ONCE = 8  # downloads while shards are counted

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class RemoteShardSource(Delegating):
    """Shards behind addresses; each is downloaded whole when it is first needed, and evicted when the cache is full.

    Whole, because training wants nearly all of a shard within a short time (`WINDOW` shards are mixed at a time), and
    one stream is what stores and their pricing are made for. The cache is shared by all processes of a machine.

    The number of samples in each shard is taken from `sizes.json` beside the shards; without one, every shard is
    downloaded and counted once, and its index is kept.
    """

    def __init__(self, spec: str, urls: Sequence[str], reading: Reading = Reading()) -> None:  # noqa: B008 - immutable
        """Count the samples of the shards at `urls`."""
        self.spec = spec
        urls = list(dict.fromkeys(urls))
        file_system(urls[0])
        self._reading = reading
        known = _known_sizes(urls)
        counts = _count([url for url in urls if url not in known], spec, len(urls), reading.endings) | known
        self._urls = [url for url in urls if counts.get(url)]
        if not self._urls:
            raise DataError(f"no samples in {spec}: its {len(urls)} shards hold no image")
        self.groups = tuple(counts[url] for url in self._urls)
        self._names = relative_names(self._urls)
        self._runs = Runs(self.groups)
        self._lost_at_opening = len(urls) - len(self._urls)
        self._opened: dict[str, tuple[Path, ShardSource]] = {}
        self._lost: dict[str, tuple[float, DataError]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}, "_lost": {}}

    def __len__(self) -> int:
        return len(self._runs)

    def name(self, index: int) -> str:
        shard, row = self._runs.place(index)
        return f"{self._names[shard]}: sample {row + 1}"

    def path(self, index: int) -> None:
        return None

    def advice(self) -> list[str]:
        return group_advice(self)  # nothing that needs a shard

    @property
    def summary(self) -> Summary:
        lost = self._lost_at_opening
        return Summary(self.spec, len(self), len(self), notes=(f"{lost} shards left out",) if lost else ())

    def digest(self) -> str:
        return digest_of("remote shards", self._names, self.groups)

    def _place(self, index: int) -> tuple[ShardSource, int]:
        shard, row = self._runs.place(index)
        source = self._open(self._urls[shard])
        if row >= len(source):
            raise BadSampleError(f"the shard holds {len(source)} samples, {self.groups[shard]} when it was counted")
        return source, row

    def _open(self, url: str) -> ShardSource:
        """Return a shard, which is fetched unless it is open or was lost a short while ago; the last used stay open."""
        path, source = self._opened.pop(url, (None, None))
        if path is None or source is None or not _touch(path):
            now = time.monotonic()
            self._lost = {one: (since, why) for one, (since, why) in self._lost.items() if now - since < RETRY_AFTER}
            if url in self._lost:
                raise BadSampleError(str(self._lost[url][1]))
            try:
                path, index = fetch_and_index(url, self._reading.endings)
                source = ShardSource(self.spec, [path], self._reading, index)
            except DataError as error:
                self._lost[url] = time.monotonic(), error
                check_lost(self.spec, [why for _, why in self._lost.values()], len(self._urls))
                raise BadSampleError(str(error)) from error
        self._opened[url] = path, source
        if len(self._opened) > 2 * WINDOW:  # two windows are in use where one ends
            del self._opened[next(iter(self._opened))]
        return source


def expand_urls(spec: str) -> list[str]:
    """Return the addresses that a pattern names: braces anywhere, `*` where the store can list its files."""
    urls: list[str] = []
    for pattern in expand_braces(spec):
        found = [pattern]
        if "*" in pattern:
            store = file_system(pattern)
            found = sorted(map(store.unstrip_protocol, _retried(functools.partial(store.glob, pattern), pattern)))
        if not found:
            raise DataError(f"no such file: {pattern}")
        urls += found
    return urls


def file_system(url: str) -> Any:
    """Return fsspec's file system for an address, in every process its own: connections do not survive a fork."""
    protocol = url.partition("://")[0]
    try:
        import fsspec

        if protocol not in ("http", "https"):
            return fsspec.filesystem(protocol)
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        return fsspec.filesystem(protocol, client_kwargs={"timeout": limits})
    except ImportError as error:
        raise MissingDependencyError(f"{url} needs more packages to be read: pip install 'attentive-clip[remote]' "
                                     f"({one_line(error)})") from error
    except ValueError as error:
        raise DataError(f"fsspec does not know the protocol '{protocol}://': {one_line(error)}") from error


class _MissingError(DataError):
    """What was requested does not exist."""


def _retried(request: Callable[[], _Result], url: str) -> _Result:
    """Return what a request to a store returns, which is repeated with back-off while it fails in passing.

    What is wrong here, a missing package or a full disk, is raised as it is.
    """
    import tenacity

    def log(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        assert state.next_action is not None
        level = logging.WARNING if state.idle_for > 10 * FIRST_WAIT else logging.INFO
        _log.log(level, "%s: %s; retried in %.0f s", url, one_line(error and _cause(error)), state.next_action.sleep)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: _kind(error) == "passing"),
        wait=tenacity.wait_exponential_jitter(initial=FIRST_WAIT, max=MAX_WAIT, jitter=FIRST_WAIT),
        stop=lambda state: state.idle_for >= PATIENCE,
        before_sleep=log,
        sleep=lambda seconds: time.sleep(seconds),
        reraise=True,
    )
    try:
        return retrying(request)
    except Exception as error:  # every store has errors of its own
        kind = _kind(error)
        if kind == "local":
            raise
        if kind == "missing":
            raise _MissingError(f"{url} cannot be fetched: there is no such file") from error
        raise DataError(f"{url} cannot be fetched: {one_line(_cause(error))}") from error


def _kind(error: BaseException) -> Literal["local", "missing", "refused", "passing"]:
    """Return what is behind the failure of a request."""
    cause = _cause(error)
    status = getattr(cause, "status", 0)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    if full or isinstance(error, AclipError) or not isinstance(error, Exception):
        return "local"
    if isinstance(cause, FileNotFoundError | PermissionError) or status in (403, 404, 410):
        return "missing"
    return "refused" if 400 <= status < 500 and status not in (408, 409, 425, 429) else "passing"


def _cause(error: BaseException) -> BaseException:
    """Return what failed: fsspec reports whatever goes wrong with an HTTP server as a file that does not exist."""
    cause = error.__cause__
    of_http = type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError)
    return cause if cause is not None and of_http and isinstance(error, FileNotFoundError) else error


def _known_sizes(urls: Sequence[str]) -> dict[str, int]:
    """Return address -> samples from the `sizes.json` of each folder that has one.

    If the store does not say whether there is one, that is an error: to count shards instead would give this rank
    another order than those that could read it.
    """
    known: dict[str, int] = {}
    for folder in dict.fromkeys(url.rpartition("/")[0] for url in urls):
        address = f"{folder}/{SIZES}"
        try:
            sizes = json.loads(_retried(functools.partial(file_system(address).cat_file, address), address))
        except _MissingError:
            continue
        except ValueError:
            _log.warning("%s is not JSON: the shards are counted", address)
            continue
        if isinstance(sizes, dict):
            known |= {f"{folder}/{name}": n for name, n in sizes.items() if isinstance(n, int) and n > 0}
    return {url: known[url] for url in urls if url in known}


def _count(urls: Sequence[str], spec: str, shards: int, endings: Endings) -> dict[str, int]:
    """Return address -> samples, from shards that are downloaded if their index is not cached."""

    def count(url: str) -> int | DataError:
        try:
            return len((cached_index(url, endings) or fetch_and_index(url, endings)[1]).keys)
        except DataError as error:
            return error

    counts: dict[str, int] = {}
    lost: list[DataError] = []
    doing = f"counting the samples of {spec}, once (a {SIZES} beside the shards would save that)"
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        with progress(doing, len(urls), "shards") as advance:
            for url, found in zip(urls, pool.map(count, urls), strict=True):
                if isinstance(found, DataError):
                    lost.append(found)
                    check_lost(spec, lost, shards)
                else:
                    counts[url] = found
                advance(1)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return counts


def fetch_and_index(url: str, endings: Endings) -> tuple[Path, ShardIndex]:
    """Return the cached file of a shard, which is downloaded if it is not there, and its index."""
    from filelock import FileLock

    path = cached_path("shards", url, ".tar")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _touch(path):
            with FileLock(path.with_suffix(".lock")):
                if not _touch(path):  # another process may have downloaded it meanwhile
                    _download(url, path, endings)
                    _make_room(path)
        # The index was written at the time of the download, so it belongs to this file whatever its version.
        index = cached_index(url, endings)
        if index is not None or path.exists():
            return path, index or index_shard(path, endings, address=url, version="unknown")
    except OSError as error:
        raise DataError(f"no room for {url} in {path.parent}: {one_line(error)}") from error
    raise DataError(f"{url} is evicted from the cache before it is read: set ACLIP_CACHE_GB to more than a few shards")


def _download(url: str, path: Path, endings: Endings) -> None:
    part = path.with_suffix(".part")

    def attempt() -> Mapping[str, Any]:
        store = file_system(url)
        info: Mapping[str, Any] = store.info(url)
        store.get_file(url, str(part))
        size, expected = part.stat().st_size, info.get("size")
        if expected is not None and size != expected:
            raise ConnectionError(f"{size:,} of {expected:,} bytes arrived")
        return info

    try:
        info = _retried(attempt, url)
        tags = (info.get(name) for name in ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime"))
        version = next((str(tag) for tag in tags if tag), "unknown")
        try:
            index_shard(part, endings, address=url, version=f"{part.stat().st_size} {version}")
        except DataError as error:
            raise DataError(str(error).replace(str(part), url)) from error
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _make_room(newest: Path) -> None:
    """Evict the shards, and then the indexes, used longest ago until the cache has its size; the newest shard stays."""
    chosen = os.environ.get("ACLIP_CACHE_GB", str(CACHE_GB))
    try:
        limit = float(chosen) * 1e9
    except ValueError as error:
        raise DataError(f"ACLIP_CACHE_GB must be a number of gigabytes, not '{chosen}'") from error
    files = []
    for order, pattern in enumerate(("shards/*.tar", "index/*.npz")):
        for path in newest.parent.parent.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                status = path.stat()
                files.append((order, status.st_atime_ns, status.st_size, path))
    used = sum(size for _, _, size, _ in files)
    for _, _, size, path in sorted(files):
        if used <= limit:
            break
        if path != newest:
            path.unlink(missing_ok=True)
            used -= size


def _touch(path: Path) -> bool:
    """Mark a file of the cache as used now; return whether it is there."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except OSError:
        return False
    return True
