"""Batches: bad samples replaced and named, the same for any number of workers and ranks, nothing global touched."""

import os
import pickle
import signal
import tarfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

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
from aclip.data.batches import MAX_REPLACEMENTS, collate
from aclip.data.packing import Sample, write_tar
from aclip.data.sources.base import WINDOW, RawSample, Source
from aclip.data.sources.combined import Mixture
from aclip.data.views import VIEWS, Crop
from aclip.errors import BadSampleError, ConfigError, DataError
from aclip.structs import Batch
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
    batches = list(loader)
    assert [batch.size for batch in batches] == [16] * 14
    check_skipped({bad for batch in batches for bad in batch.skipped})
    keys = [key for batch in batches[:7] for key in batch.keys]
    assert set(keys) & set(SKIPPED) == set()
    assert set(keys) == USED | {f"good_{number:03}.png" for number in range(100)}  # each has its own place
    assert len(keys) == 112  # and six have a second one


def test_unusual_images_are_used_as_they_should_be(mixed_folder: Path) -> None:
    data = dataset(mixed_folder)
    names = [data.source.name(index) for index in range(len(data))]

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
    images = EvaluationSet(
        open_source(str(mixed_folder)), lambda image: torch.zeros(3, 8, 8), batch_size=16, workers=0
    )
    keys = [key for batch in images for key in batch.keys]
    assert keys == sorted(USED | {f"good_{number:03}.png" for number in range(100)})
    check_skipped(set(images.skipped))


def test_a_replacement_is_seeded_and_does_not_repeat_its_own_appearance(mixed_folder: Path) -> None:
    data = dataset(mixed_folder)
    names = [data.source.name(index) for index in range(len(data))]
    bad = names.index("text.jpg")
    item = data[Request(0, bad)]
    assert dict(item.skipped).keys() >= {"text.jpg"}
    regular = data[Request(0, names.index(item.key))]
    assert np.array_equal(regular.views["a"].pixels, item.views["a"].pixels)
    assert regular.views["a"].augmentation != item.views["a"].augmentation
    assert regular.seed != item.seed
    again = pickle.loads(pickle.dumps(data))[Request(0, bad)]
    assert (again.key, again.seed, again.skipped) == (item.key, item.seed, item.skipped)
    assert names.index(item.key) != bad
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
    import aclip.data.batches as module

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

class Groups(Source):
    """Images in groups, some of them bad; knows which groups have been read."""

    def __init__(self, groups: tuple[int, ...], bad: Callable[[int], bool]) -> None:
        self.spec = "groups"
        self.groups = groups
        self.bad = bad
        self.group_of = np.repeat(np.arange(len(groups)), groups)
        self.read_groups: list[int] = []

    def __len__(self) -> int:
        return len(self.group_of)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> RawSample:
        if not self.read_groups or self.read_groups[-1] != self.group_of[index]:
            self.read_groups.append(int(self.group_of[index]))
        if self.bad(index):
            raise BadSampleError("bad")
        return RawSample(str(index), encode(picture(index, 4)), ("a caption",))


def downloads(source: Groups, kept: int = 2 * WINDOW) -> int:
    """Return how often a group is fetched where the groups used last are kept."""
    cache: dict[int, None] = {}
    fetched = 0
    for group in source.read_groups:
        fetched += cache.pop(group, 0) == 0
        cache[group] = None
        if len(cache) > kept:
            del cache[next(iter(cache))]
    return fetched


@pytest.mark.parametrize("bad", [lambda index: False, lambda index: index % 100 == 7, lambda index: index // 10 == 3,
                                 lambda index: index >= 590],
                         ids=["none", "1 %", "a group", "the last group"])  # fmt: skip
