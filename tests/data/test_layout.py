"""Awkward storage: read to the end by any number of workers, and a warning where something can be done."""

import logging
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aclip.data import CaptionTokenizer, PairDataset, Source, build_loader, layout, open_source
from aclip.data.layout import layout_warnings
from aclip.data.tar_files import Sample, write_tar
from made_pictures import WholePicture, WordTokenizer, encode, picture


def loaded(source: Source, workers: int, steps: int) -> Counter[str]:
    data = PairDataset(source, WholePicture(), CaptionTokenizer(WordTokenizer()), sizes={"a": (8, 8)}, seed=0)
    return Counter(key for batch in build_loader(data, batch_size=6, total_steps=steps, workers=workers)
                   for key in batch.keys)  # fmt: skip


def make_parquet(folder: Path, group: int) -> Source:
    table = pa.table({"image": [encode(picture(0))] * 12, "text": ["a"] * 12})
    pq.write_table(table, folder / "pairs.parquet", row_group_size=group)
    return open_source(str(folder / "pairs.parquet"))


@pytest.mark.parametrize("shards", [1, 2])
def test_few_shards_feed_many_workers(tmp_path: Path, shards: int, caplog: pytest.LogCaptureFixture) -> None:
    for shard in range(shards):
        with (tmp_path / f"{shard}.tar").open("wb") as file:
            numbers = range(12 // shards)
            write_tar(file, (Sample(f"{n:03}", {"jpg": encode(picture(n)), "txt": b"a"}) for n in numbers))
    source = open_source(str(tmp_path))
    with caplog.at_level(logging.WARNING, "aclip.data.loader"):
        assert set(loaded(source, workers=3, steps=4).values()) == {2}  # two epochs, nothing missed or repeated
    assert not [record for record in caplog.records if record.name == "aclip.data.loader"]


def test_fewer_row_groups_than_workers_are_read_and_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_parquet(tmp_path, 12)
    with caplog.at_level(logging.WARNING, "aclip.data.loader"):
        assert set(loaded(source, workers=2, steps=4).values()) == {2}
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "aclip.data.loader"]
    assert "has 1 row group for 2 workers" in warning
    assert f"'aclip data pack {source.name} --output shards'" in warning
    assert layout_warnings(make_parquet(tmp_path, 4), workers=3) == []


def test_a_giant_group_and_many_small_files_are_warned_about(
    tmp_path: Path, pair_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_LARGE_GROUP", 11)
    (warning,) = layout_warnings(make_parquet(tmp_path, 12), workers=0)
    assert "a row group of 12 pairs" in warning
    assert "aclip data pack" in warning
    folder = open_source(f"{pair_folder}[:30]")
    assert layout_warnings(folder, workers=2) == []
    monkeypatch.setattr(layout, "_MANY_FILES", 40)
    (warning,) = layout_warnings(folder, workers=2)
    assert "40 files of about" in warning
    monkeypatch.setattr(layout, "_SMALL_FILE", 10)
    assert layout_warnings(folder, workers=2) == []
