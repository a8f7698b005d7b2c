"""Untrusted SVG to PNG.

The renderer (resvg) runs no scripts and opens no addresses, but it does open local files that an `image`
or a `feImage` names, and nested `use` elements can make a small text arbitrarily expensive. So a drawing
is checked first: only shapes, paints, groups, clips, masks and filters, references only to the drawing
itself, and a bound on its size before and after references are followed.
"""

import logging
import multiprocessing
import os
import re
import signal
import struct
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from aclip.data.fetch.iconify import Icon
from aclip.errors import BadSampleError, DataError, MissingDependencyError

_log = logging.getLogger(__name__)

MAX_BYTES = 2 * 2**20
"""UTF-8 bytes that the body of one drawing may have."""

MAX_SIDE = 1e6
"""Units that an icon's rectangle may be wide, high, or away from the origin."""

MAX_ELEMENTS = 50_000
"""Elements that one drawing may have once every `use` is replaced by what it shows."""

MAX_DEPTH = 64
"""Levels that elements and references may be nested."""

CHUNK = 32
"""Drawings that a worker process takes at a time: about a second of work at most, so that an interruption
is quick."""

# No `image`, `feImage`, `foreignObject`, `style`, `script` or `a`; no `text`, which would look different on
# each machine; no `pattern` and no markers, which multiply what they hold.
# fmt: off
ELEMENTS = frozenset((
    "svg", "g", "defs", "symbol", "use", "path", "rect", "circle", "ellipse", "line", "polyline", "polygon",
    "title", "desc", "linearGradient", "radialGradient", "stop", "clipPath", "mask", "filter", "feBlend",
    "feColorMatrix", "feComposite", "feFlood", "feGaussianBlur", "feMerge", "feMergeNode", "feOffset",
    "animate", "animateMotion", "animateTransform", "set",  # never run: what is drawn is the still picture
))
# fmt: on
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
_OUTSIDE = re.compile(r"url\(\s*['\"]?\s*(?!#|['\"\s])", re.IGNORECASE)


class Drawing(NamedTuple):
    """What a worker process needs to draw one icon."""

    body: str
    left: float
    top: float
    side: float


def drawing(icon: Icon) -> Drawing:
    """Return an icon in the smallest square around its rectangle, centred on it.

    Raises:
        BadSampleError: the rectangle is empty or absurd.
    """
    side = max(icon.width, icon.height)
    # Written so that a NaN fails too.
    offsets_hold = all(abs(offset) <= MAX_SIDE for offset in (icon.left, icon.top))
    if not (offsets_hold and all(0 < length <= MAX_SIDE for length in (icon.width, icon.height))):
        raise BadSampleError(f"drawn in a rectangle of {icon.width} x {icon.height}")
    return Drawing(icon.body, icon.left - (side - icon.width) / 2, icon.top - (side - icon.height) / 2, side)


def require_renderer() -> None:
    """Make sure that drawings can be rendered.

    Raises:
        MissingDependencyError: resvg-py is not installed.
    """
    try:
        import resvg_py  # noqa: F401  (optional: the extra `demo`)
    except ImportError:
        raise MissingDependencyError(
            "rendering needs resvg-py, which is not installed: pip install 'attentive-clip[demo]'"
        ) from None


def render(drawing: Drawing, pixels: int) -> bytes:
    """Draw one picture.

    Args:
        drawing: its body is checked by `check`.
        pixels: width and height of the picture.

    Returns:
        A PNG, RGBA with straight alpha, 8 bits a channel; transparent where nothing is drawn. The same
        bytes on every call with the same version of the renderer.

    Raises:
        BadSampleError: the drawing is refused, cannot be drawn, or leaves the picture empty (as an animation may
            that begins with nothing).
        MissingDependencyError: resvg-py is not installed.
    """
    require_renderer()
    document = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{drawing.left:g} {drawing.top:g} {drawing.side:g} {drawing.side:g}" '
        f'width="{pixels}" height="{pixels}">{drawing.body}</svg>'
    )
    check(document)
    picture = _draw(document, width=pixels, height=pixels)
    if _size(picture) != (pixels, pixels):
        raise BadSampleError("drawn in a size that was not asked for")
    if picture == _empty(pixels):
        raise BadSampleError("nothing is drawn")
    return picture


@cache
def _empty(pixels: int) -> bytes:
    """Return the picture without a visible pixel: the renderer writes equal pixels as equal bytes."""
    return _draw('<svg xmlns="http://www.w3.org/2000/svg"/>', width=pixels, height=pixels)


def render_document(document: bytes, pixels: int, elements: AbstractSet[str]) -> bytes:
    """Draw a whole svg file, as drawing programs write it, in its own proportions.

    What the renderer may not see is taken out first: metadata, the elements and attributes of drawing programs,
    and elements that are not allowed, with all that is in them.

    Args:
        document: the file. Its document type is dropped once it is parsed.
        pixels: length of the longer side of the picture.
        elements: those that are allowed.

    Returns:
        A PNG as `render` returns it.

    Raises:
        BadSampleError: no svg, a size that is not stated, too expensive, or it cannot be drawn.
        MissingDependencyError: resvg-py is not installed.
    """
    require_renderer()
    try:
        root = ET.fromstring(document)
    except (ET.ParseError, ValueError) as error:
        raise BadSampleError(f"not well-formed SVG: {error}") from None
    _reduce(root, elements)
    reduced = ET.tostring(root, encoding="unicode")
    check(reduced, elements)
    picture = _draw(reduced, width=pixels)
    return _draw(reduced, height=pixels) if _size(picture)[1] > pixels else picture


