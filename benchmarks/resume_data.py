"""The order of pairs over workers, ranks and a resume, on local shards and on a store that fails in the middle.

    python benchmarks/resume_data.py            about 15 minutes on 2 cores, most of them waiting for the store

Two epochs of small images in shards, one image in 37 damaged: from the disk, and from an HTTP server on loopback
through a cache that holds half of the shards. For every number of workers and ranks a run is stopped in its second
epoch and resumed by new processes; in the middle of its first epoch the server answers nothing but 503 for a while.
Its batches, whole (keys, seeds, crops, captions, what was skipped), must be those of one process without workers, stop
or outage. Ranks are processes that open the source for themselves and wait for each other at every step, as training
does. Downloads are counted by the server, over both epochs and the resume.
"""

import argparse
import http.server
import io
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from aclip import data
from aclip.data.packing import Sample, write_tar
from aclip.data.sources.base import digest_of
from aclip.data.views import VIEWS
from aclip.models import tokenizer_of
from aclip.structs import Batch

EPOCHS, BAD, SEED = 2, 37, 5
RANKS = multiprocessing.get_context("forkserver")  # it imports torch once for all of them


@dataclass
class Store:
    """What an HTTP server on loopback has done and should do.

    Attributes:
        downloads: of shards, complete. refused: requests answered with 503. down_until: on the monotonic clock.
    """

    folder: Path
    url: str = ""
    downloads: int = 0
    refused: int = 0
    down_until: float = 0.0


@contextmanager
def serving(folder: Path) -> Iterator[Store]:
    """Serve the files of a folder."""
    store, lock = Store(folder), threading.Lock()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(folder))

        def send_head(self) -> Any:
            if time.monotonic() >= store.down_until:
                return super().send_head()
            with lock:
                store.refused += 1
            self.send_error(503)
            return None

        def do_GET(self) -> None:
            super().do_GET()
            with lock:
                store.downloads += self.path.endswith(".tar") and time.monotonic() >= store.down_until

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        store.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield store
        finally:
            server.shutdown()


