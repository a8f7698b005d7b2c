"""Every kind of source: the same stream for any number of workers and ranks, resumed anywhere, in bounded memory."""

import gc
import multiprocessing
import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aclip.data import CaptionTokenizer, PairDataset, build_loader, open_source, open_training
from aclip.data.packing import Sample, write_tar
from made_pictures import WholePicture, WordTokenizer, encode, picture

PAIRS, BATCH = 40, 8


def make_parquet(folder: Path) -> str:
    pictures = [encode(picture(number)) if number != 13 else b"bad" for number in range(PAIRS)]
    table = pa.table({"image": pictures, "text": [f"embedded {number}" for number in range(PAIRS)]})
    pq.write_table(table, folder / "embedded.parquet", row_group_size=3)
    return str(folder / "embedded.parquet")


def make_table(folder: Path) -> str:
    rows = "".join(f"{number:03}.png,row {number}\n" for number in range(PAIRS))
    (folder / "pairs.csv").write_text(f"image,caption\n{rows}missing.png,gone\n")
    return str(folder / "pairs.csv")


def make_shards(folder: Path) -> str:
    for shard in range(3):
        numbers = range(shard * 14, min(shard * 14 + 14, PAIRS))
        with (folder / f"{shard}.tar").open("wb") as file:
            write_tar(file, (Sample(f"{n:03}", {"png": encode(picture(n)) if n != 13 else b"bad", "txt": b"a caption"})
                             for n in numbers))  # fmt: skip
    return f"{folder}/{{0..2}}.tar"


def publish(pattern: str) -> str:
    """Return the address under which fsspec's memory has the shards of a pattern."""
    store = fsspec.filesystem("memory")
    for path in Path(pattern).parent.glob("*.tar"):
        store.pipe_file(str(path), path.read_bytes())
    return f"memory://{pattern}"


@pytest.fixture(params=["folder", "table", "shards", "remote shards", "groups", "part of groups", "mixture"])
def dataset(request: pytest.FixtureRequest, pair_folder: Path, tmp_path: Path) -> PairDataset:
    (pair_folder / "003.png").write_bytes(b"")  # a bad sample in each
    parquet = make_parquet(tmp_path)
    specs = {
        "folder": [str(pair_folder)],
        "table": [make_table(pair_folder)],
        "shards": [make_shards(tmp_path)],
        "remote shards": [publish(make_shards(tmp_path))],
        "groups": [parquet],
        "part of groups": [f"{parquet}[4:35]"],
        "mixture": [f"{pair_folder}[:10]=2", f"{parquet}=1", f"{publish(make_shards(tmp_path))}=1"],
    }[request.param]
    views = WholePicture()
    return PairDataset(
        open_training(specs), views, CaptionTokenizer(WordTokenizer()),
        sizes=dict.fromkeys(views.names, (8, 8)), seed=5,
    )  # fmt: skip


def stream(
    dataset: PairDataset, *, workers: int = 0, start: int = 0, ranks: int = 1
) -> list[list[tuple[str, int, list[int]]]]:
    """What each step trains on: keys, random seeds, and pixels."""
    def of_rank(rank: int) -> list[list[tuple[str, int, list[int]]]]:
        loader = build_loader(
            dataset, batch_size=BATCH, total_steps=11, start_step=start, workers=workers, rank=rank, world_size=ranks
        )
        return [
            [
                (key, seed, pixels.flatten().tolist())
                for key, seed, pixels in zip(
                    batch.keys, batch.seeds.tolist(), next(iter(batch.views.values())).pixels, strict=True
                )
            ]
            for batch in loader
        ]

    shares = [of_rank(rank) for rank in range(ranks)]
    return [[sample for share in step for sample in share] for step in zip(*shares, strict=True)]


def test_workers_ranks_and_resumption_change_nothing(dataset: PairDataset) -> None:
    whole = stream(dataset)
    assert len({(key, seed) for step in whole for key, seed, _ in step}) == 11 * BATCH
    for workers in (0, 1, 3):
        for ranks in (1, 2):
            start = 3 * workers + ranks  # within an epoch, at its end, and in a later one
            assert stream(dataset, workers=workers, start=start, ranks=ranks) == whole[start:], (workers, ranks)


def resident(pid: int | str = "self") -> int:
    """Return a process's own memory in bytes, without what it shares with files."""
    with open(f"/proc/{pid}/statm") as file:
        fields = file.read().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="measures memory as Linux tells it")
@pytest.mark.parametrize("workers", [0, 1])
def test_ten_epochs_take_no_more_memory_than_two(pair_folder: Path, workers: int) -> None:
    for number in range(PAIRS, 1_000):
        os.link(pair_folder / f"{number % PAIRS:03}.png", pair_folder / f"{number:03}.png")
    rows = "".join(f"{number:03}.png,row {number} of many\n" for number in range(1_000))
    (pair_folder / "many.csv").write_text(f"image,caption\n{rows}")
    source = open_source(str(pair_folder / "many.csv"))
    views = WholePicture()
    sizes = dict.fromkeys(views.names, (2, 2))
    dataset = PairDataset(source, views, CaptionTokenizer(WordTokenizer()), sizes=sizes, seed=0)
    loader = build_loader(dataset, batch_size=100, total_steps=10 * len(source) // 100, workers=workers)
    used: list[tuple[int, ...]] = []
    for step, _ in enumerate(loader, start=1):
        if step % (len(source) // 100) == 0:
            gc.collect()
            children = multiprocessing.active_children()
            assert len(children) == workers or step == len(loader)
            used.append((resident(), *(resident(child.pid or 0) for child in children)))
    assert len(used) == 10
    # The allocator takes 2 MB at a time; a leak of 500 bytes for every sample that is read would add 4 MB.
    for whose in zip(*used[:-1], strict=True):  # the last worker may have gone with the last step
        assert max(whose[2:]) - whose[1] < 4e6, used
