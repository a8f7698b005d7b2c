"""WebDataset shards written so that an interrupted fetch continues and a finished one is known by hash.

A folder is built shard by shard. Each shard appears whole or not at all, and is then entered with its
hash in `progress.json`; when all are there, `dataset.json` takes its place. A shard's bytes depend on its
samples alone: no times, no owners, no order of directories.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from aclip.data.fetch.packages import file_sha256
from aclip.data.fetch.progress import Progress
from aclip.data.tar_files import Sample, write_tar
from aclip.errors import DataError
from aclip.files import write_atomically

_FINISHED = "dataset.json"
_UNFINISHED = "progress.json"

Part = TypeVar("Part")


def unit_hash(text: str) -> float:
    """Return h(text) in [0, 1): the first 8 hex digits of its SHA-1 as a fraction of 2^32."""
    return int(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:8], 16) / 2**32


def shuffled(key: str) -> tuple[float, str]:
    """Return what the samples of a split are sorted by: an order without order, for readers that stream."""
    return unit_hash(f"order{key}"), key


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard.

    Attributes:
        samples: how many it holds.
        bytes: size of the file.
        sha256: of the file, 64 hex digits.
        skipped: samples that it should hold and could not, with the reason.
    """

    samples: int
    bytes: int
    sha256: str
    skipped: Mapping[str, str]


def split_sizes(folder: Path) -> dict[str, int]:
    """Return the number of samples of each split of a finished folder; empty for any other folder."""
    try:
        splits = json.loads((folder / _FINISHED).read_bytes())["splits"]
        return {name: int(split["samples"]) for name, split in splits.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def tar_bytes(samples: Iterable[Sample]) -> bytes:
    """Return the tar archive of some samples, see `write_tar`.

    Raises:
        ValueError: a key that readers would cut at its first dot or take for a folder.
    """
    buffer = io.BytesIO()
    write_tar(buffer, samples)
    return buffer.getvalue()


class ShardFolder:
    """A folder of shards under construction.

    Args:
        folder: made if missing. One that was built from something else is built anew, shard by shard.
        origin: all that the bytes depend on (versions, hashes, sizes), JSON values. It is kept in
            `dataset.json`.
    """

    def __init__(self, folder: Path, origin: Mapping[str, Any]) -> None:
        self.folder = folder
        self.origin = dict(origin)
        self._tools: dict[str, str] = {}
        self._records: dict[str, ShardRecord] = {}

    def is_finished(self) -> bool:
        """Say whether an earlier call has finished this folder and all its shards are still as written.

        Every shard's hash is computed (about a second a gigabyte). The tools it was made with do not
        matter: a set that is there stays as it is.
        """
        records, _ = self._read(_FINISHED)
        return bool(records) and all(self._is_intact(name, record) for name, record in records.items())

    def resume(self, tools: Mapping[str, str]) -> None:
        """Go on where an earlier call stopped: keep the shards that are entered and intact.

        A finished folder with a damaged shard counts as unfinished from here on.

        Args:
            tools: versions of what makes the samples. Shards made with others are made anew, so that no
                folder mixes them.
        """
        self._tools = dict(tools)
        for state in (_FINISHED, _UNFINISHED):
            records, made_with = self._read(state)
            if made_with == self._tools:
                self._records.update(
                    {name: record for name, record in records.items() if self._is_intact(name, record)}
                )
        self._write(_UNFINISHED, {})
        (self.folder / _FINISHED).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Say whether the shard `name` (path below the folder) is there."""
        return name in self._records

    def skipped(self) -> dict[str, str]:
        """Return the samples that no shard could hold, with the reason of each."""
        reasons: dict[str, str] = {}
        for name in sorted(self._records):
            reasons.update(self._records[name].skipped)
        return reasons

    def add(self, name: str, samples: Iterable[Sample], skipped: Mapping[str, str]) -> None:
        """Write one shard and enter it; an exception from `samples` leaves no trace of it.

        Args:
            name: path below the folder.
            samples: what it holds, in order.
            skipped: what it should have held, with the reason; read after `samples` is exhausted.
        """
        samples = list(samples)
        data = tar_bytes(samples)
        write_atomically(self.folder / name, data)
        digest = hashlib.sha256(data).hexdigest()
        self._records[name] = ShardRecord(len(samples), len(data), digest, dict(skipped))
        self._write(_UNFINISHED, {})

    def fill(
        self,
        splits: Mapping[str, Sequence[Part]],
        samples: Callable[[Sequence[Part], dict[str, str]], Iterable[Sample]],
        samples_per_shard: int,
        stage: str,
        progress: Progress,
    ) -> None:
        """Write the shards `SPLIT/000000.tar` ... that are not there yet.

        Args:
            splits: what each sample is made of, in the order of the shards.
            samples: makes the samples of one shard; it enters those that it cannot make into the mapping
                (key -> reason) and tells `progress` of each.
            samples_per_shard: how many go into one shard.
            stage: what is done, for the progress display.
            progress: told the pictures of shards that were there.
        """
        progress.start(stage, sum(map(len, splits.values())), "pictures")
        missing: list[tuple[str, Sequence[Part]]] = []
        for split, parts in splits.items():
            for number, start in enumerate(range(0, len(parts), samples_per_shard)):
                name, part = f"{split}/{number:06d}.tar", parts[start : start + samples_per_shard]
                if self.has(name):
                    progress.advance(len(part), cached=True)
                else:
                    missing.append((name, part))
        for name, part in missing:
            skipped: dict[str, str] = {}
            self.add(name, samples(part, skipped), skipped)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Mark the folder as finished.

        Args:
            facts: what else a reader may want to know, JSON values: `splits` maps the name of each split
                to an object with at least `samples`.
        """
        self._write(_FINISHED, facts)
        (self.folder / _UNFINISHED).unlink(missing_ok=True)

    def _is_intact(self, name: str, record: ShardRecord) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == record.bytes and file_sha256(path) == record.sha256

    def _read(self, name: str) -> tuple[dict[str, ShardRecord], dict[str, str]]:
        """Return records and tools of a state file: none if it is missing, damaged or of another origin."""
        try:
            state = json.loads((self.folder / name).read_bytes())
            if state["origin"] != self.origin:
                return {}, {}
            return {shard: ShardRecord(**record) for shard, record in state["shards"].items()}, state["tools"]
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return {}, {}
        except OSError as error:
            raise DataError(f"{self.folder / name} cannot be read: {error.strerror}") from None

    def _write(self, name: str, facts: Mapping[str, Any]) -> None:
        state = {
            **facts,
            "origin": self.origin,
            "tools": self._tools,
            "shards": {shard: asdict(self._records[shard]) for shard in sorted(self._records)},
        }
        write_atomically(self.folder / name, (json.dumps(state, indent=1) + "\n").encode())
