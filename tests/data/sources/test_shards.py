"""WebDataset shards: what groups into a sample, and what happens when a shard is broken."""

import io
import json
import logging
import pickle
import tarfile
from pathlib import Path

import pytest

from aclip import dist
from aclip.data.sources import ShardSource, open_source, shard_index, shards
from aclip.data.sources.shard_index import cached_index, index_shard
from aclip.errors import BadSampleError, DataError
from made_pictures import encode, picture


def write_tar(path: Path, members: dict[str, bytes], **options: object) -> Path:
    with tarfile.open(path, **{"mode": "w", **options}) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def keys(source: ShardSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def pairs(source: ShardSource) -> list[tuple[str, bytes, tuple[str, ...]]]:
    samples = [source.read(index) for index in range(len(source))]
    assert [sample.name for sample in samples] == keys(source)
    assert [source.captions(index) for index in range(len(source))] == [sample.captions for sample in samples]
    return [(sample.name.partition("/")[2], sample.image, sample.captions) for sample in samples]


def test_members_of_one_name_are_one_sample(tmp_path: Path) -> None:
    members = {
        "a/0.jpg": b"left",
        "a/0.txt": b"one\ntwo\n",
        "b/0.png": b"other folder",
        "b/0.json": json.dumps({"caption": "three", "tags": ["x", 5, "y"], "label": 7}).encode(),
        "1.json": json.dumps({"captions": ["four", "five"], "label": "json", "concept": 4}).encode(),
        "a/0.png": b"second image",
        "1.WebP": b"webp",
        "1.cls": b"12\n",
        "2.jpg": b"no caption",
        "notes.md": b"# not a sample",
    }
    source = open_source(str(write_tar(tmp_path / "s.tar", members)))
    assert keys(source) == ["s.tar/a/0", "s.tar/b/0", "s.tar/1", "s.tar/2"]
    samples = [source.read(index) for index in range(4)]
    assert [sample.image for sample in samples] == [b"left", b"other folder", b"webp", b"no caption"]
    assert [sample.captions for sample in samples] == [("one", "two"), ("three",), ("four", "five"), ()]
    assert [sample.label for sample in samples] == [None, "7", "12", None]
    assert [sample.concept for sample in samples] == [None, None, "4", None]
    assert samples[1].tags == ("x", "5", "y")


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, tar_format: int) -> None:
    name = "ordner/" * 12 + "schildkröte-" * 3 + "漢字"
    path = write_tar(tmp_path / "s.tar", {f"{name}.jpg": b"image"}, format=tar_format)
    source = open_source(str(path))
    assert keys(source) == [f"s.tar/{name}"]
    assert source.read(0).image == b"image"


