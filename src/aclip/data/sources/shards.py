"""WebDataset shards: tar files whose members of one name make one sample."""

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aclip import dist
from aclip.data.captions import caption_lines, decode_text
from aclip.data.progress import progress
from aclip.data.sources.base import (
    PackedStrings,
    RawSample,
    Source,
    Summary,
    digest_of,
    evenly,
    printable,
    relative_names,
)
from aclip.data.sources.columns import json_object, label_of, texts
from aclip.data.sources.shard_index import ABSENT, ROLES, UNDERSTOOD, Endings, ShardIndex, index_shard, local_index
from aclip.data.spec import Spec
from aclip.data.workers import read_ahead
from aclip.devices import usable_cores
from aclip.errors import BadSampleError, DataError

MAX_LOST = 0.1  # fraction of the shards that may be unreadable or out of reach before a source counts as unusable
MANY = 32  # new shards from which on processes share in reading headers: starting them takes as long as reading some
CAPTION_FIELDS = ("captions", "caption", "texts", "text", "prompt", "sentences", "alt_text", "title")
"""Fields of a sample's JSON that are taken for its captions, the first that holds any."""

_LOOKED_AT = 16  # samples by which captions are understood
_IMAGE, _TXT, _JSON, _CLS = range(len(ROLES))

_log = logging.getLogger(__name__)


class Reading(NamedTuple):
    """How members become captions, as the user chose."""

    endings: Endings = UNDERSTOOD
    field: str | None = None  # of the JSON
    whole: bool = False  # all of a `.txt` is one caption, not each line


def reading_of(spec: Spec) -> Reading:
    """Return what the options of a specification ask for; `caption` is an ending or a field of the JSON."""
    spec.allow("image", "caption", "captions")
    image, caption = ((spec.get(name) or "").lstrip(".") or None for name in ("image", "caption"))
    whole = spec.one_of("captions", ("lines", "whole")) == "whole"
    is_ending = caption is not None and caption.rpartition(".")[2].lower() in ("txt", "json")
    endings = Endings(image and image.lower(), caption.lower() if caption and is_ending else None)
    return Reading(endings, None if is_ending else spec.get("caption"), whole)


class ShardSource(Source):
    """Pairs in tar files of the WebDataset layout, read in any order.

    Members of one name are one sample: an image by its ending, `.txt` (captions, one a line), `.json` (an object with a
    caption or several, see `CAPTION_FIELDS`, and `tags`, `label`, `concept`) and `.cls` (a label). A caption in JSON is
    preferred to the `.txt`, which cannot tell a line break within a caption from two captions. A name ends at its first
    dot, or at a later one where that gives more pairs; endings may have several words (`.input.jpg`), and masks, depth
    maps and the like are not images of a pair (`aclip.data.sources.shard_index`).

    Headers are read once and cached; images are read by their offset. A member's name is never used as a path.
    """

    def __init__(self, spec: str, paths: Sequence[Path], reading: Reading = Reading(),  # noqa: B008 - immutable
                 index: ShardIndex | None = None) -> None:
        """Index the shards `paths`, in this order; `index` is that of the only shard, if it is at hand.

        Shards that cannot be read are left out and named, up to `MAX_LOST` of all; one that is listed twice is read
        once.
        """
        self.spec, self._reading = spec, reading
        paths = list(dict.fromkeys(paths))
        found: list[tuple[Path, ShardIndex]] = []
        lost: list[DataError] = []
        found_or_why = _index_all(spec, paths, reading.endings) if index is None else [index]
        for path, one in zip(paths, found_or_why, strict=True):
            if isinstance(one, str):
                lost.append(DataError(one))
                check_lost(spec, lost, len(paths))
                continue
            if one.damage:
                _log.warning("%s is damaged (%s): its first %d samples are used", path, one.damage, len(one.keys))
            if one.repeated:
                _log.warning("%s has %d members that repeat a name: the first of each is used", path, one.repeated)
            found.append((path, one))
        self._paths, indexes = [path for path, _ in found], [one for _, one in found]
        names = relative_names([path.as_posix() for path in self._paths])
        self._names = PackedStrings(printable(f"{name}/{one.keys[number]}")
                                    for name, one in zip(names, indexes, strict=True)
                                    for number in range(len(one.keys)))  # fmt: skip
        self._unused = sum((Counter(one.unused) for one in indexes), Counter())
        if not any(one.used for one in indexes):
            only = f" that is chosen, only {_dotted(self._unused)}" if self._unused else ""
            raise DataError(f"no samples in {spec}: its {len(found)} tar files hold no image{only}")
        self._members = np.concatenate([one.members for one in indexes])  # (n, roles, (offset, size)) in bytes
        self._shards = np.repeat(np.arange(len(found), dtype=np.int32), [len(one.keys) for one in indexes])
        self._notes = [] if index is not None else [*_image_notes(indexes, reading.endings), *self._caption_notes()]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> RawSample:
        parts = self._read_members(index, ROLES)
        if "image" not in parts:
            raise BadSampleError("no image in the shard")
        fields = self._fields(parts)
        label = decode_text(parts["cls"]) if "cls" in parts else fields.get("label")
        concept = label_of(fields.get("concept"))
        return RawSample(self.name(index), parts["image"], self._captions(parts, fields), texts(fields.get("tags")),
                         label_of(label) or None, concept or None)

    def captions(self, index: int) -> tuple[str, ...]:
        parts = self._read_members(index, ("txt", "json"))
        return self._captions(parts, self._fields(parts))

    @property
    def summary(self) -> Summary:
        has = self._members[:, :, 0] != ABSENT
        images = int(has[:, _IMAGE].sum())
        captioned = int((has[:, _IMAGE] & (has[:, _TXT] | has[:, _JSON])).sum())
        left_out = {}
        if self._unused:
            left_out[f"beside the image of their sample: {_dotted(self._unused)}"] = self._unused.total()
        return Summary(self.spec, images + self._unused.total(), captioned, images - captioned, left_out,
                       tuple(self._notes))

    def digest(self) -> str:
        return digest_of("shards", self._names, self._members)

    def _read_members(self, index: int, roles: Sequence[str]) -> dict[str, bytes]:
        path = self._paths[int(self._shards[index])]
        places = self._members[index].tolist()
        try:
            # Opened for every sample: no handle to share with a fork, or to run out of.
            with open(path, "rb", buffering=0) as file:
                parts = {}
                for role, (offset, size) in zip(ROLES, places, strict=True):
                    if offset != ABSENT and role in roles:
                        file.seek(offset)
                        parts[role] = file.read(size)
                        if len(parts[role]) != size:
                            raise BadSampleError("the shard has been truncated since it was opened")
        except OSError as error:
            raise BadSampleError(f"cannot read {path.name}: {error.strerror}") from error
        return parts

    def _fields(self, parts: Mapping[str, bytes]) -> dict[str, Any]:
        if "json" not in parts:
            return {}
        try:
            return json_object(parts["json"])
        except BadSampleError:
            if "txt" not in parts:
                raise
            return {}

    def _captions(self, parts: Mapping[str, bytes], fields: Mapping[str, Any]) -> tuple[str, ...]:
        endings, field, whole = self._reading
        names = CAPTION_FIELDS if field is None else (field,)
        found = next((said for name in names if (said := texts(fields.get(name)))), ())
        if "txt" not in parts or (found and not (endings.caption or "").endswith("txt")):
            return found
        text = decode_text(parts["txt"])
        return (text,) if whole else caption_lines(text)

    def _caption_notes(self) -> list[str]:
        """Look at some samples; return what should be said of how their captions are read."""
        lines = fields = captioned = 0
        names: Counter[str] = Counter()
        for index in evenly(len(self), _LOOKED_AT):
            try:
                parts = self._read_members(index, ("txt", "json"))
                found = self._fields(parts)
                captions = self._captions(parts, found)
            except BadSampleError:
                continue
            from_text = "txt" in parts and captions == caption_lines(decode_text(parts["txt"]))
            lines += from_text and len(captions) > 1
            fields += bool(found)
            captioned += any(caption.strip() for caption in captions)
            names.update(name for name, value in found.items() if isinstance(value, str))
        notes = []
        if lines:
            notes.append("each line of a .txt is a caption of its own ('?captions=whole' takes the lines together)")
        if fields and not captioned:
            known = ", ".join(name for name, _ in names.most_common(9))
            notes.append(f"no caption in the JSON, whose texts are {known or 'none'}: choose one with '?caption=FIELD'")
        return notes


