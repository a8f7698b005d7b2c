"""What is known of the licences of a set, kept beside its pictures."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from aclip.data.fetch.packages import Package
from aclip.files import write_atomically


@dataclass(frozen=True)
class Licence:
    """One row of `licences.csv`; what is not known stays empty.

    Attributes:
        style: what it is for: a style, family or part of the set, the word that its samples bear too.
        package: name of the package that brings it.
        version: of the package.
        title: name of the work.
        author: who made it.
        author_url: where they are found.
        licence: SPDX identifier where there is one, else in words.
        licence_url: its text.
    """

    style: str
    package: str
    version: str
    title: str | None = None
    author: str | None = None
    author_url: str | None = None
    licence: str | None = None
    licence_url: str | None = None

    @classmethod
    def of_info(cls, style: str, package: Package, info: Mapping[str, Any]) -> "Licence":
        """Return the row of an Iconify pack.

        Args:
            style: the pack's name.
            package: what brings it.
            info: what the pack says of itself.
        """
        author, licence = info.get("author", {}), info.get("license", {})
        return cls(
            style,
            package.name,
            package.version,
            title=info.get("name"),
            author=author.get("name"),
            author_url=author.get("url"),
            licence=licence.get("spdx") or licence.get("title"),
            licence_url=licence.get("url"),
        )


def write_licences(folder: Path, rows: Iterable[Licence], texts: Mapping[str, bytes]) -> None:
    """Write the table of all licences, and what the packages themselves say.

    Args:
        folder: made if missing.
        rows: of the table `licences.csv`.
        texts: files by their path below `folder`.
    """
    table = io.StringIO()
    columns = [field.name for field in fields(Licence)]
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_atomically(folder / "licences.csv", table.getvalue().encode())
    for name, data in texts.items():
        write_atomically(folder / name, data)
