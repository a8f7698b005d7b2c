"""What reading costs beside decoding: opening shards, rows of Hugging Face datasets, and `aclip data doctor`.

    pip install 'attentive-clip[huggingface]'
    python benchmarks/reading.py

One process, rounds of all in turns; medians, and the lowest and highest. The doctor is compared with reading and
decoding the same samples: enlarged noise of 512 x 384 (JPEG, quality 90), drawings of 128 px and noise of 32 px (PNG).
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
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table

from aclip import data
from aclip.data.packing import Sample, write_tar
from aclip.examination import Limits, examine
from aclip.models import tokenizer_of


def seconds(run: Callable[[], object]) -> float:
    """Return how long `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def noise(number: int, side: int) -> Image.Image:
    """Return noise, a square of `side` pixels."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


def photo(number: int) -> tuple[str, bytes]:
    """Return a JPEG with as much detail as a photograph."""
    content = io.BytesIO()
    noise(number, 60).resize((512, 384), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return "jpg", content.getvalue()


def drawing(number: int) -> tuple[str, bytes]:
    """Return a PNG of flat shapes."""
    chance, content = np.random.default_rng(number), io.BytesIO()
    image = Image.new("RGB", (128, 128), "white")
    for _ in range(12):
        corners = sorted(chance.integers(0, 128, 2).tolist()), sorted(chance.integers(0, 128, 2).tolist())
        ImageDraw.Draw(image).ellipse(list(zip(*corners, strict=True)), fill=tuple(chance.integers(0, 256, 3).tolist()))
    image.save(content, "PNG")
    return "png", content.getvalue()


def thumbnail(number: int) -> tuple[str, bytes]:
    """Return a PNG of 32 px."""
    content = io.BytesIO()
    noise(number, 32).save(content, "PNG")
    return "png", content.getvalue()


def write_shard(path: Path, pairs: int, image: Callable[[int], tuple[str, bytes]]) -> str:
    """Write a shard of so many pairs, and return its name."""
    with path.open("wb") as file:
        samples = ((number, *image(number)) for number in range(pairs))
        write_tar(file, (Sample(f"{number:06}", {ending: content, "txt": f"image {number} of many".encode()})
                         for number, ending, content in samples))  # fmt: skip
    return str(path)


def opening(folder: Path, pairs: int) -> dict[str, Callable[[], float]]:
    """Return the times of opening a shard with and without its index, and of a row of a saved dataset."""
    shard, saved = folder / "small.tar", folder / "saved"
    write_shard(shard, pairs, lambda _: ("jpg", bytes(2000)))  # what counts is the number of headers

    def without_index() -> float:
        shutil.rmtree(os.environ["ACLIP_CACHE"], ignore_errors=True)
        return seconds(lambda: data.open_source(str(shard)))

    import datasets

    datasets.disable_progress_bars()
    images = [{"bytes": thumbnail(number)[1], "path": None} for number in range(300)]
    datasets.Dataset.from_dict({"image": images, "text": [f"image {number}" for number in range(300)]}).cast_column(
        "image", datasets.Image()).save_to_disk(saved)  # fmt: skip
    source = data.open_source(str(saved))
    return {
        f"opening a shard of {pairs:,} pairs, s": without_index,
        "the same with its index cached, s": lambda: seconds(lambda: data.open_source(str(shard))),
        "a row of a saved dataset, ms": lambda: 1e3 * seconds(
            lambda: [source.read(i) for i in range(len(source))]) / len(source),
    }  # fmt: skip


def examining(specs: dict[str, str]) -> dict[str, Callable[[], float]]:
    """Return, for each source, the rate of the doctor relative to that of reading and decoding."""
    tokenizer = data.CaptionTokenizer(tokenizer_of("vit-tiny"))

    def ratio(spec: str) -> float:
        source = data.open_source(spec)
        bare = seconds(lambda: [data.decode_image(source.read(i).image) for i in range(len(source))])
        limits = Limits("vit-tiny", (64, 64), 77)
        return bare / seconds(lambda: examine(source, limits=limits, tokenizer=tokenizer, workers=0))

    return {f"doctor / decoding, {name}": functools.partial(ratio, spec) for name, spec in specs.items()}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=600, help="of each kind that the doctor examines")
    parser.add_argument("--pairs", type=int, default=10_000, help="of the shard that is opened")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ACLIP_CACHE"] = f"{folder}/cache"
        runs = opening(folder, args.pairs) | examining({
            "512 x 384 JPEG": write_shard(folder / "photos.tar", args.images, photo),
            "128 px PNG": write_shard(folder / "drawings.tar", args.images, drawing),
            "32 px PNG": write_shard(folder / "thumbnails.tar", args.images, thumbnail),
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
