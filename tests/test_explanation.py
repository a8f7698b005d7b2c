"""`aclip.explain` and the verb: arrays equal what the model says, and the drawing shows them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import aclip
from aclip import models
from aclip.cli import main
from aclip.errors import ConfigError, DataError
from aclip.models import LoadedModel

TEXTS = ["a cat", "две собаки"]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    torch.manual_seed(0)
    return LoadedModel(models.create_model("vit-micro"), models.tokenizer_of("vit-micro")).eval()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_arrays_are_what_the_model_says(model: LoadedModel, tmp_path: Path) -> None:
    pictures = [noise(40, 60), noise(300, 50, seed=1)]
    Image.fromarray(pictures[1]).save(tmp_path / "tall.png")
    explained = aclip.explain(model, [pictures[0], tmp_path / "tall.png"], TEXTS, keep=0.25)
    pixels = torch.stack([model.preprocess(Image.fromarray(picture)) for picture in pictures])
    similarity = model.encode_images(pictures) @ model.encode_texts(TEXTS).T
    maps = models.text_maps(model.model.visual, pixels, model.encode_texts(TEXTS))
    for i, one in enumerate(explained):
        assert one.texts == tuple(TEXTS)
        for mine, theirs in ((one.attention, model.attention_scores(pixels)[i]), (one.maps, maps[i]),
                             (one.similarity, similarity[i]), (one.kept, model.keep_mask(pixels, 0.75)[i])):
            torch.testing.assert_close(torch.from_numpy(mine).flatten(), theirs.flatten(), rtol=0, atol=1e-6)
        assert one.attention.shape == one.kept.shape == one.maps.shape[1:] == (8, 8)
        assert one.kept.dtype == bool
        assert one.kept.sum() == 16


def test_the_image_that_is_shown_is_the_part_that_the_model_sees(model: LoadedModel) -> None:
    picture = Image.fromarray(noise(3, 5)).resize((1000, 600), Image.Resampling.BICUBIC)
    shown = aclip.explain(model, [picture])[0].image
    assert shown.mode == "RGB"
    assert shown.size == (448, 448)
    visual = model.model.visual
    mean, std = (torch.tensor(visual.preprocess_cfg[key])[:, None, None] for key in ("mean", "std"))
    seen = ((model.preprocess(picture) * std + mean) * 255).permute(1, 2, 0).numpy()
    small = np.asarray(shown.resize((32, 32), Image.Resampling.BOX)).astype(float)
    assert np.abs(small - seen).mean() < 5  # a crop elsewhere differs by some 60


def test_a_model_that_is_not_square_sees_and_shows_its_own_shape() -> None:
    wide = LoadedModel(models.create_model("vit-micro", image_size=(32, 64)), models.tokenizer_of("vit-micro")).eval()
    explained, = aclip.explain(wide, [noise(100, 100)], TEXTS)
    assert explained.maps.shape == (2, 8, 16)
    assert explained.image.size == (2 * 448, 448)


def test_without_text_there_are_no_maps(model: LoadedModel) -> None:
    explained, = aclip.explain(model, [noise(20, 20)])
    assert (explained.maps.shape, explained.similarity.shape) == ((0, 8, 8), (0,))
    assert explained.figure().height < 500


def test_the_figure_has_a_panel_a_text_on_one_scale(model: LoadedModel) -> None:
    """The second text's map has one light patch; the first's, which is flat and low, stays dark beside it."""
    explained, = aclip.explain(model, [np.full((32, 32, 3), 128, np.uint8)], TEXTS)
    maps = np.zeros((2, 8, 8), np.float32)
    maps[0], maps[1, 2, 3] = 0.1, 1.0
    drawn = np.asarray(replace(explained, maps=maps).figure()).astype(int).sum(-1)
    top = 16 + 336 + 2 * 24 + 16  # below the first row, its words and the gap
    first, second = (drawn[top:top + 336, left:left + 336] for left in (16, 16 + 352))
    assert np.ptp(first) < 6
    y, x = np.unravel_index(second.argmax(), second.shape)
    assert abs(y - 2.5 * 42) < 21
    assert abs(x - 3.5 * 42) < 21
    assert second.max() > first.max() + 200 > second.min()


def test_what_cannot_be_explained_is_said(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png cannot be used: not an image"):
        aclip.explain(model, [noise(9, 9), tmp_path / "bad.png"])
    with pytest.raises(DataError, match="image 1 cannot be used"):
        aclip.explain(model, [noise(9, 9), np.zeros((2, 2))])
    for images, texts in (("cat.png", TEXTS), ([noise(9, 9)], "a cat")):
        with pytest.raises(ConfigError, match="takes lists of images and of texts"):
            aclip.explain(model, images, texts)
    for keep in (0.0, 1.5):
        with pytest.raises(ConfigError, match="keep is a fraction"):
            aclip.explain(model, [noise(9, 9)], keep=keep)


def test_the_verb_writes_one_file_or_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a" / "cat.png", tmp_path / "b" / "cat.png"]
    for path in paths:
        path.parent.mkdir()
        Image.fromarray(noise(30, 40)).save(path)
    one, folder = tmp_path / "new" / "one.png", tmp_path / "several"
    assert main(["explain", "vit-micro", str(paths[0]), "--text", *TEXTS, "--output", str(one)]) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in TEXTS)
    assert str(one) in said.replace("\n", "")
    with Image.open(one) as drawn:
        assert drawn.width > 1000
    assert main(["explain", "vit-micro", *map(str, paths), "--output", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["000-cat.png", "001-cat.png"]
    assert main(["explain", "vit-micro", *map(str, paths), "--output", str(one)]) == 2
    assert "holds one image and 2 are given" in capsys.readouterr().err
