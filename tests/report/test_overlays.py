import re
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image

from aclip.report import heat_map, kept_patches
from aclip.report.overlays import HEAT_OPACITY, heat_colours, heat_layer, to_image, veil_layer


def test_heat_grows_lighter_with_the_score():
    colours = heat_colours(np.linspace(-0.1, 1.1, 40)).astype(float)
    light = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) >= 0).all()
    assert light[-1] - light[0] > 200


def test_heat_layer_has_a_pixel_a_patch_row_by_row():
    scores = torch.zeros(6)
    scores[4] = 1.0  # second row, second column
    layer = np.asarray(heat_layer(scores, (2, 3))).astype(int).sum(-1)
    assert layer.shape == (2, 3)
    assert np.unravel_index(layer.argmax(), layer.shape) == (1, 1)


def test_an_outlier_does_not_blacken_the_rest():
    scores = torch.linspace(0, 1, 196)
    scores[0] = 1000.0
    assert (np.asarray(heat_layer(scores, (14, 14))).astype(int).sum(-1) > 300).mean() > 0.3


@pytest.mark.parametrize("scores", [torch.full((4,), 0.25), torch.full((4,), float("nan"))])
def test_flat_scores_are_dark(scores):
    assert np.asarray(heat_layer(scores, (2, 2))).max() <= 4


def test_kept_patches_are_untouched_and_removed_ones_are_not():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (32, 48, 3), dtype=np.uint8))
    shown = np.asarray(kept_patches(image, torch.tensor([0, 4]), (2, 3)))
    kept = np.zeros((32, 48), dtype=bool)
    kept[:16, :16] = kept[16:, 16:32] = True
    assert (shown[kept] == np.asarray(image)[kept]).all()
    removed = shown[~kept].astype(int)
    assert removed.std() < 15  # under a veil
    assert set(np.asarray(veil_layer(torch.tensor([0, 4]), (2, 3)))[..., 3].ravel()) == {0, 219}


def test_heat_map_has_the_size_and_shows_the_place():
    image = Image.new("RGB", (60, 40), "grey")
    scores = torch.zeros(6)
    scores[2] = 1.0  # first row, last column
    shown = np.asarray(heat_map(image, scores, (2, 3))).astype(int).sum(-1)
    assert shown.shape == (40, 60)
    y, x = np.unravel_index(shown.argmax(), shown.shape)
    assert y < 20
    assert x >= 40


def test_to_image_keeps_every_pixel():
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert (np.asarray(to_image(pixels)).transpose(2, 0, 1) == pixels.numpy()).all()


def test_the_style_sheet_shows_the_same_colours():
    style = resources.files("aclip.report").joinpath("style.css").read_text(encoding="utf-8")
    gradient = re.search(r"\.scale \{[^}]*linear-gradient\(90deg, ([^)]*)\)", style).group(1).split(", ")
    anchors = heat_colours(np.linspace(0, 1, len(gradient)))
    assert gradient == [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in anchors]
    assert float(re.search(r"\.heat img \{ opacity: ([\d.]+)", style).group(1)) == HEAT_OPACITY
