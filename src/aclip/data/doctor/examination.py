"""The examination of a source as a whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aclip.data.captions import CaptionTokenizer
from aclip.data.doctor.copies import Copies, find_copies
from aclip.data.doctor.findings import Finding, Limits, find_all
from aclip.data.doctor.measure import Measurements, measure
from aclip.data.sources.base import Source


@dataclass(frozen=True)
class Examination:
    """What is known of a source after it was examined.

    Attributes:
        measured: the source, then those that it was compared with.
        copies: of all of these.
        limits: of the model that the data is for.
        findings: errors first.
    """

    measured: tuple[Measurements, ...]
    copies: Copies
    limits: Limits
    findings: tuple[Finding, ...]


def examine(
    source: Source,
    against: Sequence[Source] = (),
    *,
    limits: Limits,
    tokenizer: CaptionTokenizer | None = None,
    workers: int = 0,
    limit: int | None = None,
    scratch: Path | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Examination:
    """Read every sample once and say what was found; nothing is written but a temporary file.

    Args:
        source: what is examined.
        against: evaluation sets, which should share no picture with it.
        limits: what the model takes that the data is for.
        tokenizer: with a context of more than the model's `context_length`, or captions that are cut look whole;
            None counts no tokens.
        workers: processes that read; 0 reads in this one.
        limit: samples of each source that are read at most, drawn at random.
        scratch: folder of the temporary file, 288 bytes a sample.
        progress: called with a number of samples when they are done, of all sources.
    """
    measured = tuple(
        measure(one, tokenizer=tokenizer if one is source else None, workers=workers, limit=limit, scratch=scratch,
                progress=progress)
        for one in (source, *against))
    copies = find_copies(measured)
    return Examination(measured, copies, limits, find_all(measured, copies, limits))