def _reduce(element: ET.Element, elements: AbstractSet[str]) -> None:
    """Take out of an element what the renderer may not see."""
    for name in [name for name in element.attrib if name.startswith("{") and not name.startswith(_XLINK)]:
        del element.attrib[name]
    for child in list(element):
        if isinstance(child.tag, str) and child.tag.startswith(_SVG) and child.tag.removeprefix(_SVG) in elements:
            _reduce(child, elements)
        else:
            element.remove(child)


def _draw(document: str, *, width: int | None = None, height: int | None = None) -> bytes:
    """Draw a document that was checked; one side alone keeps its proportions."""
    from resvg_py import svg_to_bytes

    try:
        # System fonts are skipped: finding them is slow, and no text is drawn.
        return bytes(svg_to_bytes(svg_string=document, width=width, height=height, skip_system_fonts=True))
    except ValueError as error:
        raise BadSampleError(f"cannot be drawn: {error}") from None


def _size(png: bytes) -> tuple[int, int]:
    """Return width and height, which stand first in the first chunk of a PNG."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def check(document: str, elements: AbstractSet[str] = ELEMENTS) -> None:
    """Refuse a document that reaches outside itself or is too expensive.

    Args:
        document: a whole svg document. A document type cannot stand inside of an element, so a body
            wrapped in an svg element declares no entities.
        elements: those that are allowed.

    Raises:
        BadSampleError: says what is refused.
    """
    if len(document.encode(errors="replace")) > MAX_BYTES:
        raise BadSampleError(f"more than {MAX_BYTES} bytes of SVG")
    try:
        root = ET.fromstring(document)
    except (ET.ParseError, ValueError) as error:
        raise BadSampleError(f"not well-formed SVG: {error}") from None
    targets: dict[str, list[ET.Element]] = {}
    for element in root.iter():
        tag = element.tag.removeprefix(_SVG) if isinstance(element.tag, str) else ""
        if tag not in elements:
            raise BadSampleError(f"element <{tag}> is not allowed")
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] in ("href", "src") and not value.strip().startswith("#"):
                raise BadSampleError(f"refers to {value[:80]!r}, outside of the drawing")
            if _OUTSIDE.search(value) or "\\" in value:
                raise BadSampleError(f"{name} refers to {value[:80]!r}, outside of the drawing")
        if "id" in element.attrib:
            targets.setdefault(element.attrib["id"], []).append(element)
    if _weight(root, targets, {}, 0) > MAX_ELEMENTS:
        raise BadSampleError(f"more than {MAX_ELEMENTS} elements")


def _weight(
    element: ET.Element, targets: dict[str, list[ET.Element]], known: dict[int, int], depth: int
) -> int:
    """Return the number of elements once every `use` is replaced by what it shows."""
    if depth > MAX_DEPTH:  # also reached by a reference to itself
        raise BadSampleError(f"nested more than {MAX_DEPTH} levels deep")
    if id(element) in known:
        return known[id(element)]
    weight = 1 + sum(_weight(child, targets, known, depth + 1) for child in element)
    if element.tag == f"{_SVG}use":
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] == "href":
                # Where an id is not unique it is open which element is shown: the heaviest counts.
                shown = targets.get(value.strip()[1:], [])
                weight += max((_weight(target, targets, known, depth + 1) for target in shown), default=0)
    known[id(element)] = weight
    return weight


def render_chunk(drawings: Sequence[Drawing], pixels: int) -> list[bytes | str]:
    """Draw several pictures; in the place of one that cannot be drawn stands the reason.

    Runs in a worker process: errors are returned, since one bad drawing must not cost its neighbours.
    """
    pictures: list[bytes | str] = []
    for one in drawings:
        try:
            pictures.append(render(one, pixels))
        except BadSampleError as error:
            pictures.append(error.reason)
    return pictures


class Renderer:
    """Draws many pictures, in worker processes if there is more than one (resvg holds the GIL)."""

    def __init__(self, pixels: int, pool: ProcessPoolExecutor | None) -> None:
        self._pixels = pixels
        self._pool = pool

    def __call__(self, drawings: Sequence[Drawing]) -> Iterator[bytes | str]:
        """Yield the PNG of each drawing in order, or the reason why there is none.

        Raises:
            DataError: a worker process was killed from outside.
        """
        chunks = [drawings[start : start + CHUNK] for start in range(0, len(drawings), CHUNK)]
        if self._pool is None:
            for chunk in chunks:
                yield from render_chunk(chunk, self._pixels)
            return
        try:
            for pictures in self._pool.map(render_chunk, chunks, [self._pixels] * len(chunks)):
                yield from pictures
        except BrokenProcessPool:
            raise DataError(
                "a rendering process was killed (memory?): run the same command again, it goes on from here"
            ) from None


@contextmanager
def open_renderer(pixels: int, workers: int) -> Iterator[Renderer]:
    """Open a renderer, and stop its processes at the end, whatever the end is.

    Args:
        pixels: width and height of each picture.
        workers: processes; 1 draws in this process.

    Raises:
        MissingDependencyError: resvg-py is not installed.
    """
    require_renderer()
    if workers <= 1:
        yield Renderer(pixels, None)
        return
    # Spawned, not forked: the caller may run threads (a progress display), which a fork would break.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield Renderer(pixels, pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group: the parent alone handles it, by cancelling what is queued.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        # A killed parent cannot say goodbye, and a worker that waits for work would wait for ever.
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
