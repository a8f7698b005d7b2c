"""What all pages share: the jinja2 environment, numbers as people read them, and images inside the page."""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from aclip.files import write_atomically
from aclip.report.journals import mapping, number

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL import Image

MISSING = "–"  # noqa: RUF001 - an en dash, shown where there is no number

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def render(template: str, **context: Any) -> Markup:
    """Render a template of this package; every string that is not `Markup` is escaped."""
    return Markup(_environment().get_template(f"{template}.html.j2").render(context))


def write_page(
    path: Path, template: str, *, name: str, sections: Sequence[tuple[str, str]], folder: str, **context: Any
) -> Path:
    """Write one self-contained HTML file; its content policy forbids requests and scripts other than its own.

    The template extends `page.html.j2` and defines a block `header` and a block for each section (name, title).
    `name` is the page's title, `folder` where its numbers come from.
    """
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = render(template, page={"name": name, "sections": sections, "folder": folder, "style": _asset("style.css"),
                                  "script": script, "script_hash": f"sha256-{digest}"}, **context)
    write_atomically(path, page)
    return path


def data_uri(image: "Image.Image", kind: Literal["PNG", "JPEG"] = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"optimize": True} if kind == "PNG" else {"quality": 85}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def percent(fraction: float | None, digits: int | None = None) -> str:
    """Return a fraction as a percentage, with enough digits not to read 0."""
    if fraction is None or math.isnan(fraction):
        return MISSING
    value = 100.0 * fraction
    if digits is None:
        digits = 0 if value in (0.0, 100.0) else 1 if abs(value) >= 1.0 else 2 if abs(value) >= 0.01 else 4
    return f"{value:.{digits}f} %"


def count(value: float | None) -> str:
    return MISSING if value is None else f"{round(value):,}"


def compact(value: float | None, digits: int = 3) -> str:
    """Return a number in `digits` significant digits: k, M, G from ten thousand, powers of ten below 0.01."""
    if value is None:
        return MISSING
    size = abs(value)
    if size >= 1e4:
        power, suffix = (9, "G") if size >= 999.5e6 else (6, "M") if size >= 999.5e3 else (3, "k")
        return f"{_significant(value / 10**power, digits)}{suffix}"
    if 0 < size < 1e-2:
        power = math.floor(math.log10(size) + 1e-12)
        mantissa = _significant(value / 10.0**power, digits)
        return f"{mantissa}×10{str(power).translate(_SUPERSCRIPT)}"  # noqa: RUF001 - a multiplication sign
    return _significant(value, digits)


def duration(seconds: float | None) -> str:
    """Return a time span in its two leading units."""
    if seconds is None:
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def milliseconds(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{compact(1e3 * seconds)} ms"


def gigabytes(value: float | None) -> str:
    return MISSING if value is None else f"{value / 1e9:.2f} GB"


def _significant(value: float, digits: int) -> str:
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)) + 1e-12)) if value else 0
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("aclip.report"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    filters = (percent, count, compact, duration, ratio, milliseconds, gigabytes, data_uri, number, mapping)
    environment.filters |= {function.__name__: function for function in filters}
    environment.globals["missing_value"] = MISSING
    return environment


def _asset(name: str) -> Markup:
    return Markup(resources.files("aclip.report").joinpath("templates", name).read_text(encoding="utf-8"))
