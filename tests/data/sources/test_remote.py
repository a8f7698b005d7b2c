"""Remote shards: fsspec's memory and local files, and a real HTTP server that misbehaves on demand."""

import http.server
import io
import json
import logging
import pickle
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from aclip.data import CaptionTokenizer, PairDataset, build_loader, token_frequencies
from aclip.data.sources import RemoteShardSource, Source, open_source, remote
from aclip.errors import BadSampleError, DataError
from aclip.files import cache_root
from made_pictures import WholePicture, WordTokenizer, encode, picture


def shard(number: int, samples: int = 3, size: int = 500) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for n in range(samples):
            for name, data in ((f"{n}.jpg", bytes([number, n]) * size), (f"{n}.txt", b"s%d n%d" % (number, n))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


class Clock:
    """Time that passes in waits alone."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    time_ns = staticmethod(time.time_ns)


@pytest.fixture(autouse=True)
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Clock:
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    clock = Clock()
    monkeypatch.setattr(remote, "time", clock)
    monkeypatch.setattr(remote, "TIMEOUT", 0.5 if "stall" in request.node.name else 30.0)
    monkeypatch.setattr(fsspec.get_filesystem_class("http"), "cachable", False)  # the time limit changes here
    return clock


class Server:
    """A server on loopback; `faults` says per path how many of the next answers go wrong, and how; until `down_until`
    every request fails, and so do the next `failing` ones."""

    def __init__(self, files: dict[str, bytes], clock: Clock) -> None:
        self.files = files
        self.down_until = 0.0
        self.failing = 0
        self.faults: dict[str, list[str]] = {}
        self.asked: Counter[str] = Counter()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                data = server.files.get(self.path)
                server.failing -= 1
                if clock.now < server.down_until or server.failing >= 0:
                    self.send_error(503)
                    return
                if data is None:
                    self.send_error(404)
                    return
                if body:
                    server.asked[self.path] += 1
                fault = server.faults.get(self.path, [])
                what = fault.pop(0) if fault and body else ""
                if what == "error":
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if not body:
                    return
                if what == "drop":
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                    return
                if what == "stall":
                    self.wfile.write(data[:100])
                    self.wfile.flush()
                    time.sleep(1.5)
                    return
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(clock: Clock) -> Iterator[Server]:
    running = Server({f"/{n:02}.tar": shard(n) for n in range(12)}, clock)
    yield running
    running.stop()


def captions(source: Source) -> list[str]:
    return [source.read(index).captions[0] for index in range(len(source))]


ALL = [f"s{shard} n{n}" for shard in range(12) for n in range(3)]


@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("pattern", ["{00..11}.tar", "*.tar"])
def test_stores_of_fsspec(tmp_path: Path, kind: str, pattern: str) -> None:
    place = f"{kind}://{tmp_path}/store"
    store = fsspec.filesystem(kind)
    store.makedirs(f"{tmp_path}/store", exist_ok=True)
    for n in range(12):
        store.pipe_file(f"{tmp_path}/store/{n:02}.tar", shard(n))
    source = RemoteShardSource("some", remote.expand_urls(f"{place}/{pattern}"))
    assert source.groups == (3,) * 12
    assert captions(pickle.loads(pickle.dumps(source))) == ALL
    assert source.read(4).image == bytes([1, 1]) * 500
    assert source.name(4) == source.read(4).name == "01.tar: sample 2"
    assert source.captions(4) == ("s1 n1",)
    with pytest.raises(DataError, match=r"no such file|cannot be listed"):
        open_source(f"{place}/nothing-*.tar")


def test_every_shard_is_fetched_once_and_counted_once(server: Server) -> None:
    source = open_source(f"{server.url}/{{00..11}}.tar")
    assert captions(source) == ALL
    assert sorted(source.order(0, 0)[0].tolist()) == list(range(36))
    assert set(server.asked.values()) == {1}
    again = open_source(f"{server.url}/{{00..11}}.tar")
    assert captions(again) == ALL
    assert set(server.asked.values()) == {1}


def test_sizes_beside_the_shards_save_the_counting(server: Server) -> None:
    server.files["/sizes.json"] = json.dumps({f"{n:02}.tar": 3 + (n == 5) for n in range(12)}).encode()
    source = open_source(f"{server.url}/{{00..11}}.tar")
    assert len(source) == 37
    assert [path for path in server.asked if path.endswith(".tar")] == []
    assert source.read(0).captions == ("s0 n0",)
    with pytest.raises(BadSampleError, match="holds 3 samples, 4 when it was counted"):
        source.read(18)


@pytest.mark.parametrize("fault", ["error", "drop", "stall"])
def test_a_passing_fault_is_retried(server: Server, fault: str) -> None:
    server.faults["/00.tar"] = [fault, fault]
    assert captions(open_source(f"{server.url}/00.tar")) == ALL[:3]
    assert server.asked["/00.tar"] == 3


@pytest.mark.parametrize("fault", ["error", "drop", "stall"])
def test_a_shard_that_stays_out_of_reach_is_left_out_and_named(
    server: Server, fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults["/03.tar"] = [fault] * 99
    if fault == "stall":
        monkeypatch.setattr(remote, "PATIENCE", 2.0)  # each stall takes real time
    with caplog.at_level(logging.WARNING, logger="aclip"):
        source = open_source(f"{server.url}/{{00..11}}.tar")
    assert captions(source) == [caption for caption in ALL if not caption.startswith("s3 ")]
    assert f"a shard of {server.url}/{{00..11}}.tar is left out: {server.url}/03.tar cannot be fetched" in caplog.text


def test_too_many_lost_shards_are_an_error(server: Server) -> None:
    del server.files["/03.tar"], server.files["/04.tar"]
    with pytest.raises(DataError, match=r"2 of the 12 shards of .* cannot be used, and at most 10% may be lost"):
        open_source(f"{server.url}/{{00..11}}.tar")
    with pytest.raises(DataError, match=r"03\.tar cannot be fetched: there is no such file"):
        open_source(f"{server.url}/03.tar")


def test_shards_that_go_while_training(server: Server, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WINDOW", 1)
    source = open_source(f"{server.url}/{{00..11}}.tar")
    empty_cache()
    del server.files["/00.tar"], server.files["/01.tar"]
    for index in (0, 2):
        with pytest.raises(BadSampleError, match=r"00\.tar cannot be fetched: there is no such file"):
            source.read(index)
    assert server.asked["/00.tar"] == 1  # once when it was counted, and not again for every sample
    assert source.read(9).captions == ("s3 n0",)
    with pytest.raises(DataError, match="2 of the 12 shards of"):
        source.read(3)
    server.files["/00.tar"] = shard(0)
    with pytest.raises(BadSampleError, match="there is no such file"):
        source.read(0)
    clock.sleep(remote.RETRY_AFTER)
    assert source.read(0).captions == ("s0 n0",)  # a shard that is back is used again


def test_the_cache_keeps_its_size(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(shard(0))
    monkeypatch.setenv("ACLIP_CACHE_GB", str(4.5 * size / 1e9))
    source = open_source(f"{server.url}/{{00..11}}.tar")
    assert captions(source) == ALL
    kept = [path for kind in ("shards", "index") for path in (cache_root() / kind).iterdir() if path.suffix != ".lock"]
    assert 1 <= sum(path.suffix == ".tar" for path in kept) <= 4
    assert sum(path.stat().st_size for path in kept) <= 4.5 * size
    assert captions(source) == ALL  # what was dropped is fetched again


def test_a_cache_size_that_is_no_number(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACLIP_CACHE_GB", "much")
    with pytest.raises(DataError, match="ACLIP_CACHE_GB must be a number of gigabytes, not 'much'"):
        open_source(f"{server.url}/00.tar")


def test_addresses_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fsspec does not know the protocol 'nosuch://'"):
        open_source("nosuch://a/b.tar")
    with pytest.raises(DataError, match=r"'http://x/pairs\.csv' cannot be read remotely"):
        open_source("http://x/pairs.csv")
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(DataError, match="no room for"):
        open_source("memory://x.tar")


def empty_cache() -> None:
    for path in (cache_root() / "shards").glob("*.tar"):
        path.unlink()


# ------------------------------------------------------------------------------------------- failing stores


@pytest.mark.parametrize("seconds", [25, 60, 240])
def test_a_store_that_is_down_for_minutes_ends_no_run(server: Server, clock: Clock, seconds: float) -> None:
    source = open_source(f"{server.url}/{{00..11}}.tar")
    empty_cache()
    assert source.read(0).captions == ("s0 n0",)
    server.down_until = clock.now + seconds
    assert captions(source) == ALL
    assert clock.now >= server.down_until


def test_a_store_that_stays_down_loses_its_shards_one_by_one(server: Server, clock: Clock) -> None:
    source = open_source(f"{server.url}/{{00..11}}.tar")
    empty_cache()
    begun = clock.now
    server.down_until = begun + 1e9
    with pytest.raises(BadSampleError, match=r"00\.tar cannot be fetched: 503"):
        source.read(0)
    assert remote.PATIENCE <= clock.now - begun <= 2 * remote.PATIENCE
    server.down_until = clock.now  # lost shards are out of the way for a while, the rest is read
    assert source.read(3).captions == ("s1 n0",)


def test_a_store_that_is_down_at_opening_gives_every_rank_the_same_source(server: Server, clock: Clock) -> None:
    server.files["/sizes.json"] = json.dumps({f"{n:02}.tar": 3 for n in range(12)}).encode()
    first = open_source(f"{server.url}/{{00..11}}.tar")
    server.down_until = clock.now + 60
    second = open_source(f"{server.url}/{{00..11}}.tar")
    assert second.digest() == first.digest()
    assert [path for path in server.asked if path.endswith(".tar")] == []  # nothing was counted instead
    assert open_source(f"{server.url}/{{00..10}}.tar").digest() != first.digest()
    server.down_until = clock.now + 1e9
    with pytest.raises(DataError, match=r"sizes\.json cannot be fetched: 503"):
        open_source(f"{server.url}/{{00..11}}.tar")


# ------------------------------------------------------------------------------------------- cache


def test_there_is_one_index_for_each_address_whatever_is_fetched_again(server: Server) -> None:
    source = open_source(f"{server.url}/{{00..11}}.tar")
    for _ in range(3):
        empty_cache()
        assert captions(source) == ALL
    assert len(list((cache_root() / "index").iterdir())) == 12


def test_a_shard_that_changed_is_indexed_anew(server: Server) -> None:
    source = open_source(f"{server.url}/00.tar")
    empty_cache()
    server.files["/00.tar"] = shard(0, samples=3, size=200)
    again = open_source(f"{server.url}/00.tar")
    assert [again.read(n).image for n in range(3)] == [bytes([0, n]) * 200 for n in range(3)]
    empty_cache()
    server.files["/00.tar"] = shard(0, samples=2)
    with pytest.raises(BadSampleError, match="holds 2 samples, 3 when it was counted"):
        open_source(f"{server.url}/00.tar").read(2)
    assert source.read(1).captions == ("s0 n1",)


def test_namesakes_in_two_folders_have_names_of_their_own(server: Server) -> None:
    server.files |= {f"/{folder}/00.tar": shard(number) for number, folder in enumerate(("cc3m", "cc12m"))}
    source = open_source(f"{server.url}/{{cc3m,cc12m}}/00.tar")
    assert [source.name(index) for index in (0, 3)] == ["cc3m/00.tar: sample 1", "cc12m/00.tar: sample 1"]


# ------------------------------------------------------------------------------------------- training


@pytest.fixture
def photos(server: Server) -> Server:
    """Twenty shards of five pairs, with a bad sample in every other one."""
    server.files.clear()
    for number in range(20):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for n in range(5):
                image = b"bad" if number % 2 and n == 3 else encode(picture(5 * number + n, 8))
                for name, data in ((f"{n}.png", image), (f"{n}.txt", b"a caption")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        server.files[f"/{number:02}.tar"] = file.getvalue()
    server.files["/sizes.json"] = json.dumps({f"{n:02}.tar": 5 for n in range(20)}).encode()
    return server


def test_training_is_exact_over_workers_and_ranks_while_the_store_fails(photos: Server) -> None:
    source = open_source(f"{photos.url}/{{00..19}}.tar")
    views = WholePicture()
    data = PairDataset(source, views, CaptionTokenizer(WordTokenizer()), sizes={"a": (4, 4)}, seed=3)

    def steps(workers: int = 0, start: int = 0, ranks: int = 1) -> list[list[tuple[str, int, int]]]:
        empty_cache()
        loaders = [build_loader(data, batch_size=10, total_steps=20, start_step=start, workers=workers, rank=rank,
                                world_size=ranks) for rank in range(ranks)]  # fmt: skip
        return [[row for batch in step for row in zip(batch.keys, batch.seeds.tolist(),
                                                      batch.views["a"].pixels.sum(dim=(1, 2, 3)).tolist(), strict=True)]
                for step in zip(*loaders, strict=True)]  # fmt: skip

    whole = steps()
    assert len(whole) == 20
    assert max(photos.asked[f"/{n:02}.tar"] for n in range(20)) <= 2  # bad samples fetch nothing
    for workers, start, ranks in ((0, 7, 2), (1, 0, 1), (3, 3, 2)):
        photos.failing = 9
        photos.faults = {f"/{n:02}.tar": ["drop", "error"] for n in range(0, 20, 3)}
        assert steps(workers, start, ranks) == whole[start:]


def test_bad_samples_fetch_no_further_shards(photos: Server) -> None:
    source = open_source(f"{photos.url}/{{00..19}}.tar")
    data = PairDataset(source, WholePicture(), CaptionTokenizer(WordTokenizer()), sizes={"a": (4, 4)}, seed=3)
    read = build_loader(data, batch_size=10, total_steps=4)  # forty places: the first window of eight shards
    assert sum(len(batch.skipped) for batch in read) > 0
    assert sum(photos.asked[f"/{n:02}.tar"] for n in range(20)) == 8


def test_words_are_counted_on_the_shards_that_training_reads_first(photos: Server) -> None:
    source = open_source(f"{photos.url}/{{00..19}}.tar")
    token_frequencies(source, CaptionTokenizer(WordTokenizer()), 1000, seed=3, limit=90)
    counted = set(photos.asked)
    data = PairDataset(source, WholePicture(), CaptionTokenizer(WordTokenizer()), sizes={"a": (4, 4)}, seed=3)
    assert len(list(build_loader(data, batch_size=10, total_steps=4))) == 4
    assert counted == set(photos.asked)
    assert len(counted) == 8 + 1  # the first window, and the sizes
