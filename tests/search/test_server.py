"""The page: what it answers, what it refuses, ten users at a time, and how it ends."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import aclip
from aclip.cli import main
from aclip.search.store import Index
from made_pictures import encode, giant_png, picture

uvicorn = pytest.importorskip("uvicorn")

from aclip.search import server  # noqa: E402 - needs uvicorn

CAPTION = "<script>alert(1)</script> picture"


@pytest.fixture(scope="module")
def index(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("served")
    (folder / "secret.txt").write_text("secret")
    images = folder / "images"
    images.mkdir()
    for number in range(12):
        (images / f"{number:02}.png").write_bytes(encode(picture(number, 96)))
        (images / f"{number:02}.txt").write_text(f"{CAPTION} {number}")
    return aclip.index(model_folder, images, output=folder / "index", workers=0)


@contextmanager
def serving(index: Index, **options: Any) -> Iterator[int]:
    """Serve the page of an index in a thread, and yield its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(server.application(index, **options), log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(10)
        listening.close()


@pytest.fixture(scope="module")
def port(index: Index) -> Iterator[int]:
    with serving(index, check_host=True) as number:
        yield number


def ask(port: int, path: str, body: bytes | None = None, **headers: str) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, body, named)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def rows(answer: bytes) -> list[int]:
    return [hit["row"] for hit in json.loads(answer)["hits"]]


def test_texts_and_images_are_ranked_as_by_the_index(port: int, index: Index) -> None:
    assert rows(ask(port, "/api/search?text=a%20picture&top=5")[1]) == [
        hit.row for hit in index.search("a picture", top=5)]
    assert rows(ask(port, "/api/search?text=a%20picture&without=noise")[1]) == [
        hit.row for hit in index.search("a picture", not_="noise")]
    assert rows(ask(port, "/api/search?text=&top=3")[1]) == [0, 5, 11]
    expected = [hit.row for hit in index.search(picture(3, 96))]
    assert rows(ask(port, "/api/similar/3")[1]) == expected
    assert rows(ask(port, "/api/upload", encode(picture(3, 96)))[1]) == expected
    kept = rows(ask(port, "/api/similar/3?keep=0.25")[1])
    assert kept == rows(ask(port, "/api/upload?keep=0.25", encode(picture(3, 96)))[1])
    assert kept != expected
    assert json.loads(ask(port, "/api/search?text=picture&top=1")[1])["hits"][0]["caption"].startswith(CAPTION)


def test_images_are_shown_small_large_with_maps_and_patches(port: int) -> None:
    sizes = {}
    for path in ("/image/3", "/image/3?large", "/look/3?text=a%20picture", "/look/3?keep=0.25"):
        response, content = ask(port, path)
        assert response.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(content)) as image:
            sizes[path] = np.asarray(image)
    assert sizes["/image/3"].shape == sizes["/image/3?large"].shape == (96, 96, 3)
    assert sizes["/look/3?text=a%20picture"].shape == sizes["/look/3?keep=0.25"].shape
    assert not np.array_equal(sizes["/look/3?text=a%20picture"], sizes["/look/3?keep=0.25"])


def test_the_page_is_its_own_and_asks_nobody_else(port: int) -> None:
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        response, content = ask(port, path)
        assert response.status == 200
        assert response.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert b"://" not in content
    about = json.loads(ask(port, "/api/index")[1])
    assert about["facts"][0] == ["images", "12"]


@pytest.mark.parametrize("path", [
    "/image/12", "/image/-1", "/image/3/../../secret.txt", "/image/..%2f..%2fsecret.txt", "/../secret.txt",
    "/page/../../server.py", "/image//etc/passwd", "/%2e%2e/%2e%2e/secret.txt", "/look/99?text=x", "/api/similar/12",
    "/server.py", "/index.json", "/image/9999999999999999999999"])
def test_nothing_but_rows_of_the_index_can_be_reached(port: int, path: str) -> None:
    response, content = ask(port, path)
    assert response.status == 404
    assert b"secret" not in content


@pytest.mark.parametrize(("body", "status", "message"), [
    (b"torn", 400, "not an image in a known format"),
    (giant_png(), 400, "image too large"),
    (b"", 400, "empty file"),
    (bytes(server.MAX_UPLOAD + 1), 413, "images of up to 20 MB"),
])
def test_uploads_that_are_no_images_or_too_large_are_refused(
    port: int, body: bytes, status: int, message: str
) -> None:
    response, content = ask(port, "/api/upload", body)
    assert response.status == status
    assert json.loads(content)["error"].startswith(message)


def test_an_argument_that_makes_no_sense_is_refused(port: int) -> None:
    assert ask(port, "/api/similar/3?keep=many")[0].status == 400
    assert ask(port, "/api/search?text=x&top=many")[0].status == 400
    assert ask(port, "/api/search?text=" + 20 * "word%20")[0].status == 200


def test_other_sites_and_names_are_refused(port: int) -> None:
    assert ask(port, "/api/search?text=x", Sec_Fetch_Site="cross-site")[0].status == 403
    assert ask(port, "/", Sec_Fetch_Site="cross-site")[0].status == 200
    assert ask(port, "/", Host=f"evil.example:{port}")[0].status == 403
    assert ask(port, "/", Host=f"localhost:{port}")[0].status == 200


def test_a_password_is_asked_for(index: Index) -> None:
    def known(words: str) -> str:
        return "Basic " + base64.b64encode(words.encode()).decode()

    with serving(index, password="gehéim") as number:
        response, _ = ask(number, "/api/index")
        assert response.status == 401
        assert response.headers["www-authenticate"].startswith("Basic")
        for wrong in (known("me:other"), known("gehéim"), "Basic ***", "Bearer gehéim", known("me:")):
            assert ask(number, "/image/3", Authorization=wrong.encode().decode("latin-1"))[0].status == 401
        assert ask(number, "/image/3", Authorization=known("anyone:gehéim"))[0].status == 200


def test_ten_users_get_what_one_gets(port: int) -> None:
    paths = [f"/api/search?text=picture%20{number}" for number in range(10)]
    paths += [f"/look/{number}?text=picture" for number in range(10)]
    alone = [ask(port, path)[1] for path in paths]
    with ThreadPoolExecutor(10) as users:
        together = list(users.map(lambda path: ask(port, path)[1], paths))
    assert together == alone


def test_others_are_let_in_with_a_password_only(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(index.folder), "--host", "0.0.0.0"]) == 2
    assert "lets others in: set a --password" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(index.folder), "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_closes_cleanly(index: Index, number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-m", "aclip", "serve", str(index.folder), "--port", "0"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    address = process.stdout.readline().split()[1]
    port = int(address.rstrip("/").rpartition(":")[2])
    assert ask(port, "/api/search?text=picture")[0].status == 200
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert errors == ""
