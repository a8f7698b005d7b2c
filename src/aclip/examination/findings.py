"""What is worth saying about a source, from its measurements."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import pandas

from aclip.examination.measure import Measurements

T = TypeVar("T")

Severity = Literal["error", "warning", "note"]
"""An error spoils results or is lost to training; a warning costs quality; a note is good to know."""

_EXAMPLES, _GROUP = 8, 4  # examples of a finding that are kept, single samples or groups; samples of a group

Place = tuple[int, int]
"""A sample: number of its source (0 is the one examined), row in that one's measurements."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    name: str  # short and stable, for programs
    severity: Severity
    title: str  # for people
    count: int  # of samples or captions that it concerns
    total: int  # of these
    unit: Literal["samples", "captions"]
    advice: str  # what to do, in one line
    details: tuple[tuple[str, int], ...] = ()  # parts of `count` with their numbers
    examples: tuple[tuple[Place, ...], ...] = ()  # groups of samples that belong together, of one where none do

    @property
    def share(self) -> float:
        return self.count / max(self.total, 1)


@dataclass(frozen=True)
class Limits:
    """What a model takes."""

    model: str
    image_size: tuple[int, int]  # (height, width) in pixels
    context_length: int | None  # tokens of a caption, start and end included; None without text


def find_all(measured: Sequence[Measurements], groups: Sequence[np.ndarray], limits: Limits) -> tuple[Finding, ...]:
    """Return the findings about the first source, errors first; for the groups see `find_duplicates`."""
    source = measured[0]
    found = [*_bad_samples(source), *_leaks(measured, groups), *_pixels(source, limits),
             *_duplicates(source, groups[0]), *_captions(source, limits)]
    return tuple(sorted(found, key=lambda finding: get_args(Severity).index(finding.severity)))


def _of_samples(
    source: Measurements, rows: np.ndarray, name: str, severity: Severity, title: str, advice: str, *,
    details: tuple[tuple[str, int], ...] = (), first: np.ndarray | None = None,
) -> Iterator[Finding]:
    """Yield the finding about some rows, if there are any; `first` are its examples."""
    if len(rows):
        examples = _singly(rows) if first is None else tuple(((0, row),) for row in first[:_EXAMPLES].tolist())
        yield Finding(name, severity, title, len(rows), len(source.samples), "samples", advice, details, examples)


def _bad_samples(source: Measurements) -> Iterator[Finding]:
    samples = source.samples
    for name, title, advice, bad in (
        ("unreadable", "Images that cannot be read", "Training skips them and takes others in their place: repair or "
         "fetch them again, or leave them out.", samples[(samples["reason"] != "") & ~samples["decoded"]]),
        ("no-caption", "Images without a caption", "Training skips them: caption them, or leave them out.",
         samples[(samples["reason"] != "") & samples["decoded"]]),
    ):
        counts = tuple((reason, int(count)) for reason, count in bad["reason"].value_counts()[:100].items())
        yield from _of_samples(source, bad.index.to_numpy(), name, "error", title, advice, details=counts,
                               first=bad.drop_duplicates("reason").index.to_numpy())


def _leaks(measured: Sequence[Measurements], groups: Sequence[np.ndarray]) -> Iterator[Finding]:
    source = measured[0]
    for number, (other, theirs) in enumerate(zip(measured[1:], groups[1:], strict=True), start=1):
        rows = shared_rows(groups[0], theirs)
        if not len(rows):
            continue
        twins = {int(group): row for row, group in reversed(list(enumerate(theirs.tolist())))}
        pairs = [(row, twins[int(groups[0][row])]) for row in rows.tolist()]
        same_file = int(np.isin(source.samples["content"][rows], other.samples["content"]).sum())
        same_caption = sum(bool(captions_of(source, row) & captions_of(other, twin)) for row, twin in pairs)
        yield Finding(
            "leak", "error", f"Images that are also in {Path(other.source.spec).name}", len(rows), len(source.samples),
            "samples", "Results on it are too good for a model that has trained on them: leave them out of training.",
            (("the same file", same_file), ("another file that looks the same", len(rows) - same_file),
             ("with the same caption", same_caption)),
            tuple(((0, row), (number, twin)) for row, twin in _spread(pairs)))


