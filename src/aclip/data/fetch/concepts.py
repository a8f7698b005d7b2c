"""What the sets of emoji have in common: names, splits, and the samples of pictures that show a concept.

The splits are fixed by a stable hash, so that results stay comparable: with h(s) = first 8 hex digits of
sha1(s) / 2^32, a concept is held out if h("concept" + code) < 0.10, in all sets alike. Each set also holds some styles
out whole.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from aclip.data.fetch.iconify import Concept
from aclip.data.fetch.packages import Package
from aclip.data.fetch.shards import shuffled, unit_hash
from aclip.data.tar_files import Sample
from aclip.errors import DataError

HELD_OUT_SHARE = 0.10
SPLITS = ("train", "val_vendor", "val_concept", "val_both")

LABELS = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", 6_711_091
)


def split_of(code: str, style_held_out: bool) -> str:
    """Return the split of a picture.

    Args:
        code: of its concept, see `iconify.concept_code`.
        style_held_out: whether its style is.
    """
    if unit_hash(f"concept{code}") < HELD_OUT_SHARE:
        return "val_both" if style_held_out else "val_concept"
    return "val_vendor" if style_held_out else "train"


@dataclass(frozen=True)
class Depiction:
    """One concept in one style; a subclass knows where the picture comes from.

    Attributes:
        style: who drew it.
        licence: of the picture.
        concept: what it shows.
    """

    style: str
    licence: str
    concept: Concept

    @property
    def key(self) -> str:
        """The sample's name."""
        return f"{self.style}-{self.concept.code}"

    def sample(self, png: bytes) -> Sample:
        """Return the sample with the picture `png`."""
        concept = self.concept
        facts = {
            "caption": concept.label,
            "tags": concept.tags,
            "label": concept.label,
            "concept": concept.code,
            "group": concept.group,
            "style": self.style,
            "licence": self.licence,
        }
        text = json.dumps(facts, ensure_ascii=False)
        return Sample(self.key, {"png": png, "json": text.encode(), "txt": concept.label.encode()})


AnyDepiction = TypeVar("AnyDepiction", bound=Depiction)


def into_splits(
    pictures: Iterable[AnyDepiction], held_out: Collection[str], counts: Mapping[str, int] | None
) -> dict[str, list[AnyDepiction]]:
    """Return the pictures of each split in the order of the shards.

    Args:
        pictures: all of the set.
        held_out: the styles that are never trained on.
        counts: pictures by split that must come out; None takes what comes.

    Raises:
        DataError: others came out.
    """
    splits: dict[str, list[AnyDepiction]] = {split: [] for split in SPLITS}
    for picture in pictures:
        splits[split_of(picture.concept.code, picture.style in held_out)].append(picture)
    found = {split: len(some) for split, some in splits.items()}
    if counts is not None and found != dict(counts):
        raise DataError(f"the packages hold {found} pictures where {dict(counts)} were expected")
    for some in splits.values():
        some.sort(key=lambda picture: shuffled(picture.key))
    return splits


def summarise(
    name: str, splits: Mapping[str, Sequence[Depiction]], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """Return what `dataset.json` says of a set: its name, its splits, and what was skipped with the reason."""
    summary = {}
    for split, pictures in splits.items():
        used = [picture for picture in pictures if picture.key not in skipped]
        summary[split] = {
            "samples": len(used),
            "captions": len({picture.concept.label for picture in used}),
            "styles": sorted({picture.style for picture in used}),
        }
    return {"name": name, "splits": summary, "skipped": dict(skipped)}
