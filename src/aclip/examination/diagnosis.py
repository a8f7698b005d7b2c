"""`aclip data doctor`: what is wrong with a source, before a training run finds out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from aclip.data.progress import progress
from aclip.data.sources.base import Source
from aclip.errors import BadSampleError, ConfigError
from aclip.examination.findings import Finding, Limits, Place, captions_of, find_all, shared_rows
from aclip.examination.measure import Measurements, find_duplicates, measure
from aclip.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

    from aclip.data.captions import CaptionTokenizer

_EXAMPLE_SIDE = 160  # pixels
_LONGER = 4  # times the model's context that captions are counted to


@dataclass(frozen=True)
class Examination:
    """What was found in a source."""

    measured: tuple[Measurements, ...]  # of the source, then of those that it was compared with
    groups: tuple[np.ndarray, ...]  # of the images of each, see `find_duplicates`
    limits: Limits  # of the model that the data is for
    findings: tuple[Finding, ...]  # errors first

    @property
    def usable(self) -> int:
        """Number of samples that have an image and a caption."""
        samples = self.measured[0].samples
        return int((samples["decoded"] & (samples["captions"] > 0)).sum())

    def to_json(self) -> dict[str, Any]:
        """Return how many samples there are and are usable, and the findings without their examples."""
        return {"samples": len(self.measured[0].samples), "usable": self.usable,
                "findings": [replace(finding, examples=()) for finding in self.findings]}

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
        fix: new file for the names of what training should leave out, which `aclip data pack --leave-out` takes: bad
            samples, duplicates and shared images.
        workers: processes that read (default: one per core).
        limit: examine at most so many samples of each source, drawn at random.

    Returns:
        The measurements and findings.

    Raises:
        ConfigError: an option out of range, or a `fix` that exists already.
    """
    from rich.console import Console

    from aclip.data.sources import open_source, open_training
    from aclip.report.data_page import write_data_page

    for name, value, least in (("workers", workers, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} {value}: give {least} or more")
    if fix is not None and limit is not None:
        raise ConfigError("a fix needs the whole source: leave out the limit")
    if fix is not None and Path(fix).exists():
        raise ConfigError(f"--fix {fix} exists already: name a new file")
    limits, tokenizer = _needs(model)
    opened = open_training(source)
    others = [open_source(spec) for spec in against]
    examined = examine(opened, others, limits=limits, tokenizer=tokenizer, workers=workers, limit=limit)
    page = write_data_page(examined, Path(output))
    console = Console(highlight=False)
    print_findings(console, examined)
    say = partial(console.print, markup=False, soft_wrap=True)
    if fix is not None:
        left_out = write_fix(examined, Path(fix))
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "nothing"
        say(f"{fix}: {len(opened) - sum(left_out.values()):,} samples are kept, left out: {reasons}")
        say(f"next: aclip data pack '{opened.spec}' --leave-out {fix} --output FOLDER")
    say(f"done. page: {page}")
    return examined


def examine(source: Source, against: Sequence[Source] = (), *, limits: Limits,
            tokenizer: "CaptionTokenizer | None" = None, workers: int | None = None, limit: int | None = None
            ) -> Examination:
    """Read every sample once and report what was found; nothing is written. For the arguments see `doctor`.

    The tokenizer has a longer context than the model's, or captions that are cut would look whole; None counts no
    tokens.
    """
    from aclip.devices import usable_cores

    workers = usable_cores() if workers is None else workers
    total = sum(min(len(one), limit or len(one)) for one in (source, *against))
    with progress("examining", total) as advance:
        measured = tuple(measure(one, tokenizer=tokenizer if one is source else None, workers=workers, limit=limit,
                                 advance=advance) for one in (source, *against))
    groups = find_duplicates(measured)
    return Examination(measured, groups, limits, find_all(measured, groups, limits))


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
    from rich.markup import escape
    from rich.table import Table

    source = examined.measured[0]
    console.print(f"{source.source.spec}: {len(source.samples):,} of {len(source.source):,} samples examined, "
                  f"{examined.usable:,} usable, {len(source.captions):,} captions", markup=False, soft_wrap=True)
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
    """One sample of a finding, read again."""

    source: str  # spec
    index: int
    key: str
    captions: tuple[str, ...] = ()  # usable ones
    size: tuple[int, int] | None = None  # upright, in pixels; None: it cannot be decoded
    picture: Image.Image | None = None  # small
    problem: str = ""  # why it cannot be used, in full


def load_example(examined: Examination, place: Place) -> Example:
    from aclip.data.captions import clean_captions
    from aclip.data.decode import decode_image

    measured = examined.measured[place[0]]
    source, row = measured.source, measured.samples.iloc[place[1]]
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
    duplicates that bring no caption which the kept one does not have.
    """
    source, own = examined.measured[0], examined.groups[0]
    samples = source.samples
    reasons: dict[int, str] = samples["reason"][samples["reason"] != ""].to_dict()
    for row in np.flatnonzero(samples["blank"] & samples["decoded"]).tolist():
        reasons.setdefault(row, "an image of a single colour")
    for other, theirs in zip(examined.measured[1:], examined.groups[1:], strict=True):
        for row in shared_rows(own, theirs).tolist():
            reasons.setdefault(row, f"also in {other.source.spec}")
    kept: dict[int, int] = {}
    for row in np.flatnonzero(own >= 0).tolist():
        if row not in reasons:
            first = kept.setdefault(int(own[row]), row)
            if first != row and captions_of(source, row) <= captions_of(source, first):
                reasons[row] = "a duplicate without a caption of its own"
    return reasons


def write_fix(examined: Examination, path: Path) -> dict[str, int]:
    """Write the names of the samples to leave out; return their number by reason, the most frequent first."""
    measured, reasons = examined.measured[0], left_out(examined)
    names = (measured.source.name(int(measured.samples["index"][row])) for row in sorted(reasons))
    write_atomically(path, "".join(f"{name}\n" for name in names))
    return dict(Counter(reasons.values()).most_common())
