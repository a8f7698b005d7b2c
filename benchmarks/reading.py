"""What reading costs beside decoding: opening shards, rows of Hugging Face datasets, and `aclip data doctor`.

    aclip data fetch emoji
    aclip data fetch cifar10
    python benchmarks/reading.py

One process, rounds of all in turns; medians, and the lowest and the highest. The doctor is compared with reading
and decoding the same samples: photographs of 512 x 384 (mosaics of 16 x 12 CIFAR-10 images, as JPEG of quality 90),
the 128 px PNG of `emoji`, and CIFAR-10's own 32 px PNG.
"""

import argparse
import functools
import io
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from aclip import data
from aclip.data.examination import Limits, examine
from aclip.data.tar_files import Sample, write_tar
from aclip.models import tokenizer_of

IMAGES = 600


def seconds(run: Callable[[], object]) -> float:
    """Return how long `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def write_small_pairs(path: Path, pairs: int) -> None:
    """Write a shard of so many tiny pairs: what counts is the number of its headers."""
    with path.open("wb") as file:
        write_tar(file, (Sample(f"{n:06}", {"jpg": bytes(2000), "txt": b"a caption"}) for n in range(pairs)))


def write_mosaics(path: Path) -> None:
    """Write a shard of photographs made of CIFAR-10 images."""
    source = data.open_source("cifar10:train[:5000]")
    chance = np.random.default_rng(0)
    photos = np.stack([np.asarray(data.decode_image(source.read(i).image)) for i in range(len(source))])

    def mosaic(number: int) -> Sample:
        tiles = photos[chance.integers(len(photos), size=(12, 16))]
        content = io.BytesIO()
        Image.fromarray(tiles.transpose(0, 2, 1, 3, 4).reshape(384, 512, 3)).save(content, "JPEG", quality=90)
        return Sample(f"{number:06}", {"jpg": content.getvalue(), "txt": f"a mosaic, number {number}".encode()})

    with path.open("wb") as file:
        write_tar(file, map(mosaic, range(IMAGES)))


def opening(folder: Path) -> dict[str, Callable[[], float]]:
    """Return the times of opening a shard with and without its index, and of a row of a saved dataset."""
    shard, saved = folder / "small.tar", folder / "saved"
    write_small_pairs(shard, 10_000)

    def without_index() -> float:
        shutil.rmtree(os.environ["ACLIP_CACHE"], ignore_errors=True)
        return seconds(lambda: data.open_source(str(shard)))

    import datasets

    datasets.disable_progress_bars()
    rows = data.open_source("emoji:val_both")
    content = [rows.read(i) for i in range(len(rows))]
    datasets.Dataset.from_dict(
        {"image": [{"bytes": one.image, "path": None} for one in content], "text": [one.captions[0] for one in content]}
    ).cast_column("image", datasets.Image()).save_to_disk(saved)
    source = data.open_source(str(saved))
    return {
        "opening a shard of 10,000 pairs, s": without_index,
        "the same with its index kept, s": lambda: seconds(lambda: data.open_source(str(shard))),
        "a row of a saved dataset, ms": lambda: 1e3 * seconds(
            lambda: [source.read(i) for i in range(len(source))]) / len(source),
    }


def examining(specs: dict[str, str]) -> dict[str, Callable[[], float]]:
    """Return, for each source, the rate of the doctor relative to that of reading and decoding."""
    tokenizer = data.CaptionTokenizer(tokenizer_of("vit-tiny"))

    def ratio(spec: str) -> float:
        source = data.open_source(spec)
        bare = seconds(lambda: [data.decode_image(source.read(i).image) for i in range(len(source))])
        limits = Limits("vit-tiny", (64, 64), 77)
        return bare / seconds(lambda: examine(source, limits=limits, tokenizer=tokenizer))

    return {f"doctor / decoding, {name}": functools.partial(ratio, spec) for name, spec in specs.items()}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ACLIP_CACHE"] = f"{folder}/cache"
        write_mosaics(Path(folder, "mosaics.tar"))
        runs = opening(Path(folder)) | examining({
            "512 x 384 JPEG": f"{folder}/mosaics.tar",
            "128 px PNG": f"emoji:train[:{IMAGES}]",
            "32 px PNG": f"cifar10:train[:{IMAGES}]",
        })  # fmt: skip
        measured: dict[str, list[float]] = {name: [] for name in runs}
        for _, (name, run) in track(list(itertools.product(range(args.rounds), runs.items())), "measuring"):
            measured[name].append(run())
    table = Table("what", "median", "lowest to highest")
    for name, values in measured.items():
        table.add_row(name, f"{statistics.median(values):.3g}", f"{min(values):.3g} to {max(values):.3g}")
    Console().print(table)


if __name__ == "__main__":
    main()
