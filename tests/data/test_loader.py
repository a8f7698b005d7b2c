"""Batches: the same for any number of workers, ranks and resumptions, and nothing global touched."""

import os
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aclip.data import CaptionTokenizer, EvaluationSet, PairDataset, Request, build_loader, open_source
from aclip.data.loader import collate
from aclip.data.views import VIEWS, Crop
from aclip.errors import ConfigError, DataError
from aclip.structs import Batch
from made_pictures import WholePicture, WordTokenizer


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
            pairs(rough_folder), batch_size=8, total_steps=9, workers=count, cut_text=cut, prefetch=1
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
        assert (batch.keys[row], batch.numbers[row]) == (item.key, item.number)
    assert batch.numbers == (9, 0, 33)


def test_text_is_cut_and_truncation_counted_before_the_cut(pair_folder: Path) -> None:
    (pair_folder / "000.txt").write_text("one two three four five six seven eight")
    data = pairs(pair_folder, whole=True)
    short = collate([data[Request(0, n)] for n in (1, 2)], 2, data.tokenizer, cut)
    assert (tuple(short.tokens.shape), short.truncated) == ((2, 3), 0)
    long = collate([data[Request(0, n)] for n in (0, 2)], 2, data.tokenizer, cut)
    assert (tuple(long.tokens.shape), long.truncated) == ((2, 8), 1)


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
