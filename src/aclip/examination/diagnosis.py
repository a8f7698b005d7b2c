"""`aclip data doctor`: what is wrong with a source, before a training run finds out."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from aclip.data.progress import progress
from aclip.data.sources.base import Source
from aclip.errors import BadSampleError, ConfigError
from aclip.examination.duplicates import Duplicates, find_duplicates
from aclip.examination.findings import Finding, Limits, Place, captions_of, find_all, leaked
from aclip.examination.measure import GOOD, Measurements, measure
from aclip.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

    from aclip.data.captions import CaptionTokenizer

_LISTS, _NAMES = (".jsonl", ".csv", ".tsv"), ".txt"  # what `fix` writes: the samples that are left, or the others
_EXAMPLE_SIDE = 160  # pixels
_LONGER = 4  # times the model's context that captions are counted to


@dataclass(frozen=True)
class Examination:
    """What was found in a source.

    Attributes:
        measured: the source, then those that it was compared with; `duplicates` are of all of these.
        limits: of the model that the data is for.
        findings: errors first.
    """

    measured: tuple[Measurements, ...]
    duplicates: Duplicates
    limits: Limits
    findings: tuple[Finding, ...]

    def load_examples(self) -> "list[list[list[Example]]]":
        """Read the examples of every finding again, in groups of samples that belong together."""
        return [[[load_example(self, place) for place in group] for group in finding.examples]
                for finding in self.findings]


def doctor(source: str, *, against: Sequence[str] = (), model: str = "vit-tiny", output: str = "data-doctor",
           fix: str | None = None, workers: int | None = None, limit: int | None = None) -> Examination:
    """Look for what is wrong with a source: every sample is read once, and nothing of the source is changed.

    Finds images that cannot be read, duplicates, images shared with an evaluation set, and captions that are missing,
    repeated or too long. Prints a table and writes a page with examples and advice.

    Args:
        source: pairs of any kind that training takes.
        against: evaluation sets, which should share no image with the source.
        model: the model that the data is for: its input size and context length.
        output: folder for data.html and data.json.
        fix: also write what training should leave out: bad samples, duplicates and shared images. A .txt file lists
            their names, for `aclip data pack --leave-out`; a .jsonl, .csv or .tsv file lists the other samples, ready
            to train on.
        workers: processes that read (default: one per core).
        limit: examine at most so many samples of each source, drawn at random.

    Returns:
        The measurements and findings.

    Raises:
        ConfigError: an option out of range, or a `fix` that cannot be written.
    """
    from rich.console import Console

    from aclip.data.sources import open_source, open_training
    from aclip.report.data_page import write_data_page

    for name, value, least in (("workers", workers, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} {value}: give {least} or more")
    if fix is not None and limit is not None:
        raise ConfigError("a fix needs the whole source: leave out the limit")
    limits, tokenizer = _needs(model)
    opened = open_training(source)
    others = [open_source(spec) for spec in against]
    if fix is not None:
        check_fix(Path(fix), opened)
    examined = examine(opened, others, limits=limits, tokenizer=tokenizer, workers=workers, limit=limit)
    page = write_data_page(examined, Path(output))
    console = Console(highlight=False)
    print_findings(console, examined)
    say = partial(console.print, markup=False, soft_wrap=True)
    if fix is not None:
        left_out = write_fix(examined, Path(fix))
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "nothing"
        say(f"{fix}: {len(opened) - sum(left_out.values()):,} samples are kept, left out: {reasons}")
        if Path(fix).suffix.lower() == _NAMES:
            say(f"next: aclip data pack '{opened.spec}' --leave-out {fix} --output FOLDER")
    say(f"done. page: {page}")
    return examined


def examine(source: Source, against: Sequence[Source] = (), *, limits: Limits,
            tokenizer: "CaptionTokenizer | None" = None, workers: int | None = None, limit: int | None = None
            ) -> Examination:
    """Read every sample once and report what was found; nothing is written.

    Args:
        source: what is examined.
        against: evaluation sets, which should share no image with it.
        limits: what the model takes that the data is for.
        tokenizer: with a longer context than the model's, or captions that are cut look whole; None counts no tokens.
        workers: processes that read; 0 reads in this one, None takes one per core.
        limit: samples of each source that are read at most, drawn at random.
    """
    from aclip.devices import usable_cores

    workers = usable_cores() if workers is None else workers
    total = sum(min(len(one), limit or len(one)) for one in (source, *against))
    with progress("examining", total) as advance:
        measured = tuple(measure(one, tokenizer=tokenizer if one is source else None, workers=workers, limit=limit,
                                 advance=advance) for one in (source, *against))
    duplicates = find_duplicates(measured)
    return Examination(measured, duplicates, limits, find_all(measured, duplicates, limits))


def _needs(model: str) -> "tuple[Limits, CaptionTokenizer | None]":
    """Return what a model takes, and a tokenizer that counts captions beyond its context; none without text."""
    from aclip.data.captions import CaptionTokenizer
    from aclip.models import model_config, shape_of, tokenizer_of

    config = model_config(model)
    size = shape_of(config).image_size
    if not config.get("text_cfg"):
        return Limits(model, size, None), None
    tokenizer: Any = tokenizer_of(model)
    context = CaptionTokenizer(tokenizer).context_length
    return Limits(model, size, context), CaptionTokenizer(partial(tokenizer, context_length=_LONGER * context))


def print_findings(console: "Console", examined: Examination) -> None:
    """Print a line for each finding."""
    from rich.markup import escape
    from rich.table import Table

    source = examined.measured[0]
    usable = int((source.samples["decoded"] & (source.samples["captions"] > 0)).sum())
    console.print(f"{source.source.spec}: {len(source.samples):,} of {len(source.source):,} samples examined, "
                  f"{usable:,} usable, {len(source.captions):,} captions", markup=False, soft_wrap=True)
    if not examined.findings:
        console.print("no findings")
        return
    # Title and advice share a column, so that both stay readable at 80 columns.
    table = Table("", "number", "share", "finding, and advice", box=None, pad_edge=False)
    colours = {"error": "red", "warning": "yellow", "note": "dim"}
    for finding in examined.findings:
        table.add_row(f"[{colours[finding.severity]}]{finding.severity}", f"{finding.count:,}", f"{finding.share:.1%}",
                      f"[bold]{escape(finding.title)}[/]\n{escape(finding.advice)}")
    console.print(table)


@dataclass(frozen=True)
class Example:
    """One sample of a finding, read again.

    Attributes:
        source, index, key: spec of its source, its number and its name there.
        captions: usable ones.
        size: the image's upright (width, height) in pixels; picture: the image, small; None if it cannot be decoded.
        problem: why it cannot be used, in full; empty for a usable one.
    """

    source: str
    index: int
    key: str
    captions: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    picture: Image.Image | None = None
    problem: str = ""


def load_example(examined: Examination, place: Place) -> Example:
    """Read the sample at `place` again."""
    from aclip.data.captions import clean_captions
    from aclip.data.decode import decode_image

    measured = examined.measured[place[0]]
    source, row = measured.source, measured.samples[place[1]]
    index = int(row["index"])
    captions: tuple[str, ...] = ()
    image, problem = None, ""
    try:
        raw = source.read(index)
        try:
            captions = clean_captions(raw.captions)
        except BadSampleError as error:
            problem = error.reason
        image = decode_image(raw.image, min_side=_EXAMPLE_SIDE)
        image.thumbnail((_EXAMPLE_SIDE, _EXAMPLE_SIDE))
    except BadSampleError as error:
        problem = error.reason
    size = (int(row["width"]), int(row["height"])) if row["decoded"] else None
    return Example(source.spec, index, source.name(index), captions, size, image, problem)


def left_out(examined: Examination) -> dict[int, str]:
    """Return row -> reason of the samples that training should leave out.

    Those are samples that cannot be used, images of a single colour, images that an evaluation set has too, and
    duplicates, by file or by look, that bring no caption which the kept one does not have.
    """
    source, duplicates = examined.measured[0], examined.duplicates
    samples = source.samples
    reasons = {int(row): source.reasons[samples["reason"][row]] for row in np.flatnonzero(samples["reason"] != GOOD)}
    for row in np.flatnonzero(samples["blank"] & samples["decoded"]).tolist():
        reasons.setdefault(row, "an image of a single colour")
    for number, other in enumerate(examined.measured[1:], start=1):
        for row in leaked(duplicates, duplicates.by_look, number).tolist():
            reasons.setdefault(row, f"also in {other.source.spec}")
    own = duplicates.by_look[: len(samples)]
    kept: dict[int, int] = {}
    _, inverse, counts = np.unique(own, return_inverse=True, return_counts=True)
    for row in np.flatnonzero((own >= 0) & (counts[inverse] > 1)).tolist():
        if row not in reasons:
            first = kept.setdefault(int(own[row]), row)
            if first != row and captions_of(source, row) <= captions_of(source, first):
                reasons[row] = "a duplicate without a caption of its own"
    return reasons


def check_fix(path: Path, source: Source) -> None:
    """Raise ConfigError for a fix that cannot be written, before anything is read."""
    if path.suffix.lower() not in (*_LISTS, _NAMES):
        raise ConfigError(f"--fix {path}: give it the ending {_NAMES} (names to leave out), or {', '.join(_LISTS)} "
                          "(a list of the other samples)")
    if path.exists():
        raise ConfigError(f"--fix {path} exists already: name a new file")
    if path.suffix.lower() != _NAMES and not any(source.path(index) for index in range(min(len(source), 100))):
        names = path.with_suffix(_NAMES)
        raise ConfigError(f"the images of {source.spec} are not files of their own, which a list could name: --fix "
                          f"{names} writes the names to leave out, and `aclip data pack {source.spec} --leave-out "
                          f"{names} --output FOLDER` shards without them")


def write_fix(examined: Examination, path: Path) -> dict[str, int]:
    """Write the names of the samples to leave out, or a list of the others, see `doctor` and `check_fix`.

    A list has a row for each caption, with paths relative to the list where the image lies below its folder, and
    absolute ones elsewhere.

    Returns:
        Number of samples left out by reason, the most frequent first.
    """
    measured, reasons = examined.measured[0], left_out(examined)
    text, ending = io.StringIO(), path.suffix.lower()
    if ending == _NAMES:
        text.writelines(f"{measured.source.name(int(measured.samples['index'][row]))}\n" for row in sorted(reasons))
    elif ending == ".jsonl":
        text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in _kept(measured, reasons, path))
    else:
        table = csv.DictWriter(text, ("image", "caption", "tags", "label"), lineterminator="\n",
                               delimiter="\t" if ending == ".tsv" else ",")
        table.writeheader()
        table.writerows(_kept(measured, reasons, path))
    write_atomically(path, text.getvalue().encode("utf-8", errors="surrogateescape"))
    return dict(Counter(reasons.values()).most_common())


def _kept(measured: Measurements, reasons: dict[int, str], manifest: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of the samples that are left; a sample that is not a file of its own joins `reasons`."""
    from aclip.data.captions import clean_captions

    folder = manifest.parent.resolve()
    with progress("writing the list", len(measured.samples)) as advance:
        for row, index in enumerate(measured.samples["index"].tolist()):
            advance(1)
            path = None if row in reasons else measured.source.path(index)
            if path is None:
                reasons.setdefault(row, "not a file of its own")
                continue
            raw = measured.source.read(index)
            path = path.resolve()
            image = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else os.fspath(path)
            fields = {"tags": ";".join(raw.tags), "label": raw.label or ""}
            for caption in clean_captions(raw.captions):
                yield {"image": image, "caption": caption, **{name: text for name, text in fields.items() if text}}
