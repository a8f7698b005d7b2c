"""Labelled images in one: where they lie, and what their titles become."""

import numpy as np
import pytest
from PIL import Image

from aclip.report.sheet import GAP, LINE, Panel, draw_sheet, font_for, with_scale, wrap
from aclip.report.snapshots import heat_colours


def test_panels_fill_rows_in_order() -> None:
    colours = ["red", "lime", "blue"]
    sheet = draw_sheet([Panel(Image.new("RGB", (40, 20), colour), "a title", "small print") for colour in colours],
                       columns=2, side=80)
    assert sheet.width == GAP + 2 * (80 + GAP)
    assert sheet.height == 2 * (40 + 2 * LINE + GAP) + GAP
    for i, colour in enumerate(colours):
        left, top = GAP + i % 2 * (80 + GAP), GAP + i // 2 * (40 + 2 * LINE + GAP)
        panel = np.asarray(sheet)[top:top + 40, left:left + 80]
        assert (panel == np.asarray(Image.new("RGB", (1, 1), colour))).all()
    assert np.asarray(sheet.crop((GAP, GAP + 40, GAP + 80, GAP + 40 + LINE))).min() < 100  # words


@pytest.mark.parametrize("text", ["a cat", "a red bus on a long street, " * 9, "unbroken" * 40, "", "два слова " * 20])
def test_titles_fit(text: str) -> None:
    lines = wrap(text, 336)
    assert len(lines) <= 2
    assert all(font_for(text).getlength(line) < 345 for line in lines)
    assert " ".join(lines) == text.strip() if len(text) < 20 else lines[-1].endswith("…")


def test_the_legend_shows_every_colour_between_its_ends() -> None:
    sheet = draw_sheet([Panel(Image.new("RGB", (9, 9)), "x")] * 2)
    row = {tuple(pixel) for pixel in np.asarray(with_scale(sheet, "0", "0.5", "similarity"))[sheet.height + 6]}
    assert {tuple(colour) for colour in heat_colours(np.linspace(0, 1, 240))} <= row
