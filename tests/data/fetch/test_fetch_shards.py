"""Shards: bytes that depend on the samples alone, and a folder that knows what is done."""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from aclip.data.fetch.shards import ShardFolder, shuffled, split_sizes, tar_bytes
from aclip.data.tar_files import Sample
from aclip.files import write_atomically

TOOLS = {"drawer": "1"}
ONE = [Sample("a-1", {"png": b"picture", "json": b"{}", "txt": b"caption"})]
TWO = [Sample("b-2", {"png": b"other"})]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_shard_is_a_plain_tar_without_times_and_owners() -> None:
    with tarfile.open(fileobj=io.BytesIO(tar_bytes(ONE + TWO)), mode="r:") as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == ["a-1.json", "a-1.png", "a-1.txt", "b-2.png"]
        marks = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members}
        assert marks == {(0, 0, 0, "", "", 0o644)}
        stream = archive.extractfile("a-1.png")
        assert stream is not None
        assert stream.read() == b"picture"


def test_the_order_of_a_samples_members_does_not_matter() -> None:
    turned = [Sample("a-1", dict(reversed(ONE[0].members.items())))]
    assert tar_bytes(turned) == tar_bytes(ONE)


@pytest.mark.parametrize("key", ["", "a.b", "../a", "a/b", "a\\b"])
def test_a_key_that_readers_would_split_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        tar_bytes([Sample(key, {"txt": b""})])


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", b"first")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", b"second")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"first"


def build(folder: Path, origin: dict[str, int] | None = None) -> ShardFolder:
    shards = ShardFolder(folder, origin or {"version": 1})
    shards.resume(TOOLS)
    return shards


def finish(folder: Path) -> None:
    shards = build(folder)
    shards.add("train/0.tar", ONE, {})
    shards.add("val/0.tar", TWO, {"c-3": "why"})
    shards.finish({"splits": {"train": {"samples": 1}, "val": {"samples": 1}}})


def test_a_finished_folder_is_known_as_such(tmp_path: Path) -> None:
    assert not ShardFolder(tmp_path, {"version": 1}).is_finished()
    assert split_sizes(tmp_path) == {}
    finish(tmp_path)
    assert names(tmp_path) == ["dataset.json", "train/0.tar", "val/0.tar"]
    assert ShardFolder(tmp_path, {"version": 1}).is_finished()
    assert not ShardFolder(tmp_path, {"version": 2}).is_finished()
    assert split_sizes(tmp_path) == {"train": 1, "val": 1}
    assert json.loads((tmp_path / "dataset.json").read_bytes())["origin"] == {"version": 1}


@pytest.mark.parametrize("damage", ["gone", "shorter", "other bytes"])
def test_a_damaged_shard_is_noticed_and_alone_made_anew(damage: str, tmp_path: Path) -> None:
    finish(tmp_path)
    path = tmp_path / "train/0.tar"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-512] if damage == "shorter" else data[:-1] + b"!")
    assert not ShardFolder(tmp_path, {"version": 1}).is_finished()
    again = build(tmp_path)
    assert not again.has("train/0.tar")
    assert again.has("val/0.tar")
    assert again.skipped() == {"c-3": "why"}
    assert split_sizes(tmp_path) == {}


def test_an_interrupted_folder_keeps_its_whole_shards(tmp_path: Path) -> None:
    def cut() -> Iterator[Sample]:
        yield ONE[0]
        raise KeyboardInterrupt

    shards = build(tmp_path)
    shards.add("train/0.tar", ONE, {})
    with pytest.raises(KeyboardInterrupt):
        shards.add("train/1.tar", cut(), {})
    assert names(tmp_path) == ["progress.json", "train/0.tar"]
    again = build(tmp_path)
    assert again.has("train/0.tar")
    assert not again.has("train/1.tar")


def test_shards_of_another_origin_or_other_tools_are_not_mixed_in(tmp_path: Path) -> None:
    build(tmp_path).add("train/0.tar", ONE, {})
    assert not build(tmp_path, {"version": 2}).has("train/0.tar")
    build(tmp_path).add("train/0.tar", ONE, {})
    newer = ShardFolder(tmp_path, {"version": 1})
    newer.resume({"drawer": "2"})
    assert not newer.has("train/0.tar")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"origin": {"version": 1}, "tools": {}, "shards": {"a": {}}}']
)
def test_a_torn_state_file_means_nothing_is_done(text: str, tmp_path: Path) -> None:
    for name in ("dataset.json", "progress.json"):
        (tmp_path / name).write_text(text)
    assert not ShardFolder(tmp_path, {"version": 1}).is_finished()
    assert not build(tmp_path).has("a")
    assert split_sizes(tmp_path) == {}


class _Watch:
    def __init__(self) -> None:
        self.seen: list[object] = []

    def start(self, stage: str, total: int, unit: str) -> None:
        self.seen.append((stage, total, unit))

    def advance(self, amount: int, *, cached: bool = False) -> None:
        self.seen.append((amount, cached))


def test_fill_writes_each_split_in_shards_and_keeps_those_that_are_there(tmp_path: Path) -> None:
    splits = {"train": ["a", "b", "c"], "test": ["d"], "none": []}
    made: list[str] = []

    def samples(part: Sequence[str], skipped: dict[str, str]) -> Iterator[Sample]:
        for key in part:
            made.append(key)
            if key == "c":
                skipped[key] = "bad"
            else:
                yield Sample(key, {"txt": key.encode()})

    shards = ShardFolder(tmp_path, {"v": 1})
    shards.resume({})
    shards.add("train/000000.tar", [Sample("a", {"txt": b"a"}), Sample("b", {"txt": b"b"})], {})
    watch = _Watch()
    shards.fill(splits, samples, 2, "writing", watch)
    assert made == ["c", "d"]
    assert watch.seen == [("writing", 4, "pictures"), (2, True)]
    assert shards.skipped() == {"c": "bad"}
    assert sorted(path.name for path in tmp_path.rglob("*.tar")) == ["000000.tar", "000000.tar", "000001.tar"]


def test_the_order_of_samples_is_fixed_by_a_hash() -> None:
    # First 8 hex digits from `printf orderKEY | sha1sum`.
    assert shuffled("a") == (0xC8D45F50 / 2**32, "a")
    assert sorted("abc", key=shuffled) == sorted("cab", key=shuffled)
