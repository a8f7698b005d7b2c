"""Evaluation sees every good image once, whole, in order, with its own caption."""

from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import image_transform
from PIL import Image

from aclip.data import EvaluationSet, open_source
from aclip.data.evaluation_set import MAX_ASPECT, limit_aspect
from aclip.errors import DataError
from made_pictures import encode, picture


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.mark.parametrize("workers", [0, 2])
def test_images_in_order(pair_folder: Path, workers: int) -> None:
    (pair_folder / "002.png").write_bytes(b"junk")
    (pair_folder / "005.txt").write_text("Picture  FIVE\na second caption\n")
    images = EvaluationSet(open_source(str(pair_folder)), to_tensor, batch_size=16, workers=workers)
    for _ in range(2):
        batches = list(images)
        assert [key for batch in batches for key in batch.keys] == [f"{n:03}.png" for n in range(40) if n != 2]
        assert [len(batch.keys) for batch in batches] == [15, 16, 8]
        assert [name for name, _ in images.skipped] == ["002.png"]
    batch = batches[0]
    assert [captions[0] for captions in batch.all_captions[:5]] == [
        "picture 0", "picture 1", "picture 3", "picture 4", "Picture FIVE"]
    assert batch.labels[0] is None
    assert torch.equal(batch.pixels[2], to_tensor(picture(3)))
    assert len(images) == 40


def test_classification_needs_labels_and_no_captions(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(encode(picture(0)))
    (tmp_path / "1.png").write_bytes(encode(picture(1)))
    images = EvaluationSet(open_source(str(tmp_path)), to_tensor, target="label")
    (batch,) = images
    assert (batch.labels, batch.keys, batch.all_captions) == (("cat",), ("cat/0.png",), ((),))
    assert images.skipped == [("1.png", "missing label")]


def test_a_name_is_a_label_or_a_caption(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(encode(picture(0)))
    for number, text in ((1, "a dog\n"), (2, " \n")):
        (tmp_path / f"{number}.png").write_bytes(encode(picture(number)))
        (tmp_path / f"{number}.txt").write_text(text)
    images = EvaluationSet(open_source(str(tmp_path)), to_tensor, target="either")
    (batch,) = images
    assert batch.labels == (None, "cat")
    assert batch.all_captions == (("a dog",), ())
    assert images.skipped == [("2.png", "empty caption")]


def test_nothing_to_evaluate(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").touch()
    with pytest.raises(DataError, match=r"all 1 are bad, the first is 0.jpg \(missing caption\)"):
        list(EvaluationSet(open_source(str(tmp_path)), to_tensor))


@pytest.mark.parametrize("size", [(1, 12_000), (30_000, 2), (3, 301)])
def test_thin_images_take_no_gigabytes(size: tuple[int, int], tmp_path: Path) -> None:
    """A transform that scales the short side first would make 224 x 2,688,000 pixels of an image of 1 x 12,000."""
    largest = 0

    def preprocess(image: Image.Image) -> torch.Tensor:
        nonlocal largest
        scale = 224 / min(image.size)
        largest = max(largest, round(image.width * scale) * round(image.height * scale))
        return transform(image)

    transform = image_transform(224, is_train=False)
    (tmp_path / "0.png").write_bytes(encode(Image.new("RGB", size, "red")))
    (tmp_path / "0.txt").write_text("a red line")
    (batch,) = EvaluationSet(open_source(str(tmp_path)), preprocess)
    assert batch.pixels.shape == (1, 3, 224, 224)
    assert largest <= 224 * 224 * MAX_ASPECT
    red = transform(Image.new("RGB", (224, 224), "red"))
    assert torch.allclose(batch.pixels[0], red, atol=1e-5)


def test_the_centre_of_a_thin_image_is_kept_and_others_are_untouched() -> None:
    pixels = np.zeros((2, 1001, 3), dtype=np.uint8)
    pixels[:, 480:520, 0] = np.arange(40)
    image = limit_aspect(Image.fromarray(pixels))
    assert image.size == (200, 2)
    assert np.asarray(image)[0, 80:120, 0].tolist() == list(range(40))
    for size in ((200, 2), (100, 1), (64, 48)):
        same = Image.new("RGB", size)
        assert limit_aspect(same) is same
