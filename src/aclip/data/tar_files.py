"""Samples as the members of a tar file, in WebDataset layout."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from typing import IO, NamedTuple


class Sample(NamedTuple):
    """The name that a sample's members share, without dot and slash, and their bytes by extension."""

    key: str
    members: Mapping[str, bytes]


def write_tar(file: IO[bytes], samples: Iterable[Sample]) -> int:
    """Write the members `key.extension` of samples, in order; return the number of samples.

    The bytes depend on the samples alone: no times, no owners.
    """
    count = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            for extension, data in sorted(sample.members.items()):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            count += 1
    return count
