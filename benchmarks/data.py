"""How fast pairs are read, beside open_clip's own loader and bare decoding.

    pip install webdataset open_clip_torch pandas braceexpand opencv-python-headless
    aclip data fetch cifar10
    aclip data fetch tuxpaint
    python benchmarks/data.py

The images are 500 x 375 JPEG of quality 90: the photographed cut-outs of `tuxpaint`, resized to the frame, before an
enlarged CIFAR-10 photograph (some 27 kB each); with `--photos FOLDER`, JPEG files of your own, shrunk to 500 pixels;
with `--synthetic`, smooth noise, which needs no download. They lie in 16 WebDataset shards. Every contender reads the
same shards with the same number of worker processes, batches of 64, crops of 224 px from a half to the whole of an
image, and ends with normalised floats; each reads on for a pass, and contenders take turns, round by round.

open_clip's loader is `open_clip_train.data.get_wds_dataset` with its own training transform. It is made for webdataset
up to 0.2.86; newer ones mark the end of a shard, which it takes for a member and fails at, so the mark is turned off.
It gives one view; for A-CLIP's three crops its transform is replaced by that of three PIL crops of the one decoded
image, with torchvision's operations as the A-CLIP release lists them. Ours augments in batch, on the CPU, in the
main process, which is counted.

"Per core" is images per second of processor time of all processes together: it depends less on what else the machine
does, though work beside it empties the caches.
"""

import argparse
import functools
import importlib.util
import inspect
import io
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from aclip import data
from aclip.data import augment
from aclip.data.packing import Sample, write_tar
from aclip.data.views import VIEWS
from aclip.models import tokenizer_of

SIDE, BATCH, SHARDS = 224, 64, 16
WIDTH, HEIGHT = 500, 375
MEAN, STD = torch.tensor([0.481, 0.458, 0.408]), torch.tensor([0.269, 0.261, 0.276])
MODEL = "ViT-B-32"

Batches = Iterator[int]  # images in each


# ---------------------------------------------------------------------------------------------- images


def cut_outs_before_photographs(count: int) -> Iterator[bytes]:
    """Yield images made of what can be fetched."""
    chance = np.random.default_rng(0)
    objects = []
    stamps = data.open_source("tuxpaint:all")
    for raw in map(stamps.read, range(len(stamps))):
        if raw.label == "photo":
            image = Image.open(io.BytesIO(raw.image)).convert("RGBA")
            image = image.crop(image.getchannel("A").getbbox())
            scale = 0.9 * min(WIDTH / image.width, HEIGHT / image.height)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            objects.append(image.resize(size, Image.Resampling.BICUBIC))
    behind = data.open_source("cifar10:train[:2000]")
    for number in range(count):
        back = data.decode_image(behind.read(int(chance.integers(len(behind)))).image)
        back = back.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        front = objects[number % len(objects)]
        place = int(chance.integers(WIDTH - front.width + 1)), int(chance.integers(HEIGHT - front.height + 1))
        back.paste(front, place, front)
        yield as_jpeg(back)


def own_photographs(folder: Path, count: int) -> Iterator[bytes]:
    """Yield the JPEG files of a folder, again and again, no larger than 500 pixels."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    for path in itertools.islice(itertools.cycle(paths), count):
        image = data.decode_image(path.read_bytes())
        image.thumbnail((WIDTH, WIDTH), Image.Resampling.BICUBIC)
        yield as_jpeg(image)


def smooth_noise(count: int) -> Iterator[bytes]:
    """Yield enlarged noise, as hard to decode as photographs of the same size in bytes."""
    chance = np.random.default_rng(0)
    for _ in range(count):
        coarse = Image.fromarray(chance.integers(0, 256, (HEIGHT // 10, WIDTH // 10, 3), dtype=np.uint8))
        yield as_jpeg(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def as_jpeg(image: Image.Image) -> bytes:
    """Return a JPEG of quality 90."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return content.getvalue()


def write_shards(folder: Path, images: list[bytes]) -> str:
    """Write the images to shards, and return their pattern."""
    each = len(images) // SHARDS
    for shard in range(SHARDS):
        with (folder / f"{shard:04}.tar").open("wb") as file:
            numbers = range(shard * each, (shard + 1) * each)
            captions = (f"a photo, number {number}, of a thing in front of another".encode() for number in numbers)
            write_tar(file, (Sample(f"{number:06}", {"jpg": images[number], "txt": caption})
                             for number, caption in zip(numbers, captions, strict=True)))  # fmt: skip
    return f"{folder}/{{0000..{SHARDS - 1:04}}}.tar"


# ---------------------------------------------------------------------------------------------- contenders


