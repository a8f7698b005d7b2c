"""Numbers as people read them."""

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MISSING = "–"  # noqa: RUF001 - an en dash
"""Stands where there is no number."""


def percent(share: float | None, digits: int | None = None) -> str:
    """Return a share in [0, 1] as a percentage, with as many digits as it takes not to read 0.

    >>> percent(0.4213), percent(0.000576), percent(1.0)
    ('42.1 %', '0.06 %', '100 %')
    """
    if share is None:
        return MISSING
    value = 100.0 * share
    if digits is None:
        digits = 0 if value in (0.0, 100.0) else 1 if abs(value) >= 1.0 else 2 if abs(value) >= 0.01 else 4
    return f"{value:.{digits}f} %"


def count(value: float | None) -> str:
    """Return a whole number with thousands separated.

    >>> count(12720)
    '12,720'
    """
    return MISSING if value is None else f"{round(value):,}"


def compact(value: float | None, digits: int = 3) -> str:
    """Return a number in `digits` significant digits: k, M, G from ten thousand, powers of ten below 0.01.

    >>> compact(5.53718), compact(153600), compact(0.0005), compact(0.0)
    ('5.54', '154k', '5×10⁻⁴', '0')
    """
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
    """Return a time span in its two leading units.

    >>> duration(45.2), duration(725), duration(3 * 3600 + 59)
    ('45 s', '12 min 05 s', '3 h 00 min')
    """
    if seconds is None:
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _significant(value: float, digits: int) -> str:
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)) + 1e-12)) if value else 0
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
