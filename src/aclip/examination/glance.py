"""`aclip data look`: how a source is understood, in seconds."""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from aclip.data.sources.base import RawSample, Source, printable
from aclip.errors import BadSampleError, ConfigError

if TYPE_CHECKING:
    from PIL import Image

_WIDTH = 200  # characters of a caption that are printed


@dataclass(frozen=True)
class Look:
    """What `look` printed: how the source was read, some samples, advice, and the page if one was asked for."""

    summary: str
    samples: tuple[RawSample, ...]
    advice: tuple[str, ...]
    page: Path | None = None


def look(source: str, *, output: str | None = None, samples: int = 5) -> Look:
    """Print how a source is understood: what was found and left out, some samples, and advice.

    Args:
        source: pairs of any kind that training takes.
        output: file for a page with the images (default: none is written).
        samples: number of samples shown, evenly over the source; of remote shards, from the first.

    Returns:
        What was printed.

    Raises:
        ConfigError: fewer than one sample asked for.
    """
    from rich.console import Console

    from aclip.data.decode import decode_image
    from aclip.data.sources import open_training
    from aclip.logs import warnings_only

    if samples < 1:
        raise ConfigError(f"samples {samples}: give 1 or more")
    with warnings_only():  # the summary is printed below
        opened = open_training(source)
    summary, advice = opened.summary, opened.advice()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(str(summary))
    shown: list[tuple[Image.Image, RawSample]] = []
    for index in _evenly(opened, samples):
        try:
            sample = opened.read(index)
            image = decode_image(sample.image)
        except BadSampleError as error:
            console.print(f"  {opened.name(index)}: cannot be used, {error.reason}")
            continue
        shown.append((image, sample))
        label = "" if sample.label is None else f", label {one_line(sample.label)}"
        console.print(f"  {sample.name}: {image.width} x {image.height}{label}")
        for caption in sample.captions or ("(no caption)",):
            console.print(f"    {one_line(caption)}")
    for sentence in advice:
        console.print(f"advice: {sentence}")
    page = None
    if output is not None:
        from aclip.report.data_page import write_look_page

        facts = [("samples", f"{len(opened):,}"),
                 *((f"left out: {reason}", f"{count:,}") for reason, count in summary.left_out.items() if count),
                 *(("how it is read", note) for note in summary.notes)]
        page = write_look_page(Path(output), opened.spec, facts,
                               [(image, sample.name, sample.captions) for image, sample in shown], advice)
        console.print(f"page: {page}")
    return Look(str(summary), tuple(sample for _, sample in shown), tuple(advice), page)


def _evenly(source: Source, wanted: int) -> list[int]:
    """Return some samples, evenly over each part of a source, or over its first group."""
    if source.parts and sum(map(len, source.parts)) == len(source):
        each = -(-wanted // len(source.parts))
        starts = accumulate(map(len, source.parts), initial=0)
        return [start + index for start, part in zip(starts, source.parts, strict=False)
                for index in _evenly(part, each)]
    count = source.groups[0] if source.groups else len(source)
    wanted = min(count, wanted)
    return [round(number * (count - 1) / max(1, wanted - 1)) for number in range(wanted)]


def one_line(text: str) -> str:
    """Return a text on one line of at most `_WIDTH` characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= _WIDTH else f"{line[:_WIDTH]}..."