def test_replacements_come_from_the_window_of_the_bad_sample(bad: Callable[[int], bool]) -> None:
    source = Groups((10,) * 60, bad)
    data = PairDataset(source, WholePicture(), CaptionTokenizer(WordTokenizer()), sizes={"a": (4, 4)}, seed=0)
    for epoch in range(3):
        source.read_groups.clear()
        order = source.order(0, epoch)[0].tolist()
        keys = [data[Request(epoch, sample)].key for sample in order]
        assert not any(bad(int(key)) for key in keys)
        assert downloads(source) <= 66  # 1.1 for each group
        windows = [set(order[first : first + 80]) for first in range(0, 600, 80)]
        for place, key in enumerate(keys):
            near = windows[place // 80] | (windows[6] if place >= 560 else set())  # the last window has half a window
            assert int(key) in near


def test_replacements_in_a_mixture_come_from_the_window_of_their_own_source() -> None:
    sources = [Groups((10,) * 60, lambda index: index % 50 == 7), Groups((10,) * 30, lambda index: index % 50 == 9)]
    mixture = Mixture("mixture", sources, [1, 2])
    data = PairDataset(mixture, WholePicture(), CaptionTokenizer(WordTokenizer()), sizes={"a": (4, 4)}, seed=0)
    replaced = 0
    for epoch in range(2):
        for source in sources:
            source.read_groups.clear()
        for sample, one_pass in zip(*(column.tolist() for column in mixture.order(0, epoch)), strict=True):
            item = data[Request(one_pass, sample)]
            replaced += bool(item.skipped)
            assert (sample < 600) == any(item.key == mixture.name(near) for some in mixture.window(0, one_pass, sample)
                                         for near in some if near < 600)  # fmt: skip
        assert downloads(sources[0]) <= 66
        assert downloads(sources[1]) <= 66 + 6  # twice through thirty groups
    assert replaced > 20


def test_a_window_that_is_all_bad_is_replaced_from_elsewhere() -> None:
    source = Groups((2,) * 40, lambda index: index not in (0, 1))
    data = PairDataset(source, WholePicture(), CaptionTokenizer(WordTokenizer()), sizes={"a": (4, 4)}, seed=0)
    assert {data[Request(0, sample)].key for sample in range(80)} == {"0", "1"}


# -------------------------------------------------------------------------------- loader


def pairs(folder: Path, *, whole: bool = False) -> PairDataset:
    views = WholePicture() if whole else VIEWS["two_crops_in_context"]()
    sizes = dict.fromkeys(views.names, (16, 20))
    return PairDataset(
        open_source(str(folder)), views, CaptionTokenizer(WordTokenizer()), sizes=sizes, seed=5
    )


@pytest.fixture
def rough_folder(pair_folder: Path) -> Path:
    """Forty pairs, two of which are bad."""
    (pair_folder / "003.png").write_bytes(b"")
    (pair_folder / "031.txt").unlink()
    return pair_folder


def flat(value: object) -> object:
    """Nested plain values, so that == compares everything."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: flat(getattr(value, f.name)) for f in fields(value)}
    return value


def cut(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1]


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_workers(rough_folder: Path, workers: int) -> None:
    def batches(count: int) -> list[object]:
        loader = build_loader(
            pairs(rough_folder), batch_size=8, total_steps=9, workers=count, cut_text=cut
        )
        return [flat(batch) for batch in loader]

    alone = batches(0)
    assert len(alone) == 9
    assert any(batch["skipped"] for batch in alone)
    assert batches(workers) == alone


def test_a_resumed_stream_is_the_rest_of_the_whole(rough_folder: Path) -> None:
    whole = [flat(batch) for batch in build_loader(pairs(rough_folder), batch_size=8, total_steps=12)]
    for start in (1, 5, 7, 12):  # within an epoch of five steps, at its end, in the next, and at the very end
        loader = build_loader(pairs(rough_folder), batch_size=8, total_steps=12, start_step=start)
        assert [flat(batch) for batch in loader] == whole[start:]
        assert len(loader) == 12 - start


def test_ranks_together_are_one_process(rough_folder: Path) -> None:
    data = pairs(rough_folder)
    whole = list(build_loader(data, batch_size=8, total_steps=3))
    shares = [
        list(build_loader(data, batch_size=8, total_steps=3, rank=rank, world_size=2)) for rank in range(2)
    ]
    for step, batch in enumerate(whole):
        both = [shares[rank][step] for rank in range(2)]
        assert torch.equal(torch.cat([share.seeds for share in both]), batch.seeds)
        assert torch.equal(torch.cat([share.views["a"].pixels for share in both]), batch.views["a"].pixels)
        assert sum((share.keys for share in both), ()) == batch.keys


def test_a_batch_has_the_promised_shapes(pair_folder: Path) -> None:
    (batch,) = build_loader(pairs(pair_folder), batch_size=6, total_steps=1)
    assert isinstance(batch, Batch)
    assert set(batch.views) == {"a", "b", "context"}
    for view in batch.views.values():
        assert (view.pixels.dtype, tuple(view.pixels.shape)) == (torch.uint8, (6, 3, 16, 20))
        assert (view.boxes.dtype, tuple(view.boxes.shape)) == (torch.float32, (6, 4))
        assert (view.flipped.dtype, tuple(view.flipped.shape)) == (torch.bool, (6,))
    assert (batch.tokens.dtype, tuple(batch.tokens.shape)) == (torch.int64, (6, 8))
    assert batch.caption_ids.dtype == batch.seeds.dtype == torch.int64
    assert len(set(batch.keys)) == 6


def test_rows_belong_together(pair_folder: Path) -> None:
    data = pairs(pair_folder, whole=True)
    items = [data[Request(2, sample)] for sample in (9, 0, 33)]
    batch = collate(items, len(items), data.tokenizer)
    for row, item in enumerate(items):
        assert np.array_equal(batch.views["a"].pixels[row].numpy(), item.views["a"].pixels)
        assert batch.views["a"].augmentation[row].tolist() == item.views["a"].augmentation.tolist()
        assert batch.tokens[row].tolist() == item.tokens.tolist()
        assert (batch.caption_ids[row], batch.seeds[row]) == (item.caption_id, item.seed)
        assert batch.keys[row] == item.key


def test_text_is_cut_and_truncation_counted_before_the_cut(pair_folder: Path) -> None:
    (pair_folder / "000.txt").write_text("one two three four five six seven eight")
    data = pairs(pair_folder, whole=True)
    short = collate([data[Request(0, n)] for n in (1, 2)], 2, data.tokenizer, cut)
    assert (tuple(short.tokens.shape), short.truncated) == ((2, 3), 0)
    long = collate([data[Request(0, n)] for n in (0, 2)], 2, data.tokenizer, cut)
    assert (tuple(long.tokens.shape), long.truncated) == ((2, 8), 1)


def test_cut_captions_are_counted_where_padding_is_the_end_token() -> None:
    def pads_with_end(texts: list[str]) -> torch.Tensor:
        rows = WordTokenizer()(texts)
        return torch.where(rows == 0, 999, rows)

    tokenizer = CaptionTokenizer(pads_with_end)
    for words, cut in ((0, 0), (1, 0), (6, 0), (7, 1), (8, 1), (40, 1)):
        assert tokenizer.count_truncated(tokenizer(["word " * words])) == cut
        assert CaptionTokenizer(WordTokenizer()).count_truncated(WordTokenizer()(["word " * words])) == cut


def test_no_global_generator_is_touched(pair_folder: Path) -> None:
    def states() -> tuple[object, ...]:
        numpy_state = np.random.get_state()  # noqa: NPY002 - the very thing that must not change
        # Not `random`: the run-time type checks of the tests draw from it.
        return numpy_state[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    for workers in (0, 1):
        list(build_loader(pairs(pair_folder), batch_size=8, total_steps=2, workers=workers))
        list(EvaluationSet(open_source(str(pair_folder)), to_tensor, workers=workers))
    assert states() == before


def test_workers_leave_interrupts_to_their_parent_and_use_one_thread(pair_folder: Path) -> None:
    class Probe(WholePicture):
        def __call__(self, image: Image.Image, **place: Any) -> dict[str, Crop]:
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert torch.get_num_threads() == 1
            assert os.getpid() != parent
            return super().__call__(image, **place)

    parent = os.getpid()
    data = PairDataset(
        open_source(str(pair_folder)), Probe(), CaptionTokenizer(WordTokenizer()), sizes={"a": (8, 8)}, seed=0
    )
    assert len(list(build_loader(data, batch_size=8, total_steps=2, workers=1))) == 2


def test_impossible_loaders_say_so_at_once(pair_folder: Path) -> None:
    with pytest.raises(DataError, match="40 pairs do not fill one batch of 64"):
        build_loader(pairs(pair_folder), batch_size=64, total_steps=1)
    with pytest.raises(ConfigError, match="not 9 for 2"):
        build_loader(pairs(pair_folder), batch_size=9, total_steps=1, world_size=2)


def to_tensor(image: object) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()


def test_spawned_workers_give_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "0.tar").open("wb") as file:
        write_tar(file, (Sample(f"{n:09}", {"png": encode(picture(n, 4)), "txt": b"a caption"}) for n in range(500)))
    data = dataset(tmp_path / "0.tar")
    expected = [flat(batch) for batch in build_loader(data, batch_size=8, total_steps=4)]
    monkeypatch.setattr("aclip.data.workers._START_METHOD", "spawn")  # as on systems other than Linux
    assert [flat(batch) for batch in build_loader(data, batch_size=8, total_steps=4, workers=2)] == expected
