"""Evaluation sees every good picture once, whole, in order, with its own caption."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aclip.data import EvaluationSet, caption_id, open_source
from aclip.errors import DataError
from made_pictures import encode, picture


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_in_order(pair_folder: Path, workers: int) -> None:
    (pair_folder / "002.png").write_bytes(b"junk")
    (pair_folder / "005.txt").write_text("Picture  FIVE\na second caption\n")
    pictures = EvaluationSet(open_source(str(pair_folder)), to_tensor, batch_size=16, workers=workers)
    for _ in range(2):
        batches = list(pictures)
        indices = [index for batch in batches for index in batch.indices]
        assert indices == [n for n in range(40) if n != 2]
        assert [len(batch.keys) for batch in batches] == [15, 16, 8]
        assert [name for name, _ in pictures.skipped] == ["002.png"]
    batch = batches[0]
    assert batch.captions[:4] == ("picture 0", "picture 1", "picture 3", "picture 4")
    assert batch.captions[4] == "Picture FIVE"
    assert batch.caption_ids.tolist() == [caption_id(caption) for caption in batch.captions]
    assert batch.labels[0] is None
    assert torch.equal(batch.pixels[2], to_tensor(picture(3)))
    assert np.array_equal(np.asarray(pictures.image(3)), np.asarray(picture(3)))
    assert len(pictures) == 40


def test_classification_needs_labels_and_no_captions(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(encode(picture(0)))
    (tmp_path / "1.png").write_bytes(encode(picture(1)))
    pictures = EvaluationSet(open_source(str(tmp_path)), to_tensor, target="label")
    (batch,) = pictures
    assert (batch.labels, batch.keys, batch.captions) == (("cat",), ("cat/0.png",), ("",))
    assert pictures.skipped == [("1.png", "missing label")]


def test_a_name_is_a_label_or_a_caption(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(encode(picture(0)))
    for number, text in ((1, "a dog\n"), (2, " \n")):
        (tmp_path / f"{number}.png").write_bytes(encode(picture(number)))
        (tmp_path / f"{number}.txt").write_text(text)
    pictures = EvaluationSet(open_source(str(tmp_path)), to_tensor, target="either")
    (batch,) = pictures
    assert (batch.labels, batch.captions) == ((None, "cat"), ("a dog", ""))
    assert batch.all_captions == (("a dog",), ())
    assert pictures.skipped == [("2.png", "empty caption")]


def test_nothing_to_evaluate(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").touch()
    with pytest.raises(DataError, match=r"all 1 are bad, the first is 0.jpg \(missing caption\)"):
        list(EvaluationSet(open_source(str(tmp_path)), to_tensor))
