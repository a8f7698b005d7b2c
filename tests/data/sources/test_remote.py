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

from aclip.data.order import order_of
from aclip.data.sources import Grouped, RemoteShardSource, Source, open_source, remote
from aclip.data.sources.shard_index import cache_folder
from aclip.errors import BadSampleError, DataError


def shard(number: int, samples: int = 3, size: int = 500) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for n in range(samples):
            for name, data in ((f"{n}.jpg", bytes([number, n]) * size), (f"{n}.txt", b"s%d n%d" % (number, n))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 0.5 if "stall" in request.node.name else 30.0)
    monkeypatch.setattr(fsspec.get_filesystem_class("http"), "cachable", False)  # the time limit changes here


class Server:
    """A server on loopback; `faults` says per path how many of the next answers go wrong, and how."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
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
def server() -> Iterator[Server]:
    running = Server({f"/{n:02}.tar": shard(n) for n in range(12)})
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
    source = open_source(f"{place}/{pattern}")
    assert isinstance(source, RemoteShardSource)
    assert isinstance(source, Grouped)
    assert source.groups == (3,) * 12
    assert captions(pickle.loads(pickle.dumps(source))) == ALL
    assert source.read(4).image == bytes([1, 1]) * 500
    assert source.key(4) == "01.tar: sample 2"
    with pytest.raises(DataError, match=r"no such file|cannot be listed"):
        open_source(f"{place}/nothing-*.tar")


def test_every_shard_is_fetched_once_and_counted_once(server: Server) -> None:
    source = open_source(f"{server.url}/{{00..11}}.tar")
    assert captions(source) == ALL
    assert sorted(order_of(source)(0, 0)[0].tolist()) == list(range(36))
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
    with pytest.raises(BadSampleError, match=r"holds 3 samples, not 4 as sizes\.json has it"):
        source.read(18)


@pytest.mark.parametrize("fault", ["error", "drop", "stall"])
def test_a_passing_fault_is_tried_again(server: Server, fault: str) -> None:
    server.faults["/00.tar"] = [fault, fault]
    assert captions(open_source(f"{server.url}/00.tar")) == ALL[:3]
    assert server.asked["/00.tar"] == 3


@pytest.mark.parametrize("fault", ["error", "drop", "stall"])
def test_a_shard_that_stays_out_of_reach_is_left_out_and_named(
    server: Server, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults["/03.tar"] = [fault] * 99
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


def test_shards_that_go_while_training(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WINDOW", 1)
    source = open_source(f"{server.url}/{{00..11}}.tar")
    for path in (cache_folder() / "shards").glob("*.tar"):
        path.unlink()
    del server.files["/00.tar"], server.files["/01.tar"]
    for index in (0, 2):
        with pytest.raises(BadSampleError, match=r"00\.tar cannot be fetched: there is no such file"):
            source.read(index)
    assert server.asked["/00.tar"] == 1  # once when it was counted, and not again for every sample
    assert source.read(9).captions == ("s3 n0",)
    with pytest.raises(DataError, match="2 of the 12 shards of"):
        source.read(3)


def test_the_cache_keeps_its_size(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(shard(0))
    monkeypatch.setenv("ACLIP_CACHE_GB", str(4.5 * size / 1e9))
    source = open_source(f"{server.url}/{{00..11}}.tar")
    assert captions(source) == ALL
    kept = [path for path in (cache_folder() / "shards").iterdir() if path.suffix != ".lock"]
    assert 1 <= len(kept) <= 4
    assert captions(source) == ALL  # what was dropped is fetched again


def test_a_cache_size_that_is_no_number(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACLIP_CACHE_GB", "much")
    with pytest.raises(DataError, match="ACLIP_CACHE_GB is a number of gigabytes, not 'much'"):
        open_source(f"{server.url}/00.tar")


def test_addresses_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'nosuch://' is no kind of address that fsspec knows"):
        open_source("nosuch://a/b.tar")
    with pytest.raises(DataError, match=r"'http://x/pairs\.csv' cannot be read from afar"):
        open_source("http://x/pairs.csv")
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(DataError, match="no room for"):
        open_source(f"file://{tmp_path}/x.tar")
