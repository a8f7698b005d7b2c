import re
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from aclip import models
from aclip.errors import CheckpointError
from aclip.recipes import RECIPES
from aclip.report.snapshots import (
    HEAT_OPACITY,
    Snapshot,
    heat_colours,
    heat_layer,
    heat_map,
    kept_patches,
    read_snapshot,
    snapshot_path,
    take_snapshot,
    to_image,
    veil_layer,
    write_snapshot,
)
from tests_support import build, random_batch


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    return {"images": torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, generator=generator),
            "scores": torch.rand(2, 6, generator=generator), "keep_indices": torch.tensor([[0, 2], [1, 5]]),
            "grid": (2, 3), "captions": ("a cat", "été <\"🎈\n"), "step": 123}


def test_round_trip(parts, tmp_path):
    path = snapshot_path(tmp_path / "snapshots", 123)
    assert path.name == "step-00000123.safetensors"
    write_snapshot(path, Snapshot(**parts))
    read = read_snapshot(path)
    for name in ("images", "scores", "keep_indices"):
        assert torch.equal(getattr(read, name), parts[name])
    assert read.maps is None
    assert (read.grid, read.captions, read.step) == ((2, 3), parts["captions"], 123)
    assert list(path.parent.iterdir()) == [path]


def test_types_are_those_of_the_format(parts, tmp_path):
    path = tmp_path / "s.safetensors"
    scores, images = parts["scores"].bfloat16().requires_grad_(), parts["images"].mT.contiguous().mT
    write_snapshot(path, Snapshot(**(parts | {"scores": scores, "images": images})))
    read = read_snapshot(path)
    assert (read.images.dtype, read.scores.dtype, read.keep_indices.dtype) == (
        torch.uint8, torch.float32, torch.int64)
    assert torch.equal(read.images, parts["images"])


def test_the_map_of_an_image_is_that_of_its_own_caption(tmp_path):
    method = build(RECIPES["a-clip"], "vit-micro")
    batch = random_batch(method.plan, batch_size=2)
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)) for i in range(2)]
    read = read_snapshot(take_snapshot(method, pictures, ["a", "b"], 0, tmp_path, batch.tokens))
    pixels = (read.images / 255 - method.mean[:, None, None]) / method.std[:, None, None]
    texts = F.normalize(models.encode_text(method.model, batch.tokens), dim=-1).detach()
    for i in range(2):
        expected = models.text_maps(method.model.visual, pixels[i:i + 1], texts[i:i + 1])[0, 0]
        torch.testing.assert_close(read.maps[i], expected, rtol=1e-3, atol=1e-7)
    assert read.maps.any()


def test_missing_truncated_and_foreign_files_are_named(parts, tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(CheckpointError, match=r"s\.safetensors is not a readable snapshot"):
        read_snapshot(path)
    write_snapshot(path, Snapshot(**parts))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="not a readable snapshot"):
        read_snapshot(path)
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a readable snapshot"):
        read_snapshot(path)


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
    to_either = np.abs(shown[~kept][:, None].astype(int) - [(122, 127, 138), (206, 209, 214)]).max(axis=2)
    assert to_either.min(axis=1).max() <= 0.14 * 255  # under a veil of two greys
    for grey in (0, 122, 164, 206, 255):  # which no grey image hides
        plain = Image.new("RGB", image.size, (grey,) * 3)
        seen = np.asarray(kept_patches(plain, torch.tensor([0, 4]), (2, 3)))[~kept].astype(int)
        assert (np.abs(seen - grey).max(axis=1) > 30).mean() > 0.4
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
    style = resources.files("aclip.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
    gradient = re.search(r"\.scale \{[^}]*linear-gradient\(90deg, ([^)]*)\)", style).group(1).split(", ")
    anchors = heat_colours(np.linspace(0, 1, len(gradient)))
    assert gradient == [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in anchors]
    assert float(re.search(r"\.heat img \{ opacity: ([\d.]+)", style).group(1)) == HEAT_OPACITY
