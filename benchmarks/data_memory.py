"""Memory of a training's readers over a million pairs: of the process that trains, and of each of its workers.

    python benchmarks/data_memory.py            about 10 minutes on 2 cores

A table (CSV), Parquet files with the images in them, and WebDataset shards, each of a million pairs; images of 32 px,
so that what grows with the pairs is seen and not the images. Every case runs in a process of its own, over the first
5,000 pairs of each of ten epochs. Linux tells the peak of a process (VmHWM), which counts what it shares with others,
and its part (PSS), in which shared pages are divided among those who share them: the PSS of all processes together is
what they take.
"""

import argparse
import io
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from aclip import data
from aclip.data.batches import ReadBatch
from aclip.data.order import BatchSampler
from aclip.data.packing import Sample, write_tar
from aclip.data.views import VIEWS
from aclip.data.workers import read_ahead
from aclip.models import tokenizer_of

BATCH = 100
EACH = 10_000  # pairs in a shard or Parquet file


def small_jpeg() -> bytes:
    """Return an image of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def table(folder: Path, pairs: int) -> str:
    """Write a CSV with a path of its own for every row: rows of one image would be one sample."""
    (folder / "0000").mkdir()
    for number in range(BATCH):
        (folder / "0000" / f"{number:02}.jpg").write_bytes(small_jpeg())
    for number in range(1, -(-pairs // BATCH)):
        (folder / f"{number:04}").symlink_to("0000")
    with (folder / "pairs.csv").open("w") as file:
        file.write("filepath,caption\n")
        for row in range(pairs):
            file.write(f"{row // BATCH:04}/{row % BATCH:02}.jpg,a photo of thing{row} beside {row * 7919 % pairs}\n")
    return str(folder / "pairs.csv")


def parquet(folder: Path, pairs: int) -> str:
    """Write Parquet files in row groups of 1,000, which are one file under many names."""
    import pyarrow
    import pyarrow.parquet

    captions = [f"a photo of thing{row}" for row in range(min(EACH, pairs))]
    images = pyarrow.array([small_jpeg()] * len(captions), pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": captions}), folder / "0000.parquet",
                                row_group_size=1000, use_dictionary=False)
    return linked(folder, "parquet", pairs)


def shards(folder: Path, pairs: int) -> str:
    """Write shards, which are one file under many names."""
    with (folder / "0000.tar").open("wb") as file:
        write_tar(file, (Sample(f"{row:06}", {"jpg": small_jpeg(), "txt": b"a photo of thing%d" % row})
                         for row in range(min(EACH, pairs))))
    return linked(folder, "tar", pairs)


def linked(folder: Path, ending: str, pairs: int) -> str:
    """Link the first file under as many names as make `pairs`, and return their pattern."""
    for number in range(1, pairs // EACH):
        os.link(folder / f"0000.{ending}", folder / f"{number:04}.{ending}")
    return f"{folder}/*.{ending}"


KINDS: dict[str, Callable[[Path, int], str]] = {"CSV": table, "Parquet": parquet, "shards": shards}


def memory(pid: int | None = None) -> tuple[float, float]:
    """Return the peak and the PSS of a process, in megabytes."""
    place = Path(f"/proc/{pid or 'self'}")
    fields = (place / "status").read_text() + (place / "smaps_rollup").read_text()
    found = {line.split(":")[0]: line.split()[1] for line in fields.splitlines() if line.endswith("kB")}
    return int(found["VmHWM"]) / 1024, int(found["Pss"]) / 1024


def measure(spec: str, workers: int, samples: int, passes: int) -> dict[str, list[list[float]]]:
    """Return (peak, PSS) before a source is opened, after it, and after each pass: of the parent, then of the workers.
    """
    logging.disable(logging.WARNING)
    tokenizer = data.CaptionTokenizer(tokenizer_of("ViT-B-32"))
    found = {"before": [list(memory())]}
    begun = time.monotonic()
    source = data.open_source(spec)
    found["opened"] = [[*memory(), time.monotonic() - begun, len(source)]]
    views = VIEWS["one_crop"]()
    dataset = data.PairDataset(source, views, tokenizer, sizes={"a": (32, 32)}, seed=0)
    sampler = BatchSampler(source, batch_size=BATCH, seed=0, total_steps=passes * (len(source) // BATCH))
    wanted = min(samples, len(source)) // BATCH
    some = (step for number, step in enumerate(sampler) if number % sampler.steps_per_epoch < wanted)
    for number, _ in enumerate(read_ahead(ReadBatch(dataset, None), some, workers=workers)):
        if number % wanted == wanted // 2:  # while the workers read
            processes = [None, *(child.pid for child in multiprocessing.active_children())]
            found[str(number // wanted)] = [list(memory(pid)) for pid in processes]
    return found


def main() -> None:
    """Measure each case in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=5_000, help="read of each epoch")
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--spec", help=argparse.SUPPRESS)  # measures one case, in this process
    args = parser.parse_args()
    if args.spec:
        sys.stdout.write(json.dumps(measure(args.spec, args.workers[0], args.samples, args.passes)))
        return
    result = Table("pairs", "workers", "seconds to open", "parent before", "opened", "first epoch", "last epoch",
                   "a worker, first", "last", "all, last", title="PSS in MB (peak, VmHWM)")
    with tempfile.TemporaryDirectory() as name:
        cases = [(kind, workers) for kind in args.kinds for workers in args.workers]
        specs: dict[str, str] = {}
        for kind, workers in track(cases, "measuring", console=Console(stderr=True)):
            if kind not in specs:
                (Path(name) / kind).mkdir()
                specs[kind] = KINDS[kind](Path(name) / kind, args.rows)
            options = ["--samples", str(args.samples), "--passes", str(args.passes), "--workers", str(workers)]
            done = subprocess.run([sys.executable, __file__, *options, "--spec", specs[kind]], check=True,
                                  stdout=subprocess.PIPE, env=os.environ | {"ACLIP_CACHE": f"{name}/cache"})
            found = json.loads(done.stdout)
            first, last = found["0"], found[str(args.passes - 1)]
            peak, pss, seconds, pairs = found["opened"][0]
            result.add_row(f"{kind}, {pairs:,}", str(workers), f"{seconds:.1f}", cell(found["before"]),
                           cell([[peak, pss]]), cell(first[:1]), cell(last[:1]), cell(first[1:]), cell(last[1:]),
                           f"{sum(one[1] for one in last):.0f}")
    Console(width=160).print(result)


def cell(processes: list[list[float]]) -> str:
    """Return PSS and peak of some processes, the largest of each."""
    return f"{max(p[1] for p in processes):.0f} ({max(p[0] for p in processes):.0f})" if processes else "-"


if __name__ == "__main__":
    main()
