"""A clean list of what an examined source holds: as a manifest, or as names to leave out."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aclip.data.captions import clean_captions
from aclip.data.doctor.examination import Examination
from aclip.data.doctor.findings import captions_of, leaked
from aclip.data.doctor.measure import GOOD, Measurements
from aclip.data.sources.base import Source
from aclip.data.sources.folder import FolderSource
from aclip.data.sources.joined import Joined
from aclip.data.sources.manifest import ManifestSource
from aclip.data.sources.part import Part
from aclip.errors import BadSampleError, ConfigError, category
from aclip.files import write_atomically

MANIFESTS = (".jsonl", ".csv", ".tsv")
SKIP_LIST = ".txt"


@dataclass(frozen=True)
class Cleaned:
    """What became of a source's samples.

    Attributes:
        path: the file written.
        kept: samples that are left.
        left_out: reason -> samples that are not.
    """

    path: Path
    kept: int
    left_out: dict[str, int]


def left_out(examined: Examination) -> dict[int, str]:
    """Return row -> reason of the samples that a clean list leaves out.

    Those are: samples that cannot be used; pictures of a single colour; pictures that an evaluation set has too;
    copies, by file or by look, that bring no caption which the kept one does not have.
    """
    source, copies = examined.measured[0], examined.copies
    samples = source.samples
    reasons = {int(row): source.reasons[samples["reason"][row]] for row in np.flatnonzero(samples["reason"] != GOOD)}
    for row in np.flatnonzero(samples["blank"] & samples["decoded"]).tolist():
        reasons.setdefault(row, "a picture of a single colour")
    for number, other in enumerate(examined.measured[1:], start=1):
        for row in leaked(copies, copies.by_look, number).tolist():
            reasons.setdefault(row, f"also in {other.source.name}")
    own = copies.by_look[: len(samples)]
    kept: dict[int, int] = {}
    _, inverse, counts = np.unique(own, return_inverse=True, return_counts=True)
    for row in np.flatnonzero((own >= 0) & (counts[inverse] > 1)).tolist():
        if row in reasons:
            continue
        first = kept.setdefault(int(own[row]), row)
        if first != row and captions_of(source, row) <= captions_of(source, first):
            reasons[row] = "a copy of another picture, with no caption of its own"
    return reasons


def check_fix(path: Path, source: Source) -> None:
    """Refuse a clean list that cannot be written, before anything is read.

    Raises:
        ConfigError: an ending that is none of ours; a file that is there; a manifest of pictures inside other files.
    """
    if path.suffix.lower() not in (*MANIFESTS, SKIP_LIST):
        raise ConfigError(f"--fix {path}: give it the ending {', '.join(MANIFESTS)} (a manifest) or {SKIP_LIST} (the "
                          "names to leave out)")
    if path.exists():
        raise ConfigError(f"--fix {path} is there already: name a new file")
    if path.suffix.lower() != SKIP_LIST and not any(picture_path(source, i) for i in range(min(len(source), 100))):
        skip = path.with_suffix(SKIP_LIST)
        raise ConfigError(f"the pictures of {source.name} are no files of their own, which a manifest could name: "
                          f"--fix {skip} writes the names to leave out, and `aclip data pack {source.name} --leave-out "
                          f"{skip} --output FOLDER` shards without them")


def write_clean(
    examined: Examination, path: Path, progress: Callable[[int], object] = lambda _: None
) -> Cleaned:
    """Write the samples that are left to a manifest, or the names of the others to a list; the source stays.

    A manifest has paths relative to itself where the picture lies below its folder, and absolute ones elsewhere. A
    line of a `.jsonl` holds all captions of a picture, a row of a table one.

    Args:
        examined: the whole source, not some of its samples.
        path: see `check_fix`.
        progress: called with 1 for every sample of the source.
    """
    source = examined.measured[0]
    reasons = left_out(examined)
    if path.suffix.lower() == SKIP_LIST:
        names = [source.source.key(int(source.samples["index"][row])) for row in sorted(reasons)]
        text = "".join(f"{name}\n" for name in names)
    else:
        write = _json_lines if path.suffix.lower() == ".jsonl" else _table
        text = write(_rows(source, reasons, path, progress), path)
    write_atomically(path, text.encode("utf-8", errors="surrogateescape"))
    return Cleaned(path, len(source.samples) - len(reasons), dict(Counter(reasons.values()).most_common()))


def picture_path(source: Source, index: int) -> Path | None:
    """Return the file of picture `index` of a source, or None where it has none of its own."""
    if isinstance(source, Part):
        return picture_path(source.source, source.first + index)
    if isinstance(source, Joined):
        for one in source.sources:
            if index < len(one):
                return picture_path(one, index)
            index -= len(one)
    path = None
    if isinstance(source, FolderSource):
        path = Path(source.name) / source.key(index)
    elif isinstance(source, ManifestSource):
        path = source.folder / source.key(index).partition(": ")[2]  # after the row's number
    return path if path is not None and path.is_file() else None


class _Kept(NamedTuple):
    image: str
    captions: tuple[str, ...]
    tags: tuple[str, ...]
    label: str | None


def _rows(
    measured: Measurements, reasons: dict[int, str], manifest: Path, progress: Callable[[int], object]
) -> Iterator[_Kept]:
    """Yield what a manifest says of the samples that are left; one that has gone since joins `reasons`."""
    folder = manifest.parent.resolve()
    for row, index in enumerate(measured.samples["index"].tolist()):
        progress(1)
        if row in reasons:
            continue
        path = picture_path(measured.source, index)
        try:
            raw = measured.source.read(index)
            captions = clean_captions(raw.captions)
        except BadSampleError as error:
            reasons[row] = category(error.reason)
            continue
        if path is None:
            reasons[row] = "a file name that cannot be written down"
            continue
        path = path.resolve()
        image = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else os.fspath(path)
        yield _Kept(image, captions, raw.tags, raw.label)


def _json_lines(rows: Iterator[_Kept], _: Path) -> str:
    text = io.StringIO()
    for row in rows:
        fields: dict[str, Any] = {
            "image": row.image, "caption": row.captions[0] if len(row.captions) == 1 else row.captions}
        if row.tags:
            fields["tags"] = row.tags
        if row.label is not None:
            fields["label"] = row.label
        text.write(json.dumps(fields, ensure_ascii=False) + "\n")
    return text.getvalue()


def _table(rows: Iterator[_Kept], path: Path) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", lineterminator="\n")
    writer.writerow(("image", "caption", "tags", "label"))
    for row in rows:
        writer.writerows((row.image, caption, ";".join(row.tags), row.label or "") for caption in row.captions)
    return text.getvalue()
