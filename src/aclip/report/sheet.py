"""Labelled images side by side in one image, and a legend of colours."""

import textwrap
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aclip.report.snapshots import heat_colours

GAP, LINE, SIZE = 16, 24, 17  # pixels: between panels, from line to line, of the letters
TITLE_LINES = 2
INK, PALE, PAPER = (24, 26, 32), (104, 109, 120), (255, 255, 255)

# on most systems, one of them has Latin, Greek and Cyrillic letters, and the others those of more scripts
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "Arial.ttf", "NotoSansCJK-Regular.ttc",
          "wqy-microhei.ttc", "msyh.ttc", "NotoSansArabic-Regular.ttf", "NotoSansDevanagari-Regular.ttf")


class Panel(NamedTuple):
    """An image, a title, which is shortened if it is long, and a line of small print."""

    image: Image.Image
    title: str
    note: str = ""


def draw_sheet(panels: Sequence[Panel], columns: int = 4, side: int = 336) -> Image.Image:
    """Return panels in rows of `columns`, their words below them, RGB; each image is scaled to `side` pixels across."""
    columns = min(columns, len(panels))
    images = [panel.image.resize((side, max(1, round(side * panel.image.height / panel.image.width))),
                                 Image.Resampling.LANCZOS) for panel in panels]
    words = [[*((line, INK) for line in wrap(panel.title, side)), (panel.note, PALE)] for panel in panels]
    rows = [range(start, min(start + columns, len(panels))) for start in range(0, len(panels), columns)]
    heights = [max(images[i].height + LINE * len(words[i]) for i in row) + GAP for row in rows]
    sheet = Image.new("RGB", (GAP + columns * (side + GAP), GAP + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, top in zip(rows, np.cumsum([GAP, *heights]).tolist(), strict=False):
        for column, i in enumerate(row):
            left = GAP + column * (side + GAP)
            sheet.paste(images[i], (left, top))
            for number, (line, colour) in enumerate(words[i]):
                draw.text((left, top + images[i].height + LINE * number + 4), line, colour, font_for(line))
    return sheet


def with_scale(sheet: Image.Image, low: str, high: str, words: str) -> Image.Image:
    """Return a sheet with a legend below it: the colours of `heat_layer` between two words, and what they mean."""
    bar = Image.fromarray(heat_colours(np.linspace(0, 1, 240))[None]).resize((240, LINE - 6))
    whole = Image.new("RGB", (sheet.width, sheet.height + LINE + GAP), PAPER)
    whole.paste(sheet)
    draw, x = ImageDraw.Draw(whole), float(GAP)
    for part in (low, bar, high, words):
        if isinstance(part, str):
            draw.text((x, sheet.height), part, PALE, font_for(part))
            x += font_for(part).getlength(part) + 10
        else:
            whole.paste(part, (round(x), sheet.height + 1))
            x += part.width + 10
    return whole


def wrap(text: str, width: float) -> list[str]:
    """Return a text in at most `TITLE_LINES` lines of about `width` pixels; an ellipsis stands for what is left."""
    letters = font_for(text).getlength(text) / max(1, len(text))
    return textwrap.wrap(text, max(2, int(0.93 * width / max(1.0, letters))), max_lines=TITLE_LINES, placeholder=" …")


def font_for(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font of this system that can draw most letters of a text."""
    return min(_fonts(), key=lambda font: sum(_lacks(font, letter) for letter in set(text)))


@cache
def _fonts() -> list[ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    found: list[ImageFont.FreeTypeFont | ImageFont.ImageFont] = []
    for name in _FONTS:
        try:
            found.append(ImageFont.truetype(name, SIZE))
        except OSError:
            continue
    return [*found, ImageFont.load_default(SIZE)]


@cache
def _lacks(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, letter: str) -> bool:
    return not letter.isspace() and bytes(font.getmask(letter)) == bytes(font.getmask("\U0010ffff"))
