"""Samples as the members of a tar file, in WebDataset layout."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from typing import IO, NamedTuple


class Sample(NamedTuple):
    """One sample of a shard.

    Attributes:
        key: name that its members share; no dot, no slash.
        members: bytes by extension, e.g. {"png": ..., "txt": ...}.
    """

    key: str
    members: Mapping[str, bytes]


def write_tar(file: IO[bytes], samples: Iterable[Sample]) -> int:
    """Write the members `key.extension` of samples, in order; return how many samples there were.

    The bytes depend on the samples alone: no times, no owners.

    Raises:
        ValueError: a key that readers would cut at its first dot or take for a folder.
    """
    count = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            if not sample.key or set(sample.key) & set("./\\"):
                raise ValueError(f"the key {sample.key!r} of a sample is empty or has a dot or a slash")
            for extension, data in sorted(sample.members.items()):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(data)  # the other fields keep their fixed defaults: time 0, owner 0
                archive.addfile(member, io.BytesIO(data))
            count += 1
    return count