def _index_all(spec: str, paths: Sequence[Path], endings: Endings) -> list[ShardIndex | str]:
    """Return the index of every shard, or why there is none.

    Those that are not cached are read by as many processes as this one has cores, if they are many. Each rank begins
    with another part of them, and finds in the cache what other ranks have read meanwhile.
    """
    found: dict[Path, Any] = {path: cached for path in paths if (cached := local_index(path, endings)) is not None}
    new = [path for path in paths if path not in found]
    first = len(new) * dist.rank() // dist.world_size()
    new = new[first:] + new[:first]
    workers = max(1, usable_cores() // dist.processes_here()) if len(new) >= MANY else 0
    with progress(f"indexing {spec}", len(new), "shards") as advance:
        answers = read_ahead(functools.partial(_index, endings=endings), new, workers=workers)
        for path, index in zip(new, answers, strict=True):
            found[path] = index
            advance(1)
    return [found[path] for path in paths]


def _index(path: Path, endings: Endings) -> ShardIndex | str:
    try:
        return local_index(path, endings) or index_shard(path, endings)
    except DataError as error:
        return str(error)


def _image_notes(indexes: Sequence[ShardIndex], endings: Endings) -> Iterator[str]:
    used = sum((Counter(index.used) for index in indexes), Counter[str]())
    compound = [ending for ending, _ in used.most_common() if "." in ending]
    if compound and endings.image is None:
        yield f"images from {_dotted(compound)}"
    if rivals := sorted({ending for index in indexes for ending in index.rivals} - {endings.image}):
        yield f"samples have several images, the others end in {_dotted(rivals)}: choose with '?image={rivals[0]}'"


def _dotted(endings: Iterable[str]) -> str:
    return ", ".join(f".{ending}" for ending in endings)


def check_lost(spec: str, lost: Sequence[DataError], shards: int) -> None:
    """Log that a shard is left out."""
    if len(lost) <= MAX_LOST * shards:
        _log.warning("a shard of %s is left out: %s", spec, lost[-1])
        return
    if shards == 1:
        raise lost[0]
    raise DataError(f"{len(lost)} of the {shards} shards of {spec} cannot be used, and at most {MAX_LOST:.0%} may be "
                    f"lost; the first: {lost[0]}")