class ThreePilCrops:
    """A-CLIP's views from one decoded image, each cropped by PIL and changed by torchvision: (3, 3, h, w) floats."""

    def __init__(self) -> None:
        self._boxes = VIEWS["two_crops_in_context"]()
        self._count = 0
        change = v2.Compose([
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.1), v2.RandomSolarize(128, 0.2)])
        end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN.tolist(), STD.tolist())]
        self._end = {"a": v2.Compose([change, *end]), "b": v2.Compose([change, *end]), "context": v2.Compose(end)}

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the views in the order of their names."""
        self._count += 1
        boxes = self._boxes.boxes(image.height, image.width, seed=0, epoch=0, sample=self._count)
        crops = []
        for name, (top, left, height, width) in boxes.items():
            crop = image.crop((left, top, left + width, top + height))
            crops.append(self._end[name](crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
        return torch.stack(crops)


def theirs(shards: str, images: int, workers: int, *, three: bool) -> Callable[[], Batches]:
    """Return open_clip's loader; like ours, it starts its workers anew for each pass, before the clock runs."""
    import open_clip
    import open_clip_train.data as training

    # told not to mark where a shard ends
    if "eof_value" in inspect.signature(training.tar_file_expander).parameters:
        training.tar_file_expander = functools.partial(training.tar_file_expander, eof_value=None)
    transform = ThreePilCrops() if three else open_clip.image_transform(
        SIDE, is_train=True, mean=MEAN.tolist(), std=STD.tolist(), aug_cfg={"scale": (0.5, 1.0)})
    options = SimpleNamespace(
        train_data=shards, val_data=None, train_num_samples=images, dataset_resampled=False, seed=0,
        train_data_upsampling_factors=None, batch_size=BATCH, workers=workers, world_size=1)  # fmt: skip
    tokenizer = open_clip.get_tokenizer(MODEL)
    passes = itertools.count()

    def run() -> Batches:
        info = training.get_wds_dataset(options, transform, is_train=True, tokenizer=tokenizer)
        info.set_epoch(next(passes))
        for images, _ in info.dataloader:
            yield len(images)

    return run


def ours(shards: str, images: int, workers: int, *, views: str, on_cpu: bool) -> Callable[[], Batches]:
    """Return our loader; `on_cpu` augments and normalises here, else it is left to another device."""
    build = VIEWS[views]()
    dataset = data.PairDataset(data.open_source(shards), build, data.CaptionTokenizer(tokenizer_of(MODEL)),
                               sizes=dict.fromkeys(build.names, (SIDE, SIDE)), seed=0)  # fmt: skip
    steps = images // BATCH
    passes = itertools.count()

    def run() -> Batches:
        first = next(passes) * steps
        for batch in data.build_loader(dataset, batch_size=BATCH, start_step=first, total_steps=first + steps,
                                       workers=workers):
            for view in batch.views.values() if on_cpu else ():
                augment.apply(view, MEAN, STD)
            yield len(batch.keys)

    return run


def floors(images: list[bytes]) -> dict[str, Callable[[], Batches]]:
    """Return decoding and one resized crop, from memory, with each library."""
    boxes = [VIEWS["one_crop"]().boxes(HEIGHT, WIDTH, seed=0, epoch=0, sample=i)["a"] for i in range(len(images))]

    def pillow(content: bytes, box: tuple[int, int, int, int]) -> object:
        top, left, height, width = box
        image = Image.open(io.BytesIO(content)).convert("RGB")
        return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))

    def on_torch(image: torch.Tensor, box: tuple[int, int, int, int]) -> object:
        top, left, height, width = box
        part = image[None, :, top : top + height, left : left + width]
        return F.interpolate(part, (SIDE, SIDE), mode="bicubic", antialias=True)

    def torchvision(content: bytes, box: tuple[int, int, int, int]) -> object:
        return on_torch(decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8)), box)

    def turbo(content: bytes, box: tuple[int, int, int, int]) -> object:
        return on_torch(torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1), box)

    found = {"decode and crop: Pillow": pillow, "decode and crop: torchvision": torchvision,
             "decode and crop: simplejpeg and torch": turbo}  # fmt: skip
    try:
        import cv2
    except ImportError:
        cv2 = None
    if cv2 is not None:
        cv2.setNumThreads(1)

        def opencv(content: bytes, box: tuple[int, int, int, int]) -> object:
            top, left, height, width = box
            image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
            return cv2.resize(image[top : top + height, left : left + width], (SIDE, SIDE),
                              interpolation=cv2.INTER_CUBIC)

        found["decode and crop: OpenCV, not antialiased"] = opencv

    def batches(crop: Callable[[bytes, tuple[int, int, int, int]], object]) -> Batches:
        for first in range(0, len(images) - BATCH + 1, BATCH):
            for content, box in zip(images[first : first + BATCH], boxes[first : first + BATCH], strict=True):
                crop(content, box)
            yield BATCH

    return {name: functools.partial(batches, crop) for name, crop in found.items()}


