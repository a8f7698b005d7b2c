"""One sample for every request: bad ones replaced and named, everything a function of the request."""

import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from aclip import rng
from aclip.data import (
    CaptionTokenizer,
    EvaluationSet,
    Item,
    PairDataset,
    Request,
    build_loader,
    caption_id,
    open_source,
)
from aclip.data.dataset import MAX_REPLACEMENTS
from aclip.data.views import VIEWS
from aclip.errors import DataError
from bad_samples import SKIPPED, USED, check_skipped, make_mixed_folder
from made_pictures import WholePicture, WordTokenizer, encode, picture


def dataset(folder: Path, *, seed: int = 0, context_length: int = 8) -> PairDataset:
    return PairDataset(
        open_source(str(folder)),
        WholePicture(),
        CaptionTokenizer(WordTokenizer(context_length)),
        sizes={"a": (24, 24)},
        seed=seed,
    )


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
    return make_mixed_folder(tmp_path / "mixed")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_bad_samples_trains_to_the_end(mixed_folder: Path, workers: int) -> None:
    data = dataset(mixed_folder)
    assert len(data) == 112
    loader = build_loader(data, batch_size=16, total_steps=14, workers=workers)  # two epochs
    assert loader.steps_per_epoch == 7
    batches = list(loader)
    assert [batch.size for batch in batches] == [16] * 14
    check_skipped({bad for batch in batches for bad in batch.skipped})
    keys = [key for batch in batches[:7] for key in batch.keys]
    assert set(keys) & set(SKIPPED) == set()
    assert set(keys) == USED | {f"good_{number:03}.png" for number in range(100)}  # each has its own place
    assert len(keys) == 112  # and six have a second one


def test_unusual_pictures_are_used_as_they_should_be(mixed_folder: Path) -> None:
    data = dataset(mixed_folder)
    names = [data.source.key(index) for index in range(len(data))]

    def item(name: str) -> Item:
        return data[Request(0, names.index(name))]

    def colour(name: str) -> np.ndarray:
        pixels = item(name).views["a"].pixels
        assert pixels.dtype == np.uint8
        assert pixels.shape == (3, 24, 24)
        return np.median(pixels.reshape(3, -1).astype(int), axis=1)

    assert colour("animated.gif").tolist() == [255, 0, 0]
    assert np.abs(colour("cmyk.jpg") - [0, 255, 0]).max() <= 3
    assert colour("sixteen_bit.png").tolist() == [128, 128, 128]
    assert colour("palette.png").tolist() == [255, 255, 255]
    assert torch.equal(item("long_caption.png").tokens, WordTokenizer()(["word " * 7])[0])
    assert torch.equal(item("chinese.png").tokens, WordTokenizer()(["一只在雪地里奔跑的狗"])[0])
    assert item("chinese.png").caption_id == caption_id("一只在雪地里奔跑的狗")


def test_evaluation_leaves_bad_samples_out(mixed_folder: Path) -> None:
    pictures = EvaluationSet(
        open_source(str(mixed_folder)), lambda image: torch.zeros(3, 8, 8), batch_size=16, workers=0
    )
    keys = [key for batch in pictures for key in batch.keys]
    assert keys == sorted(USED | {f"good_{number:03}.png" for number in range(100)})
    check_skipped(set(pictures.skipped))


def test_a_replacement_is_seeded_and_does_not_repeat_its_own_appearance(mixed_folder: Path) -> None:
    data = dataset(mixed_folder)
    names = [data.source.key(index) for index in range(len(data))]
    bad = names.index("text.jpg")
    item = data[Request(0, bad)]
    assert dict(item.skipped).keys() >= {"text.jpg"}
    regular = data[Request(0, names.index(item.key))]
    assert np.array_equal(regular.views["a"].pixels, item.views["a"].pixels)
    assert regular.views["a"].augmentation != item.views["a"].augmentation
    assert regular.seed != item.seed
    again = pickle.loads(pickle.dumps(data))[Request(0, bad)]
    assert (again.key, again.seed, again.skipped) == (item.key, item.seed, item.skipped)
    assert names[item.number] == item.key
    chosen = {data[Request(epoch, bad)].key for epoch in range(9)}
    assert len(chosen) > 5
    assert dataset(mixed_folder, seed=1)[Request(0, bad)].seed != item.seed


def test_a_source_without_usable_samples_gives_up(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").touch()
        (tmp_path / f"{number}.txt").write_text("a caption")
    tries = MAX_REPLACEMENTS + 1
    message = rf"no usable sample in .*: {tries} in a row are bad, the first is \d.jpg \(empty file\)$"
    with pytest.raises(DataError, match=message):
        dataset(tmp_path)[Request(0, 1)]
    for workers in (0, 1):
        with pytest.raises(DataError, match=message):
            list(build_loader(dataset(tmp_path), batch_size=2, total_steps=1, workers=workers))


def test_an_item_is_a_function_of_seed_epoch_and_sample(pair_folder: Path) -> None:
    def fingerprint(seed: int, epoch: int, sample: int) -> tuple[int, float]:
        item = dataset(pair_folder, seed=seed)[Request(epoch, sample)]
        assert item.seed == rng.sample_seed(seed, epoch, sample)
        return item.seed, float(item.views["a"].augmentation[0])

    assert fingerprint(0, 1, 2) == fingerprint(0, 1, 2)
    places = ((0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3))
    seeds, draws = zip(*(fingerprint(*place) for place in places), strict=True)
    assert len(set(seeds)) == len(set(draws)) == 4


def test_one_decode_whatever_the_number_of_views(pair_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import aclip.data.dataset as module

    calls: list[int] = []
    decode: Callable[..., np.ndarray] = module.decode_pixels

    def counting(data: bytes, **hints: int) -> np.ndarray:
        calls.append(1)
        return decode(data, **hints)

    monkeypatch.setattr(module, "decode_pixels", counting)
    views = VIEWS["two_crops_in_context"]()
    sizes = dict.fromkeys(views.names, (16, 16))
    data = PairDataset(
        open_source(str(pair_folder)), views, CaptionTokenizer(WordTokenizer()), sizes=sizes, seed=0
    )
    assert set(data[Request(0, 0)].views) == {"a", "b", "context"}
    assert calls == [1]


def test_tags_reach_the_tokens(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        (tmp_path / "0.png").write_bytes(encode(picture(0)))
        (tmp_path / "0.json").write_text('{"caption": "heart", "tags": ["love"]}')
        archive.add(tmp_path / "0.png", "0.png")
        archive.add(tmp_path / "0.json", "0.json")
    (tmp_path / "0.png").unlink()
    data = dataset(tmp_path)
    rows = {tuple(data[Request(epoch, 0)].tokens.tolist()) for epoch in range(20)}
    expected = WordTokenizer()(["heart", "heart, love"]).tolist()
    assert rows == {tuple(row) for row in expected}
    assert {data[Request(epoch, 0)].caption_id for epoch in range(5)} == {caption_id("heart")}


def test_captions_of_one_concept_count_as_the_same(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        (tmp_path / "0.png").write_bytes(encode(picture(0)))
        (tmp_path / "0.json").write_text('{"captions": ["cat", "a photo of a cat"], "concept": "cat"}')
        archive.add(tmp_path / "0.png", "0.png")
        archive.add(tmp_path / "0.json", "0.json")
    (tmp_path / "0.png").unlink()
    data = dataset(tmp_path)
    items = [data[Request(epoch, 0)] for epoch in range(20)]
    assert len({tuple(item.tokens.tolist()) for item in items}) == 2
    assert {item.caption_id for item in items} == {caption_id("cat")}
