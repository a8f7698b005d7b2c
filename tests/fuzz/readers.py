"""Fuzz the readers of shards, tables, JSON and Parquet: `python tests/fuzz/readers.py tar --minutes 30`.

Whatever the bytes are, opening a source and reading all of it gives samples, `BadSampleError` or another
`AclipError`, soon. What breaks that is written to `tests/fuzz/corpus`, which `test_corpus.py` replays.

Needs `pip install atheris`, whose mutations are guided by the code that they reach; `--plain` needs nothing. Shards are
tried hundreds of times as often with `ACLIP_CACHE` on a RAM disk, as their indexes are kept there.
"""

import argparse
import contextlib
import importlib
import io
import json
import logging
import pkgutil
import random
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from hashlib import sha1
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
SLOWEST = 5.0  # seconds of processor time that one small input may take
MOST_READ = 50  # samples read of one input


def read_everything(path: Path) -> None:
    """Open the file as a source and read it, which may raise nothing but an `AclipError`."""
    from aclip.data import open_source
    from aclip.errors import AclipError, BadSampleError

    source, message = None, ""
    try:
        source = open_source(str(path))
    except AclipError as error:
        message = str(error)
    if source is None:
        assert len(message.splitlines()) == 1, message
        return
    for index in range(min(len(source), MOST_READ)):
        assert source.name(index)
        with contextlib.suppress(BadSampleError):
            source.read(index)


def seeds(ending: str) -> list[bytes]:
    """Return good files of a kind."""
    if ending == "tar":
        return [_tar(format=one) for one in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    if ending == "csv":
        return [b'image,caption,tags\n0.jpg,a,"b;c"\n1.jpg,"q\nx",\n', "image\tcaption\n0.jpg\té\n".encode("utf-16")]
    if ending == "jsonl":
        return [b'{"image":"0.jpg","caption":["a",null,3]}\n{"image":"0.jpg","caption":"\xc3\xa9","label":3}\n']
    if ending == "json":
        label_studio = [{"data": {"image": "0.jpg"}, "annotations": [{"result": [{"value": {"text": ["a"]}}]}]}]
        coco = {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
        return [json.dumps(coco).encode(), b'[{"image":"0.jpg","caption":"a"}]', json.dumps(label_studio).encode(),
                b'{"0.jpg": "a", "1.jpg": ["b", "c"]}', b'{"image": {"0": "0.jpg"}, "caption": {"0": "a"}}']
    if ending == "arrow":
        return [_arrow(stream) for stream in (False, True)]
    import pyarrow
    import pyarrow.parquet

    found = []
    for image in (["0.jpg"] * 5, [b"x"] * 5, [{"bytes": b"x", "path": "0.jpg"}] * 5):
        file = io.BytesIO()
        table = pyarrow.table({"image": image, "caption": list("abcde")})
        pyarrow.parquet.write_table(table, file, row_group_size=2)
        found.append(file.getvalue())
    return found


def _tar(format: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        members = {"a.jpg": b"x" * 700, "a.txt": b"one\ntwo", "d" * 60 + "/" + "b" * 60 + ".png": b"y", "c.jpg": b"z",
                   "c.json": b'{"caption": "a", "tags": ["t"], "label": 3}', "c.cls": b"3"}  # fmt: skip
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _arrow(stream: bool) -> bytes:
    import pyarrow

    file = io.BytesIO()
    table = pyarrow.table({"image": [b"x"] * 5, "caption": list("abcde")})
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return file.getvalue()


class Checker:
    """Tries inputs, and keeps those that break a reader, one of each kind."""

    def __init__(self, folder: Path, ending: str) -> None:
        self._path = folder / f"input.{ending}"
        (folder / "0.jpg").write_bytes(b"x")
        self._known: set[str] = set()
        self.tried = 0

    def __call__(self, data: bytes) -> None:
        """Try one input."""
        self.tried += 1
        self._path.write_bytes(data)
        start = time.process_time()
        try:
            read_everything(self._path)
            place = "" if time.process_time() - start < SLOWEST else "slow"
        except Exception as error:
            own = [frame for frame in traceback.extract_tb(error.__traceback__) if "aclip" in frame.filename]
            place = f"{type(error).__name__} {Path(own[-1].filename).name}:{own[-1].lineno}" if own else repr(error)
        if place and place not in self._known:
            self._known.add(place)
            CORPUS.mkdir(exist_ok=True)
            name = f"{sha1(data).hexdigest()[:12]}{self._path.suffix}"
            (CORPUS / name).write_bytes(data)
            sys.stdout.write(f"{place}: {name}\n")
            sys.stdout.flush()


PIECES = (b"[", b'"', b"\0", b"\xff", b"\n", b"{", b"1e999", b"9" * 5000, b"NaN", b"\\ud800", b"../", b"null", b"\x80")


def mutations(good: list[bytes], seed: int) -> Iterator[bytes]:
    """Yield changed copies of good files, without end."""
    chance = random.Random(seed)
    while True:
        data = bytearray(chance.choice(good))
        for _ in range(chance.randint(1, 5)):
            at = chance.randrange(len(data) + 1)
            what = chance.randrange(5)
            if what == 0 and at < len(data):
                data[at] = chance.randrange(256)
            elif what == 1:
                data[at:at] = chance.choice(PIECES)
            elif what == 2:
                del data[at : at + chance.randint(1, 20)]
            elif what == 3:
                data[at:at] = data[: chance.randint(0, 600)]
            else:
                data[at : at + 12] = oct(chance.choice((0, 1, 511, 513, 2**33, 8**11 - 1)))[2:].encode()
        yield bytes(data)


def guided(good: list[bytes], minutes: float, check: Callable[[bytes], None]) -> None:
    """Let atheris choose the inputs; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=["aclip.data.sources", "tarfile", "zipfile", "csv", "json"]):
        import aclip.data.sources

        for module in pkgutil.iter_modules(aclip.data.sources.__path__, "aclip.data.sources."):
            importlib.import_module(module.name)  # those that are not yet imported by the others
    folder = tempfile.mkdtemp()
    for number, data in enumerate(good):
        (Path(folder) / str(number)).write_bytes(data)
    options = [f"-max_total_time={int(minutes * 60)}", "-max_len=16384", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], folder, *options], check)
    atheris.Fuzz()


def main() -> None:
    """Fuzz one reader for some time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ending", choices=["tar", "csv", "jsonl", "json", "parquet", "arrow"])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="random mutations, without atheris")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        check = Checker(Path(folder), args.ending)
        if not args.plain:
            guided(seeds(args.ending), args.minutes, check)
        end = time.monotonic() + args.minutes * 60
        for data in mutations(seeds(args.ending), args.seed):
            if time.monotonic() > end:
                break
            check(data)
        sys.stdout.write(f"{args.ending}: {check.tried:,} inputs tried\n")


if __name__ == "__main__":
    main()