# ---------------------------------------------------------------------------------------------- measuring


def processor_seconds() -> float:
    """Return the processor time of this process and of its living children."""
    ticks = os.sysconf("SC_CLK_TCK")
    children = 0.0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        children += (int(fields[11]) + int(fields[12])) / ticks
    return time.process_time() + children


def rates(run: Callable[[], Batches], workers: int) -> tuple[float, float]:
    """Return images per second, and per second of processor time, after the first batches.

    What was read ahead when the clock starts, the same for every contender, is not counted.
    """
    images, start, spent = 0, 0.0, 0.0
    ahead = 2 * workers
    for number, count in enumerate(run()):
        if number == ahead:
            start, spent = time.perf_counter(), processor_seconds()
        elif number > ahead:
            images += count
            end, used = time.perf_counter(), processor_seconds()
    return images / (end - start), images / (used - spent)


def print_rates(measured: dict[tuple[str, int], list[tuple[float, float]]], console: Console) -> None:
    """Print a table; medians, and the lowest and highest in brackets."""
    table = Table("reader", "workers", "images/s", "images/s per core")
    for (name, workers), values in measured.items():
        cells = [f"{statistics.median(column):,.0f} ({min(column):,.0f} to {max(column):,.0f})"
                 for column in zip(*values, strict=True)]
        table.add_row(name, str(workers) if workers else "none", *cells)
    console.print(table)


def print_ratios(measured: dict[tuple[str, int], list[tuple[float, float]]], console: Console) -> None:
    """Print how contenders compare, round by round: medians, and the lowest and highest in brackets."""
    floor = max((key for key in measured if key[0].startswith("decode") and "OpenCV" not in key[0]),
                key=lambda key: statistics.median(value[1] for value in measured[key]))
    pairs = [(("aclip, one view", n), ("open_clip, one view", n)) for n in (1, 2)]
    pairs += [(("aclip, three crops", n), ("three PIL crops", n)) for n in (1, 2)]
    pairs += [(("aclip, three crops, augmented elsewhere", n), ("three PIL crops", n)) for n in (1, 2)]
    pairs += [(("aclip, one view, normalised elsewhere", n), floor) for n in (0, 1)]
    table = Table("ratio", "workers", "images/s", "per core")
    for one, other in ((one, other) for one, other in pairs if other in measured):
        cells = []
        for column in (0, 1):
            values = [a[column] / b[column] for a, b in zip(measured[one], measured[other], strict=True)]
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        table.add_row(f"{one[0]} / {other[0]}", str(one[1]) if one[1] else "none", *cells)
    console.print(table)


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--photos", type=Path, help="folder of JPEG files to read in place of composed images")
    parser.add_argument("--synthetic", action="store_true", help="read smooth noise in place of composed images")
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["ACLIP_CACHE"] = f"{name}/cache"
        made = (own_photographs(args.photos, args.images) if args.photos else smooth_noise(args.images)
                if args.synthetic else cut_outs_before_photographs(args.images))  # fmt: skip
        images = list(track(made, "preparing images", args.images))
        result = {"speed": speed(Path(name), images, args.rounds, Console())}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def speed(folder: Path, images: list[bytes], rounds: int, console: Console) -> Iterable[object]:
    """Measure and print the rates."""
    shards = write_shards(folder, images)
    console.print(f"{len(images)} images of {statistics.mean(map(len, images)) / 1000:.0f} kB")
    runs: dict[tuple[str, int], Callable[[], Batches]] = {}
    has_theirs = importlib.util.find_spec("open_clip_train") and importlib.util.find_spec("webdataset")
    if not has_theirs:
        console.print("open_clip's loader is left out: pip install 'open_clip_torch\\[training]'")
    build = functools.partial(ours, shards, len(images))
    for n in (1, 2):
        if has_theirs:
            runs["open_clip, one view", n] = theirs(shards, len(images), n, three=False)
            runs["three PIL crops", n] = theirs(shards, len(images), n, three=True)
        runs["aclip, one view", n] = build(n, views="one_crop", on_cpu=True)
        runs["aclip, three crops", n] = build(n, views="two_crops_in_context", on_cpu=True)
        runs["aclip, three crops, augmented elsewhere", n] = build(n, views="two_crops_in_context", on_cpu=False)
    for n in (0, 1):
        runs["aclip, one view, normalised elsewhere", n] = build(n, views="one_crop", on_cpu=False)
    runs |= {(name, 0): run for name, run in floors(images).items()}
    measured: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in runs}
    for _, (key, run) in track(list(itertools.product(range(rounds), runs.items())), "measuring"):
        measured[key].append(rates(run, key[1]))
    print_rates(measured, console)
    print_ratios(measured, console)
    return [{"reader": name, "workers": n, "rates": values} for (name, n), values in measured.items()]


if __name__ == "__main__":
    main()
