"""The set `emoji`: 12,720 pictures of 1,914 concepts in ten drawing styles, with names and keywords.

One concept drawn by many designers makes an honest test: a picture in an unseen style, an unseen concept,
or both. A tenth of the concepts are held out (see `concepts`), and three styles are held out whole.

| split | concepts | styles | pictures |
|---|---|---|---|
| train | known | known | 6,912 |
| val_vendor | known | held out | 4,612 |
| val_concept | held out | known | 706 |
| val_both | held out | held out | 490 |

Which icon shows which concept is said in `iconify.match`. Its second rule follows names, and the packs'
renames are generous: seven pictures show a neighbour of their concept (noto-v1: the cricket bat also for
the insect, an upwards arrow for "UP! button", one blank key for "keycap: #" and for "keycap: *"; emojione:
the bat and the arrow; emojione-v1: the arrow). They are kept: the counts above are the set's definition.

The folder holds `SPLIT/000000.tar` ... of 1,000 samples each (WebDataset layout: `.png` 128 x 128 RGBA,
`.json` with caption, tags, label, concept, group, style and licence, `.txt` with the caption), in an order that is
shuffled by hash for readers that stream, `licences/` with what each package says of its licence, and
`dataset.json` with counts and hashes.
"""

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aclip.data.fetch.concepts import LABELS, Depiction, into_splits, summarise
from aclip.data.fetch.drawn import draw_samples, worker_count
from aclip.data.fetch.iconify import Concept, Icon, Pack, match, read_concepts, read_pack
from aclip.data.fetch.licences import Licence, write_licences
from aclip.data.fetch.packaged import PackagedSet
from aclip.data.fetch.packages import Package, download, read_members
from aclip.data.fetch.progress import Progress
from aclip.data.fetch.render import open_renderer, require_renderer
from aclip.data.fetch.shards import ShardFolder
from aclip.data.tar_files import Sample

PIXELS = 128
SAMPLES_PER_SHARD = 1000
COUNTS = {"train": 6912, "val_vendor": 4612, "val_concept": 706, "val_both": 490}

_LAYOUT = 1  # raise it when the same packages would be written differently


@dataclass(frozen=True)
class Style:
    """One drawing style: a package, and whether its pictures are never trained on."""

    package: Package
    held_out: bool = False

    @property
    def name(self) -> str:
        """The pack's name, e.g. "noto"."""
        return self.package.name.rpartition("/")[2]


# fmt: off
_PACKS = (  # name, version, bytes, whether held out, SHA-256
    ("noto", "1.2.9", 3_102_958, False,
     "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    ("twemoji", "1.2.5", 1_555_888, False,
     "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    ("openmoji", "1.2.29", 1_264_633, True,
     "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    ("fluent-emoji-flat", "1.2.6", 1_172_438, True,
     "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    ("fluent-emoji", "1.2.7", 14_323_330, True,
     "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    ("noto-v1", "1.2.5", 1_587_591, False,
     "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    ("fxemoji", "1.2.2", 1_034_876, False,
     "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    ("emojione", "1.2.3", 687_690, False,
     "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    ("emojione-v1", "1.2.3", 3_704_153, False,
     "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
    ("streamline-emojis", "1.2.4", 381_714, False,
     "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"),
)
# fmt: on

STYLES = tuple(
    Style(Package(f"@iconify-json/{name}", version, sha256, size), held_out)
    for name, version, size, held_out, sha256 in _PACKS
)


@dataclass(frozen=True)
class _Picture(Depiction):
    """A picture to be drawn."""

    icon: Icon


@dataclass(frozen=True)
class Emoji(PackagedSet):
    """Fetches the set; the fields are its definition, which tests make smaller.

    Attributes:
        styles: the packs.
        labels: the emojibase package.
        counts: pictures by split that must come out.
        workers: processes that render; None takes one a core, eight at most.
    """

    styles: tuple[Style, ...] = STYLES
    labels: Package = LABELS
    counts: Mapping[str, int] | None = None
    workers: int | None = None

    name = "emoji"
    about = "12,720 pictures of 1,914 emoji in 10 drawing styles, with names and keywords; 36 MB to download"
    licence = "Apache-2.0, CC-BY-4.0, CC-BY-SA-4.0 and MIT, by style (see licences/)"

    def build(self, shards: ShardFolder, packages: Path, progress: Progress) -> None:
        """See `PackagedSet.build`."""
        require_renderer()
        tarballs = download([self.labels, *(s.package for s in self.styles)], packages, progress)
        concepts = read_concepts(tarballs[self.labels.name])
        packs = {style.name: read_pack(tarballs[style.package.name]) for style in self.styles}
        held_out = {style.name for style in self.styles if style.held_out}
        splits = into_splits(self._pictures(packs, concepts), held_out, self.counts)
        shards.resume({"resvg-py": importlib.metadata.version("resvg-py")})
        self._write_licences(shards.folder / "licences", packs, tarballs)
        with open_renderer(PIXELS, worker_count(self.workers)) as renderer:

            def samples(pictures: Sequence[_Picture], skipped: dict[str, str]) -> Iterable[Sample]:
                return draw_samples(pictures, renderer, progress, skipped)

            shards.fill(splits, samples, SAMPLES_PER_SHARD, "rendering", progress)
        shards.finish(summarise(self.name, splits, shards.skipped()))

    def origin(self) -> dict[str, Any]:
        """See `PackagedSet.origin`."""
        packages = [self.labels, *(style.package for style in self.styles)]
        return {
            "layout": _LAYOUT,
            "pixels": PIXELS,
            "samples_per_shard": SAMPLES_PER_SHARD,
            "packages": {package.spec: package.sha256 for package in packages},
        }

    def _pictures(self, packs: Mapping[str, Pack], concepts: Mapping[str, Concept]) -> Iterator[_Picture]:
        for style, icons in match(packs, concepts).items():
            licence = str(packs[style].info.get("license", {}).get("spdx", "unknown"))
            for code, icon in icons.items():
                yield _Picture(style, licence, concepts[code], icon)

    def _write_licences(self, folder: Path, packs: Mapping[str, Pack], tarballs: Mapping[str, Path]) -> None:
        """Keep what each package says of its licence, and one table of all."""
        rows = [
            Licence.of_info(style.name, style.package, packs[style.name].info) for style in self.styles
        ]
        rows.append(Licence("(labels)", self.labels.name, self.labels.version, licence="MIT"))
        said_in = ["LICENSE", "LICENSE.md", "LICENSE.txt", "README.md", "info.json", "package.json"]
        texts = {
            f"{name}/{member}": data
            for name, package in [(s.name, s.package) for s in self.styles] + [("labels", self.labels)]
            for member, data in read_members(tarballs[package.name], said_in).items()
        }
        write_licences(folder, rows, texts)
