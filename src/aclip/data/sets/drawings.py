"""Vector drawings: icons in the Iconify JSON format, and their rendering."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from aclip.data.sources.base import RawSample
from aclip.errors import BadSampleError

PIXELS = 128
"""Width and height of a rendered icon."""

_DEFAULTS = {"left": 0.0, "top": 0.0, "width": 16.0, "height": 16.0}  # of the format


class Icon(NamedTuple):
    """The inside of an svg element and the rectangle it is drawn in."""

    body: str
    left: float
    top: float
    width: float
    height: float


def icon_of(pack: Mapping[str, Any], name: str) -> Icon:
    """Return one icon of a pack: `icons{name:{body, left, top, width, height}}`, and defaults for the last four."""
    icon = pack["icons"][name]
    return Icon(icon["body"], *(float(icon.get(key, pack.get(key, value))) for key, value in _DEFAULTS.items()))


def draw_icon(sample: RawSample, icon: Icon) -> RawSample:
    """Return a sample with a PNG of an icon in the smallest square around it, transparent where nothing is drawn.

    The same bytes on every call with the same version of the renderer.
    """
    side = max(icon.width, icon.height)
    left, top = icon.left - (side - icon.width) / 2, icon.top - (side - icon.height) / 2
    image = render(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side:g} {side:g}" width="{PIXELS}" height="{PIXELS}">{icon.body}</svg>',
        width=PIXELS, height=PIXELS)
    if image == _empty():
        raise BadSampleError("nothing is drawn")
    return replace(sample, image=image)


@cache
def _empty() -> bytes:
    return render('<svg xmlns="http://www.w3.org/2000/svg"/>', width=PIXELS, height=PIXELS)


def render(document: str, *, width: int | None = None, height: int | None = None) -> bytes:
    """Return a PNG of an svg document, RGBA with straight alpha; one side alone keeps the proportions."""
    from resvg_py import svg_to_bytes

    try:
        # System fonts are skipped: finding them is slow, and text would look different on each machine.
        return bytes(svg_to_bytes(svg_string=document, width=width, height=height, skip_system_fonts=True))
    except ValueError as error:
        raise BadSampleError(f"cannot be rendered: {error}") from None