def test_only_regular_files_count_and_names_are_not_paths(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.jpg")
            member.type = kind
            member.linkname = "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("../../escape.jpg")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"data"))
    source = open_source(str(path))
    assert keys(source) == ["s.tar/../../escape"]
    assert source.read(0).image == b"data"
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.tar"]


def test_samples_that_are_bad_on_their_own(tmp_path: Path) -> None:
    members = {
        "0.txt": b"a caption alone",
        "1.jpg": b"x", "1.json": b"{broken",
        "2.jpg": b"x", "2.json": b"[1, 2]",
        "3.jpg": b"x", "3.json": b"[" * 100_000,
        "4.jpg": b"x", "4.txt": b" \n",
    }  # fmt: skip
    source = open_source(str(write_tar(tmp_path / "s.tar", members)))
    broken = "JSON that cannot be read"
    for index, reason in enumerate(("no image in the shard", broken, "JSON that is not an object", broken)):
        with pytest.raises(BadSampleError, match=reason):
            source.read(index)
    assert source.read(4).captions == ("",)


def test_patterns(tmp_path: Path) -> None:
    for number in (8, 9, 10):
        write_tar(tmp_path / f"train-{number:04}.tar", {f"{number}.jpg": b"x"})
    expected = [f"train-{number:04}.tar/{number}" for number in (8, 9, 10)]
    for pattern in ("train-{0008..0010}.tar", "train-*.tar", "train-{0008,0009,0010}.tar", ""):
        assert keys(open_source(str(tmp_path / pattern))) == expected
    listed_twice = open_source(str(tmp_path / "{train,train}-{0009..0010}.tar"))
    assert keys(listed_twice) == expected[1:]
    with pytest.raises(DataError, match=r"no such file: .*train-0011\.tar \(2 missing, 3 found"):
        open_source(str(tmp_path / "train-{0008..0012}.tar"))
    with pytest.raises(DataError, match="no such file"):
        open_source(str(tmp_path / "eval-*.tar"))


def test_reading_is_random_access_over_shards_and_survives_pickling(tmp_path: Path) -> None:
    for shard in range(3):
        members = {f"{shard}{n}.png": encode(picture(10 * shard + n)) for n in range(4)}
        write_tar(tmp_path / f"{shard}.tar", members)
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path))))
    for index in (11, 0, 5, 5, 3):
        assert source.read(index).image == encode(picture(10 * (index // 4) + index % 4))


def damaged(path: Path, kind: str) -> int:
    """Damage a shard of four samples; return how many can still be read."""
    data = bytearray(path.read_bytes())
    third, fourth = data.index(b"2.png"), data.index(b"3.png")
    if kind == "cut in an image":
        del data[third + 700 :]
        survivors = 2
    elif kind == "cut in a header":
        del data[fourth + 100 :]
        survivors = 3
    elif kind == "no end":
        del data[fourth + 512 + 2048 :]
        survivors = 4
    else:
        data[third : third + 512] = b"?" * 512
        survivors = 2
    path.write_bytes(data)
    return survivors


@pytest.mark.parametrize("kind", ["cut in an image", "cut in a header", "no end", "garbage"])
def test_the_readable_part_of_a_damaged_shard_is_used(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "s.tar", {f"{n}.png": bytes([n]) * 2048 for n in range(4)})
    survivors = damaged(path, kind)
    with caplog.at_level(logging.WARNING, logger="aclip"):
        source = open_source(str(path))
    images = [source.read(index).image for index in range(len(source))]
    assert images == [bytes([n]) * 2048 for n in range(survivors)]
    assert f"{path} is damaged" in caplog.text
    assert f"its first {survivors} samples are used" in caplog.text


def test_a_whole_shard_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_source(str(write_tar(tmp_path / "s.tar", {"0.png": b"x"})))
    assert caplog.text == ""


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("not a tar file " * 100)
    (tmp_path / "empty.tar").touch()
    write_tar(tmp_path / "zipped.tar", {"0.png": b"x"}, mode="w:gz")
    write_tar(tmp_path / "barren.tar", {"readme.md": b"x"})
    for name, sentence in (
        ("text", "text.tar is not a tar file"),
        ("empty", "empty.tar is not a tar file"),
        ("zipped", r"zipped.tar is compressed, .* unpack it"),
        ("barren", "no samples in .*barren.tar"),
    ):
        with pytest.raises(DataError, match=sentence):
            open_source(str(tmp_path / f"{name}.tar"))


def test_a_shard_that_shrinks_later_gives_bad_samples(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"0.png": b"x" * 5000})
    source = open_source(str(path))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BadSampleError, match="truncated since it was opened"):
        source.read(0)
    path.unlink()
    with pytest.raises(BadSampleError, match=r"cannot read s\.tar: No such file"):
        source.read(0)


def test_an_index_is_read_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    read: list[Path] = []
    original = shard_index._read_headers
    monkeypatch.setattr(shard_index, "_read_headers", lambda path: read.append(path) or original(path))
    path = write_tar(tmp_path / "s.tar", {f"ä{n}.png": bytes([n]) for n in range(3)})
    first = open_source(str(path))
    kept = next((tmp_path / "cache" / "index").iterdir())
    again = open_source(str(path))
    assert read == [path]
    assert keys(again) == keys(first) == ["s.tar/ä0", "s.tar/ä1", "s.tar/ä2"]
    assert [again.read(n).image for n in range(3)] == [b"\0", b"\1", b"\2"]
    for damage in (b"", b"rubbish", kept.read_bytes()[:-30]):
        kept.write_bytes(damage)
        assert keys(open_source(str(path))) == keys(first)
    assert len(read) == 4
    write_tar(path, {"new.png": b"x"})
    assert keys(open_source(str(path))) == ["s.tar/new"]
    assert list((tmp_path / "cache" / "index").iterdir()) == [kept]  # one index for each path, whatever became of it


def test_without_a_place_for_the_index_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "file"))
    assert len(open_source(str(write_tar(tmp_path / "s.tar", {"0.png": b"x"})))) == 1