def write_shards(folder: Path, shards: int, pairs: int) -> None:
    """Write shards of `pairs` small JPEG each, one in `BAD` of them damaged, and their sizes."""
    chance = np.random.default_rng(0)
    for shard in range(shards):
        samples = []
        for number in range(shard * pairs, (shard + 1) * pairs):
            file = io.BytesIO()
            Image.fromarray(chance.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(file, "JPEG")
            image = file.getvalue()[: 200 if number % BAD == BAD - 1 else None]
            samples.append(Sample(f"{number:06}", {"jpg": image, "txt": b"noise, number %d" % number}))
        with (folder / f"{shard:03}.tar").open("wb") as out:
            write_tar(out, samples)
    (folder / "sizes.json").write_text(json.dumps({f"{shard:03}.tar": pairs for shard in range(shards)}))


@dataclass(frozen=True)
class Run:
    """The steps [`first`, `last`) of a run; see `data.build_loader`."""

    spec: str
    cache: dict[str, str]  # variables that say where the cache is and how large
    batch_size: int
    first: int
    last: int
    workers: int = 0
    ranks: int = 1


@dataclass
class Seen:
    """What a rank saw: its source, a hash of every row of every step, samples skipped, and the longest step."""

    source: str
    steps: list[list[str]] = field(default_factory=list)
    skipped: int = 0
    longest: float = 0.0


def rows(batch: Batch) -> list[str]:
    """Return a hash of every row of a batch."""
    crops = [(view.pixels[row].numpy(), view.boxes[row].numpy(), view.flipped[row].numpy(),
              None if view.augmentation is None else view.augmentation[row].numpy())
             for row in range(len(batch.keys)) for view in batch.views.values()]
    each = len(batch.views)
    return [digest_of(key, int(batch.seeds[row]), int(batch.caption_ids[row]), batch.tokens[row].numpy(),
                      *(part for crop in crops[row * each : (row + 1) * each] for part in crop))
            for row, key in enumerate(batch.keys)]


def read(run: Run, rank: int, together: Any, step: Any) -> Seen:
    """Read a rank's share of a run; all ranks wait `together` at every `step`."""
    logging.disable(logging.WARNING)
    os.environ.update(run.cache)
    views = VIEWS["two_crops_in_context"]()
    source = data.open_training([run.spec])
    dataset = data.PairDataset(source, views, data.CaptionTokenizer(tokenizer_of("ViT-B-32")),
                               sizes=dict.fromkeys(views.names, (32, 32)), seed=SEED)
    loader = data.build_loader(dataset, batch_size=run.batch_size, start_step=run.first, total_steps=run.last,
                               workers=run.workers, rank=rank, world_size=run.ranks)
    seen = Seen(source.digest())
    before = time.monotonic()
    for number, batch in enumerate(loader, start=run.first):
        if number > run.first:  # the first also starts the workers
            seen.longest = max(seen.longest, time.monotonic() - before)
        seen.steps.append(rows(batch))
        seen.skipped += len(batch.skipped)
        together.wait()
        step.value = number
        before = time.monotonic()
    return seen


def _rank(run: Run, rank: int, together: Any, step: Any, answers: Any) -> None:
    answers.put((rank, read(run, rank, together, step)))


def over_ranks(run: Run, outage_at: int | None = None, store: Store | None = None, seconds: float = 0.0) -> list[Seen]:
    """Return what each rank saw; from step `outage_at` on, the store is down for some seconds."""
    together, step, answers = RANKS.Barrier(run.ranks), RANKS.Value("q", -1), RANKS.Queue()
    ranks = [RANKS.Process(target=_rank, args=(run, rank, together, step, answers)) for rank in range(run.ranks)]
    for process in ranks:
        process.start()
    found: dict[int, Seen] = {}
    while len(found) < run.ranks:
        if store is not None and outage_at is not None and step.value >= outage_at:
            store.down_until, outage_at = time.monotonic() + seconds, None
        if answers.empty() and any(process.exitcode for process in ranks):
            sys.exit(f"a rank of {run} failed")
        if not answers.empty():
            rank, seen = answers.get()
            found[rank] = seen
        time.sleep(0.01)
    for process in ranks:
        process.join()
    return [found[rank] for rank in range(run.ranks)]


def joined(ranks: list[Seen]) -> list[list[str]]:
    """Return the rows of every step, over all ranks."""
    return [[row for share in shares for row in share] for shares in zip(*(seen.steps for seen in ranks), strict=True)]


def hashed(steps: list[list[str]]) -> str:
    """Return eight digits that stand for all batches."""
    return sha256(json.dumps(steps).encode()).hexdigest()[:8]


def main() -> None:
    """Read, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=50, help="in a shard")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--outage", type=float, default=60, help="seconds (default: 60)")
    args = parser.parse_args()
    RANKS.set_forkserver_preload(["open_clip", "aclip.data.batches", "aclip.data.sources", "aiohttp"])
    steps = args.shards * args.pairs // args.batch_size
    end, stop, outage = EPOCHS * steps, steps + steps // 4, steps // 2
    table = Table("shards", "workers", "ranks", "batches", "hash", "equal", "skipped", "downloads / shard and epoch",
                  "requests refused", "longest step, s")
    different = 0
    with tempfile.TemporaryDirectory() as name, serving(Path(name)) as store:
        folder = Path(name)
        write_shards(folder, args.shards, args.pairs)
        cached = sum(path.stat().st_size for path in folder.glob("*.tar")) / 2
        pattern = f"{{000..{args.shards - 1:03}}}.tar"
        cases = [(kind, *case) for kind in ("local", "remote") for case in ((0, 1), *product(args.workers, args.ranks))]
        expected: dict[str, list[list[str]]] = {}
        for number, (kind, workers, ranks) in enumerate(track(cases, "reading", console=Console(stderr=True))):
            cache = {"ACLIP_CACHE": f"{name}/cache-{number}", "ACLIP_CACHE_GB": str(cached / 1e9)}
            spec = f"{name}/{pattern}" if kind == "local" else f"{store.url}/{pattern}"
            store.downloads = store.refused = 0
            if kind not in expected:  # one process, whole, while all is well
                parts = [over_ranks(Run(spec, cache, args.batch_size, 0, end))]
                expected[kind] = joined(parts[0])
            else:
                run = (spec, cache, args.batch_size)
                parts = [over_ranks(Run(*run, 0, stop, workers, ranks), outage, store, args.outage),
                         over_ranks(Run(*run, stop, end, workers, ranks))]
            seen = [one for part in parts for one in part]
            got = [step for part in parts for step in joined(part)]
            equal = got == expected[kind] and len({one.source for one in seen}) == 1
            different += not equal
            downloads = f"{store.downloads / (args.shards * EPOCHS):.2f}" if kind == "remote" else "-"
            refused = str(store.refused) if kind == "remote" and len(parts) > 1 else "-"
            table.add_row(kind, str(workers), str(ranks), str(len(got)), hashed(got),
                          "the reference" if len(parts) == 1 else "yes" if equal else "NO",
                          str(sum(one.skipped for one in seen)), downloads, refused,
                          f"{max(one.longest for one in seen):.1f}")
    Console(width=140).print(table)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