def shared_rows(groups: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the rows of a source whose image another source has, too."""
    return np.flatnonzero((groups >= 0) & np.isin(groups, others))


def captions_of(source: Measurements, row: int) -> set[int]:
    """Return the hashes of a sample's captions, equal for those that differ in case and white space alone."""
    first, last = np.searchsorted(source.captions["sample"], [row, row + 1])
    return set(source.captions["exact"].iloc[first:last].tolist())


def _pixels(source: Measurements, limits: Limits) -> Iterator[Finding]:
    samples, (least_height, least_width) = source.samples, limits.image_size
    width, height = samples["width"], samples["height"]
    yield from _of_samples(
        source, np.flatnonzero(samples["blank"] & samples["decoded"]), "blank", "warning", "Images of a single colour",
        "There is nothing to see in them; often they stand for an image that could not be loaded: leave them out.")
    yield from _of_samples(
        source, np.flatnonzero(samples["dark"]), "dark", "error", "16-bit grey images that come out nearly black",
        "Their values use a small part of the range: put '?stretch=4095' behind the source for 12 bits, or "
        "'?stretch=1' to stretch each image on its own.")
    rows = np.flatnonzero(samples["decoded"] & ((height < least_height) | (width < least_width)))
    yield from _of_samples(
        source, rows, "small", "warning" if len(rows) > 0.1 * len(samples) else "note",
        f"Images smaller than the input of {limits.model}, {least_width} x {least_height}",
        "They are enlarged, which adds cost and no detail: take larger originals, or a model with a smaller input.",
        first=(width * height)[rows].sort_values(kind="stable").index.to_numpy())


def _duplicates(source: Measurements, groups: np.ndarray) -> Iterator[Finding]:
    extra, examples = _repeated(groups)
    if extra:
        same_file = int(source.samples["content"][groups >= 0].duplicated().sum())
        yield Finding(
            "duplicate", "warning", "Images that are there more than once", extra, len(source.samples), "samples",
            "Copies are drawn more often, and in one batch they count as each other's negatives: keep one, with the "
            "captions of all. Variants of a drawing may stay.",
            (("the same file", same_file), ("in another size, format or quality", extra - same_file)), examples)


def _captions(source: Measurements, limits: Limits) -> Iterator[Finding]:
    captions = source.captions
    if limits.context_length is not None:
        cut = np.flatnonzero(captions["tokens"] > limits.context_length)
        if len(cut):
            yield Finding(
                "cut", "warning" if len(cut) > 0.1 * len(captions) else "note",
                f"Captions longer than the {limits.context_length} tokens that {limits.model} reads",
                len(cut), len(captions), "captions",
                "What they say last is never seen: begin with what matters, shorten them, or split them into several.",
                examples=_singly(captions["sample"][cut].unique()))
    distinct = captions.drop_duplicates(["exact", "sample"])  # the same words twice for one image
    extra, groups = _repeated(distinct["exact"].to_numpy(), distinct["sample"].to_numpy())
    if len(distinct) > 1 and extra == len(distinct) - 1:
        yield Finding(
            "one-caption", "error", "Every image has the same caption", len(captions), len(captions), "captions",
            "There is nothing to tell images apart by, so the contrastive loss is 0: take captions that differ.",
            examples=groups)
    elif extra:
        yield Finding(
            "same-caption", "note", "Captions that several images share", extra, len(captions), "captions",
            "Such images are not each other's negatives; if they show different things, the captions say too little.",
            examples=groups)


def _repeated(values: np.ndarray, rows: np.ndarray | None = None) -> tuple[int, tuple[tuple[Place, ...], ...]]:
    """Return how many values repeat an earlier one, without those below 0, and the rows of the largest groups."""
    frame = pandas.DataFrame({"value": values, "row": np.arange(len(values)) if rows is None else rows})
    frame = frame[frame["value"] >= 0]
    counts = frame["value"].value_counts(sort=False).sort_values(ascending=False, kind="stable")
    largest = (frame["row"][frame["value"] == value][:_GROUP] for value in counts[counts > 1].index[:_EXAMPLES])
    return len(frame) - len(counts), tuple(tuple((0, int(row)) for row in group) for group in largest)


def _singly(rows: np.ndarray) -> tuple[tuple[Place, ...], ...]:
    """Return some rows from all over as groups of one."""
    return tuple(((0, row),) for row in _spread(rows.tolist()))


def _spread(items: list[T]) -> list[T]:
    """Return `_EXAMPLES` of the items, evenly spread over them."""
    return [items[i * len(items) // _EXAMPLES] for i in range(_EXAMPLES)] if len(items) > _EXAMPLES else items