def test_members_that_repeat_a_name_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "s.tar"
    members = [("0.jpg", b"first"), ("1.jpg", b"x"), ("0.jpg", b"second"), ("1.txt", b"far"), ("0.txt", b"c")]
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    source = open_source(str(path))
    assert "has 1 members that repeat a name: the first of each is used" in caplog.text
    assert (source.read(0).image, source.read(0).captions) == (b"first", ("c",))
    assert source.read(1).captions == ("far",)  # members of one sample may lie apart


def test_one_bad_shard_of_many_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(12):
        write_tar(tmp_path / f"{number:02}.tar", {"0.png": bytes([number])})
    (tmp_path / "05.tar").write_text("no tar file " * 99)
    source = open_source(str(tmp_path))
    assert [source.read(index).image[0] for index in range(len(source))] == [n for n in range(12) if n != 5]
    assert "is left out: " in caplog.text
    (tmp_path / "07.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of the 12 shards of .* cannot be used, and at most 10% may be lost"):
        open_source(str(tmp_path))


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    """Return one header block with a right checksum, whatever it says."""
    block = bytearray(512)
    for at, value in ((0, name), (100, b"0000644"), (124, size), (156, kind), (257, b"ustar\x0000")):
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


GOOD = header(b"0.png", b"00000000001", b"0") + b"x".ljust(512, b"\0")
HOSTILE = {
    "negative": header(b"1.png", b"\xff" * 10 + b"\xfe\0", b"0"),  # -512: back to this very header
    "negative by pax": header(b"p", b"00000000013", b"x") + b"13 size=-512\n".ljust(512, b"\0")
    + header(b"1.png", b"00000000000", b"0"),
    "vast": header(b"1.png", b"\x80" + b"\xff" * 11, b"0"),
    "vast name": header(b"././@LongLink", b"\x80" + b"\xff" * 11, b"L"),
    "chain": (header(b"././@LongLink", b"00000000001", b"L") + b"a".ljust(512, b"\0")) * 3000,
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_headers_made_to_harm(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(GOOD + HOSTILE[kind] + bytes(1024))
    source = open_source(str(path))
    assert source.read(0).image == b"x"
    assert f"{path} is damaged" in caplog.text
    path.write_bytes(HOSTILE[kind] + bytes(1024))
    with pytest.raises(DataError, match=r"is not a tar file|no samples in"):
        open_source(str(path))


def test_every_damage_to_a_kept_index_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    path = write_tar(tmp_path / "s.tar", {"0.png": b"x"})
    shard_index.index_shard(path)
    kept = next((tmp_path / "cache" / "index").iterdir())
    good = kept.read_bytes()
    for at in range(len(good)):
        for value in (1, 255):
            kept.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            index = cached_index(str(path))
            assert index is None or index.keys[0] == "0"


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """Nineteen shards of two images, one of which is not a tar file: as many as may be lost."""
    paths = [write_tar(tmp_path / f"{n}.tar", {f"{n}-{i}.jpg": f"{n}{i}".encode() for i in range(2)})
             for n in range(19)]
    paths[7].write_bytes(b"not a tar file at all")
    return paths


def test_many_processes_index_what_one_does(
    many: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MANY", 5)
    found = []
    for cores in (1, 3):
        monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / f"cache-{cores}"))
        monkeypatch.setattr(shards, "usable_cores", lambda cores=cores: cores)
        source = ShardSource("many", many)
        found.append([(source.name(i), source.read(i).image) for i in range(len(source))])
        assert len(list((tmp_path / f"cache-{cores}").rglob("*.npz"))) == 18
    assert found[0] == found[1]
    assert len(found[0]) == 36


def test_only_what_is_not_cached_is_handed_over(many: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading an index takes less than a worker's answer does."""
    for path in many[3:6]:
        index_shard(path)
    handed: list[str] = []
    monkeypatch.setattr(shards, "read_ahead", lambda read, paths, workers: (
        handed.append(path.stem) or read(path) for path in paths))
    source = ShardSource("many", [*many, many[0]])
    assert [source.name(i) for i in range(4, 12)] == [f"{n}.tar/{n}-{i}" for n in range(2, 6) for i in range(2)]
    assert len(source) == 36
    assert handed == [str(n) for n in range(19) if n not in (3, 4, 5)]


def test_each_rank_begins_with_another_part(many: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(shards, "index_shard", lambda path, endings: (
        read.append(path.stem), index_shard(path, endings))[1])
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    monkeypatch.setattr(dist, "rank", lambda: 2)
    source = ShardSource("many", many)
    assert read == [*map(str, range(9, 19)), *map(str, range(9))]
    monkeypatch.setattr(dist, "rank", lambda: 0)
    assert ShardSource("many", many).digest() == source.digest()


# --------------------------------------------------------------------------- what people call their members


@pytest.mark.parametrize(
    ("members", "expected", "said"),
    [
        # endings of several words (webdataset#237)
        ({"s.input.jpg": "S", "s.outputs.txt": "one", "t.input.jpg": "T", "t.outputs.txt": "two"},
         [("s", "S", "one"), ("t", "T", "two")], "images from .input.jpg"),
        # names with dots, some of them also without
        ({"22.00.jpg": "A", "22.00.txt": "one", "22.01.jpg": "B", "22.01.txt": "two"},
         [("22.00", "A", "one"), ("22.01", "B", "two")], ""),
        ({"22.jpg": "A", "22.json": '{"caption": "one"}', "22.1.jpg": "B", "22.1.json": '{"caption": "two"}'},
         [("22", "A", "one"), ("22.1", "B", "two")], ""),
        ({"v1.0.input.jpg": "A", "v1.0.output.txt": "one", "v1.5.input.jpg": "B", "v1.5.output.txt": "two"},
         [("v1.0", "A", "one"), ("v1.5", "B", "two")], "images from .input.jpg"),
        # what lies beside the image, before or behind it, with and without captions
        ({"0.depth.png": "D", "0.jpg": "A", "0.mask.png": "M", "0.txt": "one"}, [("0", "A", "one")],
         "2 left out (beside the image of their sample: .depth.png, .mask.png)"),
        ({"0.jpg": "A", "0.seg.png": "S", "1.jpg": "B", "1.seg.png": "S"}, [("0", "A", None), ("1", "B", None)],
         ".seg.png"),
        ({"0.rgb.png": "A", "0.depth.png": "D", "0.txt": "one"}, [("0", "A", "one")], "images from .rgb.png"),
        # several images that could be meant
        ({"0.left.jpg": "L", "0.right.jpg": "R", "0.txt": "one"}, [("0", "L", "one")],
         "choose with '?image=right.jpg'"),
        # img2dataset: JSON has the caption, too, and keeps line breaks
        ({"000000000.jpg": "A", "000000000.txt": "one\nstill one", "000000000.json": '{"caption": "one\\nstill one", '
          '"url": "http://x/y.jpg", "key": "000000000", "width": 9}'}, [("000000000", "A", "one\nstill one")], ""),
        ({"0.jpg": "A", "0.json": '{"text": 1984}', "1.jpg": "B", "1.json": '{"caption": ["two", "zwei"]}'},
         [("0", "A", "1984"), ("1", "B", "two", "zwei")], ""),
        ({"0.jpg": "A", "0.txt": "one", "0.json": '{"url": "x"}'}, [("0", "A", "one")], ""),
        ({"0.jpg": "A", "0.txt": "one", "0.json": "{broken"}, [("0", "A", "one")], ""),
        # a choice that is said
        ({"0.jpg": "A", "0.txt": "one\ntwo"}, [("0", "A", "one", "two")], "'?captions=whole' takes the lines together"),
        ({"0.jpg": "A", "0.json": '{"blip": "one", "url": "x"}'}, [("0", "A")],
         "no caption in the JSON, whose texts are blip, url: choose one with '?caption=FIELD'"),
        # archives of a folder, and of a Mac
        ({"./a/0.jpg": "A", "./a/0.txt": "one", "./a/._0.jpg": "?", "./a/.DS_Store": "?"}, [("a/0", "A", "one")], ""),
        ({"0.JPG": "A", "0.TXT": "one"}, [("0", "A", "one")], ""),
    ],
)  # fmt: skip
def test_members_are_understood(
    members: dict[str, str], expected: list[tuple[str, ...]], said: str, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "s.tar", {name: data.encode() for name, data in members.items()})
    source = ShardSource("s", [path])
    assert pairs(source) == [(name, image.encode(), tuple(c for c in captions if c is not None))
                             for name, image, *captions in expected]  # fmt: skip
    assert said in str(source.summary)
    if not said:
        assert str(source.summary).count(";") == 0
    summary = source.summary
    assert summary.found == summary.captioned + summary.uncaptioned + sum(summary.left_out.values())
    backwards = write_tar(tmp_path / "b.tar", {name: members[name].encode() for name in reversed(members)})
    assert sorted(pairs(ShardSource("b", [backwards]))) == sorted(pairs(source))


def test_endings_and_fields_can_be_chosen(tmp_path: Path) -> None:
    members = {"0.left.jpg": b"L", "0.right.jpg": b"R", "0.short.txt": b"short", "0.long.txt": b"long\nmore",
               "0.json": b'{"caption": "alt text", "blip": "a dog"}'}  # fmt: skip
    path = write_tar(tmp_path / "s.tar", members)

    def read(**chosen: str) -> tuple[bytes, tuple[str, ...]]:
        query = "&".join(f"{name}={value}" for name, value in chosen.items())
        sample = open_source(f"{path}?{query}" if query else str(path)).read(0)
        return sample.image, sample.captions

    assert read() == (b"L", ("alt text",))
    assert read(image="right.jpg", caption="short.txt") == (b"R", ("short",))
    assert read(image=".right.jpg", caption="long.txt", captions="whole") == (b"R", ("long\nmore",))
    assert read(caption="blip") == (b"L", ("a dog",))
    with pytest.raises(DataError, match=r"no image that is chosen, only \.left\.jpg, \.right\.jpg"):
        read(image="middle.jpg")
    assert read() == (b"L", ("alt text",))  # not the index that was cached for another choice


def test_numbers_are_captions_and_labels(tmp_path: Path) -> None:
    members = {"0.jpg": b"A", "0.json": b'{"caption": 1999, "label": 0.0}', "1.jpg": b"B", "1.json": b'{"label": 1.0}',
               "2.jpg": b"C", "2.cls": b"0\n", "2.txt": b"7"}  # fmt: skip
    source = ShardSource("s", [write_tar(tmp_path / "s.tar", members)])
    samples = [source.read(index) for index in range(3)]
    assert [(sample.captions, sample.label) for sample in samples] == [(("1999",), "0"), ((), "1"), (("7",), "0")]


def test_names_are_unique_over_folders(tmp_path: Path) -> None:
    for folder in ("cc3m", "cc12m"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "00000.tar", {"000.jpg": folder.encode()})
    source = open_source(f"{tmp_path}/{{cc3m,cc12m}}/00000.tar")
    assert keys(source) == ["cc3m/00000.tar/000", "cc12m/00000.tar/000"]
    assert source.digest() != open_source(f"{tmp_path}/{{cc12m,cc3m}}/00000.tar").digest()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "cc3m").rename(moved / "cc3m")
    (tmp_path / "cc12m").rename(moved / "cc12m")
    assert open_source(f"{moved}/{{cc3m,cc12m}}/00000.tar").digest() == source.digest()


def test_undecodable_names(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"caf\udce9.jpg": b"x", "caf\udce9.txt": b"a caption"})
    assert pairs(ShardSource("s", [path])) == [("caf\\udce9", b"x", ("a caption",))]
