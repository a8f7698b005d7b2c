"""Packed shards: the same pairs, smaller, whole or not at all, whatever interrupts them."""

import errno
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aclip.cli import main
from aclip.data import open_source
from aclip.data.pack import Packed, PackSettings, pack
from aclip.data.sources import Source
from aclip.data.sources.shard_index import SIZES
from aclip.errors import ConfigError, DataError
from bad_samples import SKIPPED, make_mixed_folder
from made_pictures import encode, picture

SMALL = PackSettings(side=10, shard_size=15)


@pytest.fixture
def source(pair_folder: Path) -> Source:
    (pair_folder / "003.png").write_bytes(b"")
    (pair_folder / "007.png").rename(pair_folder / "007.jpg")
    (pair_folder / "007.jpg").write_bytes(encode(picture(7, 9), "JPEG"))
    (pair_folder / "008.txt").write_text("one\ntwo\n")
    return open_source(str(pair_folder))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_pairs_but_smaller(source: Source, tmp_path: Path, workers: int) -> None:
    packed = pack(source, tmp_path / "packed", SMALL, workers=workers)
    again = open_source(str(tmp_path / "packed"))
    assert packed == Packed(39, 1, 0, sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.tar")))
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


def content_of_one_process(source: Source, folder: Path) -> dict[str, bytes]:
    pack(source, folder, SMALL)
    return content(folder)


def test_labels_tags_and_concepts_come_along(tmp_path: Path) -> None:
    fields = {"captions": ["a", "b"], "tags": ["t", "u"], "label": "7", "concept": "c"}
    with tarfile.open(tmp_path / "raw.tar", "w") as archive:
        for name, data in (("0.png", encode(picture(0))), ("0.json", json.dumps(fields).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    pack(open_source(str(tmp_path / "raw.tar")), tmp_path / "packed", SMALL)
    sample = open_source(str(tmp_path / "packed")).read(0)
    assert (sample.captions, sample.tags, sample.label, sample.concept) == (("a", "b"), ("t", "u"), "7", "c")


class StoppedError(Exception):
    pass


def test_an_interrupted_call_goes_on(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    done = 0

    def stop_late(samples: int) -> None:
        nonlocal done
        done += samples
        if done > 20:
            raise StoppedError

    with pytest.raises(StoppedError):
        pack(source, folder, SMALL, progress=stop_late)
    assert [path.name for path in folder.glob("*.tar")] == ["000000.tar"]
    assert not list(folder.glob(".*"))
    first = (folder / "000000.tar").stat().st_mtime_ns
    assert pack(source, folder, SMALL).samples == 39
    assert (folder / "000000.tar").stat().st_mtime_ns == first
    assert content(folder) == content_of_one_process(source, tmp_path / "alone")


def test_a_full_disk_is_said_and_finished_shards_stay(
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
        with pytest.raises(DataError, match="the disk is full; the finished shards stay"):
            pack(source, tmp_path / "packed", SMALL)
    assert [path.name for path in (tmp_path / "packed").glob("*.tar")] == ["000000.tar"]
    assert pack(source, tmp_path / "packed", SMALL).samples == 39


def test_other_settings_do_not_mix(source: Source, tmp_path: Path) -> None:
    pack(source, tmp_path / "packed", SMALL)
    with pytest.raises(ConfigError, match=r"was begun with other settings \(side\)"):
        pack(source, tmp_path / "packed", PackSettings(side=12, shard_size=15))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.tar").touch()
    with pytest.raises(ConfigError, match="holds shards that were not packed here"):
        pack(source, tmp_path / "foreign", SMALL)
    with pytest.raises(ConfigError, match="quality must be 1 to 95, not 96"):
        PackSettings(quality=96)


def test_as_a_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_mixed_folder(tmp_path / "mixed")
    skip = tmp_path / "skip.txt"
    skip.write_text("good_000.png\ngood_001.png\n")
    command = ["data", "pack", str(folder), "--output", str(tmp_path / "p"), "--leave-out", str(skip), "--workers", "1"]
    assert main(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{len(SKIPPED)} bad samples are not in it" in out
    assert f"done. {112 - 2 - len(SKIPPED)} of 112 samples" in out
    skipped = [json.loads(line) for line in (tmp_path / "p" / "skipped.jsonl").read_text().splitlines()]
    assert {record["key"] for record in skipped} == set(SKIPPED)
    skip.write_text("nobody.png\n")
    assert main(command) != 0
    assert "has no sample 'nobody.png' that could be left out" in capsys.readouterr().err
