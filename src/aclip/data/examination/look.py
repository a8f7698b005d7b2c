"""`aclip data look`: how a source is understood, in seconds."""

from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image

from aclip.data.examination.measure import is_dark
from aclip.data.sources.base import RawSample, Source
from aclip.errors import BadSampleError, ConfigError

_PROBED = 64  # samples that are read for advice
_DECODED_SIDE = 64
_WIDTH = 200  # characters of a caption that are printed


@dataclass(frozen=True)
class Look:
    """What `look` printed.

    Attributes:
        summary: how the source was read, in one line.
        count: number of samples.
        samples: some of them, evenly over the source.
        advice: what makes training on it slow or useless, each with what to do.
        page: the page with the images, if one was asked for.
    """

    summary: str
    count: int
    samples: tuple[RawSample, ...]
    advice: tuple[str, ...]
    page: Path | None = None


def look(source: str, *, output: str | None = None, samples: int = 5) -> Look:
    """Print how a source is understood: kind, number of samples, some captions, and advice.

    Args:
        source: pairs of any kind that training takes.
        output: file for a page with the images (default: none is written).
        samples: number of samples shown, evenly over the source.

    Returns:
        What was printed.

    Raises:
        ConfigError: fewer than one sample asked for.
    """
    from rich.console import Console

    from aclip.data.sources import open_training

    if samples < 1:
        raise ConfigError(f"samples {samples}: give 1 or more")
    opened = open_training(source)
    probed, problems = _probe(opened, max(samples, _PROBED))
    shown = tuple(probed[i] for i in _evenly(len(probed), samples))
    advice = (*opened.advice(), *problems, *_problems(probed))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(str(opened.summary))
    for sample in shown:
        label = f" [{sample.label}]" if sample.label else ""
        console.print(f"  {sample.name}{label}, {_size(sample)}")
        for caption in sample.captions:
            console.print(f"    {caption if len(caption) <= _WIDTH else caption[:_WIDTH] + '...'}")
    for sentence in advice:
        console.print(f"advice: {sentence}")
    page = _write_page(Path(output), opened, shown, advice) if output is not None else None
    if page is not None:
        console.print(f"page: {page}")
    return Look(str(opened.summary), len(opened), shown, advice, page)


def advise(source: Source) -> list[str]:
    """Return what makes training on a source slow or useless, as far as a few of its samples tell, with what to do.

    Quick enough to be called before every training run; of a source that is read in groups, only the first is read.
    """
    samples, problems = _probe(source, _PROBED)
    return [*source.advice(), *problems, *_problems(samples)]


def _probe(source: Source, count: int) -> tuple[list[RawSample], list[str]]:
    """Read `count` samples; return those that training can use, and a sentence about the others."""
    from aclip.data.captions import clean_captions
    from aclip.data.decode import decode_image

    good: list[RawSample] = []
    bad: list[str] = []
    indices = _indices(source, count)
    for index in indices:
        try:
            sample = source.read(index)
            decode_image(sample.image, min_side=_DECODED_SIDE)
            good.append(replace(sample, captions=clean_captions(sample.captions)))
        except BadSampleError as error:
            bad.append(f"{source.name(index)}: {error.reason}")
    if not bad:
        return good, []
    return good, [f"{len(bad)} of {len(indices)} samples looked at cannot be used, e.g. {bad[0]}: "
                  f"`aclip data doctor` lists all of them"]


def _indices(source: Source, count: int) -> list[int]:
    """Return some samples, evenly over each part of a source, or over its first group."""
    if source.parts and sum(map(len, source.parts)) == len(source):
        each = max(2, count // len(source.parts))
        starts = accumulate(map(len, source.parts), initial=0)
        return [start + index for start, part in zip(starts, source.parts, strict=False)
                for index in _indices(part, each)]
    return _evenly(source.groups[0] if source.groups else len(source), count)


def _evenly(count: int, wanted: int) -> list[int]:
    return sorted(set(np.linspace(0, count - 1, min(count, wanted)).round().astype(int).tolist())) if count else []


def _problems(samples: list[RawSample]) -> list[str]:
    """Return what is wrong with usable samples taken together."""
    found = []
    captions = {caption.casefold() for sample in samples for caption in sample.captions}
    if len(samples) > 1 and len(captions) == 1:
        found.append(f"all {len(samples)} samples looked at have the same caption, '{captions.pop()[:80]}', from which "
                     "nothing can be learned: take captions that differ")
    dark = sum(is_dark(sample.image) for sample in samples)
    if dark:
        found.append(f"{dark} of {len(samples)} images looked at have more than 8 bits and come out nearly black, as "
                     "their values use a small part of the range: put '?stretch=4095' behind the source for 12 "
                     "bits, or '?stretch=1' to stretch each image on its own")
    return found


def _size(sample: RawSample) -> str:
    from aclip.data.decode import decode_image

    return "{} x {}".format(*decode_image(sample.image).size)


def _write_page(path: Path, source: Source, samples: tuple[RawSample, ...], advice: tuple[str, ...]) -> Path:
    from aclip.data.decode import decode_image
    from aclip.report.data_page import write_look_page

    summary = source.summary
    facts = [("samples", f"{len(source):,}"), ("images found", f"{summary.found:,}"),
             *((f"left out: {reason}", f"{count:,}") for reason, count in summary.left_out.items() if count),
             *(("read as", note) for note in summary.notes)]
    images: list[tuple[Image.Image, str, tuple[str, ...]]] = [
        (decode_image(sample.image), sample.name, sample.captions) for sample in samples]
    return write_look_page(path, source.spec, facts, images, list(advice))
