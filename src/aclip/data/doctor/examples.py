"""The samples that findings show."""

from dataclasses import dataclass

from PIL import Image

from aclip.data.captions import clean_captions
from aclip.data.decode import decode_image
from aclip.data.doctor.examination import Examination
from aclip.data.doctor.findings import Place
from aclip.errors import BadSampleError


@dataclass(frozen=True)
class Example:
    """One sample as it is shown.

    Attributes:
        source: name of its source.
        index: its number there.
        key: its name there.
        captions: usable ones.
        size: the picture's upright (width, height) in pixels, or None where there is none.
        picture: small, or None where it cannot be decoded.
        problem: why it cannot be used, in full, or nothing.
    """

    source: str
    index: int
    key: str
    captions: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    picture: Image.Image | None = None
    problem: str = ""


def load_example(examined: Examination, place: Place, *, side: int = 160) -> Example:
    """Read the sample at `place` again; its picture gets no longer than `side` pixels."""
    measured = examined.measured[place[0]]
    source, row = measured.source, measured.samples[place[1]]
    index = int(row["index"])
    captions: tuple[str, ...] = ()
    picture, problem = None, ""
    try:
        raw = source.read(index)
        try:
            captions = clean_captions(raw.captions)
        except BadSampleError as error:
            problem = error.reason
        picture = decode_image(raw.image, min_side=side)
        picture.thumbnail((side, side))
    except BadSampleError as error:
        problem = error.reason
    size = (int(row["width"]), int(row["height"])) if row["decoded"] else None
    return Example(source.name, index, source.key(index), captions, size, picture, problem)
