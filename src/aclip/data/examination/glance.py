"""`aclip data look`: how a source is understood, in seconds."""

from dataclasses import dataclass
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
    advice = (*opened.advice(), *problems)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(str(opened.summary))
    for sample in shown:
        label = f" [{sample.label}]" if sample.label else ""
        console.print(f"  {sample.name}{label}, {_size(sample)}")
        for caption in map(_one_line, sample.captions or ("(no caption)",)):
            console.print(f"    {caption if len(caption) <= _WIDTH else caption[:_WIDTH] + '...'}")
    for sentence in advice:
        console.print(f"advice: {sentence}")
    page = _write_page(Path(output), opened, shown, advice) if output is not None else None
    if page is not None:
        console.print(f"page: {page}")
    return Look(str(opened.summary), len(opened), shown, advice, page)


def advise(source: Source) -> list[str]:
    """Return `source.advice()` and what is wrong with the images, as far as a few of them tell, with what to do.

    Quick enough to be called before every training run; of a source that is read in groups, only the first is read.
    """
    return [*source.advice(), *_probe(source, _PROBED)[1]]


def _probe(source: Source, count: int) -> tuple[list[RawSample], list[str]]:
    """Read `count` samples; return those whose image can be decoded, and what is wrong with the images."""
    from aclip.data.decode import decode_image

    good: list[RawSample] = []
    bad: list[str] = []
    dark = 0
    indices = _indices(source, count)
    for index in indices:
        try:
            sample = source.read(index)
            dark += is_dark(sample.image, decode_image(sample.image, min_side=_DECODED_SIDE))
            good.append(sample)
        except BadSampleError as error:
            bad.append(f"{source.name(index)}: {error.reason}")
    sentences = []
    if bad:
        sentences.append(f"{len(bad)} of {len(indices)} samples looked at cannot be read, e.g. {bad[0]}: "
                         "`aclip data doctor` lists all of them")
    if dark:
        sentences.append(f"{dark} of {len(good)} images looked at have more than 8 bits and come out nearly black, as "
                         "their values use a small part of the range: put '?stretch=4095' behind the source for 12 "
                         "bits, or '?stretch=1' to stretch each image on its own")
    return good, sentences


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


def _one_line(text: str) -> str:
    return " ".join(text.encode(errors="backslashreplace").decode().split())


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
