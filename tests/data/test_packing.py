"""Packed shards: the same pairs, smaller, whole or not at all, whatever interrupts them."""

import errno
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aclip import data
from aclip.data import open_source, packing
from aclip.data.packing import write_shards
from aclip.data.sources.base import Source
from aclip.data.sources.shard_index import SIZES
from aclip.errors import ConfigError, DataError
from bad_samples import SKIPPED, make_mixed_folder
from made_pictures import encode, picture


def write_small(source: Source, folder: Path, *, workers: int = 0, side: int | None = 10) -> int:
    return write_shards(source, folder, side=side, shard_size=15, workers=workers)


@pytest.fixture
def source(pair_folder: Path) -> Source:
    (pair_folder / "003.png").write_bytes(b"")
    (pair_folder / "007.png").rename(pair_folder / "007.jpg")
    (pair_folder / "007.jpg").write_bytes(encode(picture(7, 9), "JPEG"))
    (pair_folder / "008.txt").write_text("one\ntwo\n")
    return open_source(str(pair_folder))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def content_of_one_process(source: Source, folder: Path) -> dict[str, bytes]:
    write_small(source, folder)
    return content(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_pairs_but_smaller(source: Source, tmp_path: Path, workers: int) -> None:
    assert write_small(source, tmp_path / "packed", workers=workers) == 39
    again = open_source(str(tmp_path / "packed"))
    good = [index for index in range(40) if index != 3]
    assert len(again) == 39
    for new, old in enumerate(good):
        before, after = source.read(old), again.read(new)
        assert after.captions == before.captions
        with Image.open(io.BytesIO(after.image)) as image:
            assert image.format == "JPEG"
            assert min(image.size) == min(10, min(Image.open(io.BytesIO(before.image)).size))
    assert again.read(good.index(7)).image == source.read(7).image  # small enough already: not encoded again
    assert json.loads((tmp_path / "packed" / SIZES).read_text()) == {
        "000000.tar": 14, "000001.tar": 15, "000002.tar": 10}
    assert content(tmp_path / "packed") == content_of_one_process(source, tmp_path / "alone")


def test_without_a_side_jpeg_and_png_stay_as_they_are(source: Source, tmp_path: Path) -> None:
    write_small(source, tmp_path / "packed", side=None)
    again = open_source(str(tmp_path / "packed"))
    assert [again.read(index).image for index in range(3)] == [source.read(index).image for index in range(3)]


def test_labels_tags_and_concepts_come_along(tmp_path: Path) -> None:
    fields = {"captions": ["a", "b"], "tags": ["t", "u"], "label": "7", "concept": "c"}
    with tarfile.open(tmp_path / "raw.tar", "w") as archive:
        for name, content in (("0.png", encode(picture(0))), ("0.json", json.dumps(fields).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    write_small(open_source(str(tmp_path / "raw.tar")), tmp_path / "packed")
    sample = open_source(str(tmp_path / "packed")).read(0)
    assert (sample.captions, sample.tags, sample.label, sample.concept) == (("a", "b"), ("t", "u"), "7", "c")


class StoppedError(Exception):
    pass


def test_an_interrupted_call_continues(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "packed"
    original, read = packing.shrink, 0

    def stop_late(*args: Any) -> bytes:
        nonlocal read
        read += 1
        if read > 20:
            raise StoppedError
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(packing, "shrink", stop_late)
        with pytest.raises(StoppedError):
            write_small(source, folder)
    assert [path.name for path in folder.glob("*.tar")] == ["000000.tar"]
    assert not list(folder.glob("*.part"))
    first = (folder / "000000.tar").stat().st_mtime_ns
    assert write_small(source, folder) == write_small(source, tmp_path / "alone")
    assert (folder / "000000.tar").stat().st_mtime_ns == first
    assert content(folder) == content(tmp_path / "alone")


def test_what_a_crash_cut_off_is_dropped(source: Source, tmp_path: Path) -> None:
    whole = content_of_one_process(source, tmp_path / "packed")
    for name in ("000001.tar", "000002.tar", SIZES):
        (tmp_path / "packed" / name).unlink()
    (tmp_path / "packed/skipped.jsonl").write_text(whole["skipped.jsonl"].decode() + '{"shard": "000001.tar", "key"')
    (tmp_path / "packed/.000001.tar.0123456789ab.part").write_bytes(b"half")
    write_small(source, tmp_path / "packed")
    assert content(tmp_path / "packed") == whole


def test_files_of_the_folder_are_rewritten_once_whatever_the_number_of_shards(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: Counter[str] = Counter()
    original = packing.write_atomically
    monkeypatch.setattr(packing, "write_atomically", lambda path, text: (written.update([path.name]),
                                                                         original(path, text)))
    write_shards(source, tmp_path / "packed", shard_size=2, workers=0)
    assert len(list((tmp_path / "packed").glob("*.tar"))) == 20
    assert max(written.values()) == 1


def test_a_full_disk_is_reported_and_finished_shards_stay(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tarfile.TarFile.addfile
    added = 0

    def fail_late(self: tarfile.TarFile, *args: Any) -> None:
        nonlocal added
        added += 1
        if added > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(tarfile.TarFile, "addfile", fail_late)
        with pytest.raises(DataError, match="the disk is full; finished shards stay"):
            write_small(source, tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed").glob("*.tar")] == ["000000.tar"]
    assert write_small(source, tmp_path / "packed") == 39


def test_other_options_do_not_mix(source: Source, tmp_path: Path) -> None:
    write_small(source, tmp_path / "packed")
    with pytest.raises(ConfigError, match="was begun with another value of side"):
        write_small(source, tmp_path / "packed", side=12)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.tar").touch()
    with pytest.raises(ConfigError, match="holds shards that `aclip data pack` did not write"):
        write_small(source, tmp_path / "foreign")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_mixed_folder(tmp_path / "mixed")
    skip, output = tmp_path / "skip.txt", tmp_path / "packed"
    skip.write_text("good_000.png\ngood_001.png\n")
    assert data.pack(str(folder), output=str(output), leave_out=str(skip), workers=0) == output
    out = " ".join(capsys.readouterr().out.split())
    assert f"{len(SKIPPED)} bad samples were skipped" in out
    assert f"done. {112 - 2 - len(SKIPPED)} of 112 samples" in out
    skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert {record["key"] for record in skipped} == set(SKIPPED)
    skip.write_text("nobody.png\n")
    with pytest.raises(ConfigError, match=r"has no sample 'nobody\.png' to leave out"):
        data.pack(str(folder), output=str(output), leave_out=str(skip))
    for options, said in (({"quality": 96}, "quality must be 1 to 95, not 96"), ({"workers": -1}, "workers must be 0")):
        with pytest.raises(ConfigError, match=said):
            data.pack(str(folder), output=str(output), **options)  # type: ignore[arg-type]


def test_several_sources_are_packed_one_after_the_other(pair_folder: Path, tmp_path: Path) -> None:
    parts = [f"{pair_folder}[:3]", f"{pair_folder}[5:7]"]
    packed = open_source(str(data.pack(parts, output=str(tmp_path / "p"), workers=0)))
    assert [packed.captions(index)[0] for index in range(5)] == [f"picture {number}" for number in (0, 1, 2, 5, 6)]
    for wrong in ([], [f"{pair_folder}=2", f"{pair_folder}=1"]):
        with pytest.raises(ConfigError, match="name what to pack, without weights"):
            data.pack(wrong, output=str(tmp_path / "q"))
