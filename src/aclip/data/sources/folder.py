"""A folder of images: captions beside them, in a list among them, or from the names of class folders."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from aclip.data.captions import caption_lines, decode_text, guess_encoding, is_utf8
from aclip.data.decode import HEIC_EXTENSIONS, IMAGE_EXTENSIONS, reads_heic
from aclip.data.sources.base import PackedStrings, RawSample, Source, Summary, digest_of, evenly, printable
from aclip.data.sources.columns import CAPTION_COLUMNS, json_object, label_of, split_tags, texts
from aclip.data.sources.image_files import read_image
from aclip.data.sources.records import flat
from aclip.errors import BadSampleError, DataError

CLASS_TEMPLATES = ("a photo of a {}.",)  # captions of class folders, unless others are given
LIST_ENDINGS = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".token", ".lst", ".list",
                ".data", ".gz")  # fmt: skip
"""Endings of files that may list the images of a folder."""

SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "restval")

_TEXT_ENDINGS = ("txt", "caption", "captions")
_NUMBERED = re.compile(r"\d{4,}")  # folders that a downloader fills in turn are no classes
_MAP = re.compile(r"(.+?)[._-](?:masks?|depth|seg|segmentation|matte|normals?|edges?|canny|pose)", re.IGNORECASE)
_BOXES = re.compile(rb"(?:\s*\d+(?:[ \t]+-?[\d.]+(?:e-?\d+)?){4,}[ \t\r]*(?:\n|$))+\s*")  # YOLO: class and coordinates
_SAMPLED_TEXTS, _JUDGED = 200, 20


@dataclass
class Listing:
    """What lies in a folder and below, paths relative to it."""

    folder: Path
    images: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)  # path without ending -> the file of captions
    described: dict[str, str] = field(default_factory=dict)  # path without ending -> the `.json` file
    unread: Counter[str] = field(default_factory=Counter)  # ending -> images of kinds that cannot be read here
    links: int = 0  # folders left out because they are read where they lie
    maps: int = 0  # masks, depth maps and the like beside the images that they belong to, left out
    notes: list[str] = field(default_factory=list)  # on files that were taken for no captions

    @property
    def top(self) -> list[str]:
        """The folders directly below that hold images, sorted."""
        return sorted({path.partition("/")[0] for path in self.images if "/" in path})

    def captions_of(self, image: str) -> str:
        """Return the path of the caption file beside an image, "" for none."""
        found = (table.get(name) for table in (self.described, self.texts) for name in (_stem(image), image))
        return next(filter(None, found), "")


def list_folder(folder: Path) -> Listing:
    """List the files below `folder`, in linked folders too; names that begin with a dot are passed over."""
    found = Listing(folder)
    readable = IMAGE_EXTENSIONS | (HEIC_EXTENSIONS if reads_heic() else frozenset())
    for path in _walk(folder, found):
        stem, ending = os.path.splitext(path)
        kind = ending[1:].lower()
        if kind in readable:
            found.images.append(path)
        elif kind in HEIC_EXTENSIONS:
            found.unread[ending.lower()] += 1
        elif kind in _TEXT_ENDINGS:
            found.texts.setdefault(stem, path)
        elif kind == "json":
            found.described.setdefault(stem, path)
    stems = {_stem(path) for path in found.images}
    maps = {path for path in found.images if (match := _MAP.fullmatch(_stem(path))) and match[1] in stems}
    found.images, found.maps = sorted(set(found.images) - maps), len(maps)
    # Files beside images that hold boxes and outlines rather than captions, judged by some of them.
    beside_images = stems | set(found.images)
    for files, kind in ((found.texts, "boxes"), (found.described, "no captions")):
        own = [file for stem, file in files.items() if stem in beside_images]
        some = [own[at] for at in evenly(len(own), _JUDGED)]
        if some and not any(_has_caption(folder / file) for file in some):
            found.notes.append(f"{len(own):,} {os.path.splitext(some[0])[1]} files beside images hold {kind}")
            files.clear()
    return found


def _has_caption(path: Path) -> bool:
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".json":
            return bool(_captions_in(json_object(decode_text(data)))[0])
    except (OSError, BadSampleError):
        return True  # said when it is read
    return not _BOXES.fullmatch(data)


def _walk(folder: Path, found: Listing) -> Iterator[str]:
    """Yield the files below a folder, relative to it; a link is followed to a folder that is not read anyway."""

    def unreadable(error: OSError) -> None:
        if error.filename == str(folder):
            raise DataError(f"{folder} cannot be read: {error.strerror}") from error

    read = [Path(os.path.realpath(folder))]
    for parent, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and name != "__MACOSX"]
        for name in list(folders):
            if os.path.islink(os.path.join(parent, name)):
                real = Path(os.path.realpath(os.path.join(parent, name)))
                if any(real.is_relative_to(one) or one.is_relative_to(real) for one in read):
                    found.links += 1
                    folders.remove(name)
                else:
                    read.append(real)
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        yield from (name if below == "." else f"{below}/{name}" for name in sorted(names) if not name.startswith("."))


class FolderSource(Source):
    """Images found in a folder and below, in the order of their paths.

    `cats/tom.jpg` has the captions of `cats/tom.txt`, one a line, or of `cats/tom.json`, and the label "cats". Where
    an image has neither, its captions are the `templates` with the name of its folder in place of `{}`: "a photo of a
    tabby cat." for `tabby_cat/tom.jpg`.
    """

    def __init__(self, listing: Listing, templates: Sequence[str] = (), *, whole_texts: bool = False,
                 encoding: str | None = None) -> None:
        """Read a folder that was listed.

        If no image has a caption file, and all lie in two or more folders below, these are taken for classes, and
        `templates` is `CLASS_TEMPLATES`. With `whole_texts` a `.txt` file is one caption, line breaks and all.
        """
        self.spec = str(listing.folder)
        self._folder, self._whole, self._encoding = listing.folder, whole_texts, encoding
        self._unread, self._maps, self._notes = dict(listing.unread), listing.maps, list(listing.notes)
        if not listing.images:
            heic = (f"; {listing.unread.total()} {', '.join(listing.unread)} files are read with pip install "
                    "'attentive-clip[heic]'" if listing.unread else "")
            raise DataError(f"no images in {listing.folder}: looked there and below for "
                            f"{', '.join(sorted(IMAGE_EXTENSIONS))}{heic}")
        elsewhere = beside(listing)
        files = [listing.captions_of(image) or elsewhere.get(_below_top(image), "") for image in listing.images]
        self._images, self._texts = PackedStrings(listing.images), PackedStrings(files)
        self.templates = tuple(templates)
        self._with_text = sum(map(bool, files))
        if not self._with_text and not templates and _are_classes(
                parents := {PurePosixPath(path).parent.name for path in listing.images}):
            self.templates = CLASS_TEMPLATES
            self._notes.append(f"no caption files, so its {len(parents)} folders are classes: "
                               f"'{CLASS_TEMPLATES[0]}' ('?templates=...' says otherwise)")
        if self._with_text and (orphans := sorted(set(listing.texts.values()) - set(files))):
            self._notes.append(f"{len(orphans):,} text files have no image beside them: {printable(orphans[0])}")
        if listing.links:
            self._notes.append(f"{listing.links} linked folders are skipped: what they link to is read anyway")
        self._fallback = None if encoding else self._look_at_texts([one for one in files if one[-5:] != ".json"])

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return printable(self._images[index])

    def path(self, index: int) -> Path:
        return self._folder / self._images[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return self._described(index)[0]

    def read(self, index: int) -> RawSample:
        captions, tags, label = self._described(index)
        return RawSample(self.name(index), read_image(self.path(index)), captions, tags,
                         label or self._parent(index) or None)

    @property
    def summary(self) -> Summary:
        captioned = len(self) if self.templates else self._with_text
        left_out = {f"{ending} files: pip install 'attentive-clip[heic]' reads them": count
                    for ending, count in self._unread.items()}
        left_out["masks, depth maps and the like"] = self._maps
        found = len(self) + sum(left_out.values())
        return Summary(self.spec, found, captioned, len(self) - captioned, left_out, tuple(self._notes))

    def digest(self) -> str:
        return digest_of(self._images, self._texts, self.templates)

    def _described(self, index: int) -> tuple[tuple[str, ...], tuple[str, ...], str]:
        text = self._texts[index]
        if not text:
            words = " ".join(self._parent(index).replace("_", " ").split())
            return tuple(template.replace("{}", words) for template in self.templates if words), (), ""
        try:
            data = (self._folder / text).read_bytes()
        except OSError as error:
            raise BadSampleError(f"cannot read the file: {error.strerror}: {printable(text)}") from error
        if text.lower().endswith(".json"):
            return _captions_in(json_object(decode_text(data)))
        said = decode_text(data, self._encoding, self._fallback)
        return ((said,) if self._whole else caption_lines(said)), (), ""

    def _parent(self, index: int) -> str:
        return printable(PurePosixPath(self._images[index]).parent.name)

    def _look_at_texts(self, files: Sequence[str]) -> str | None:
        """Look at some text files; return the codec of those that are not UTF-8, if it can be told."""
        files = [file for file in files if file]
        odd, several, last = bytearray(), 0, ""
        for at in evenly(len(files), _SAMPLED_TEXTS):
            try:
                data = (self._folder / files[at]).read_bytes()
            except OSError:
                continue
            several += len(caption_lines(decode_text(data))) > 1
            if not is_utf8(data):
                odd, last = odd + data + b"\n", files[at]
        if several and not self._whole:
            self._notes.append(f"{several} of {min(len(files), _SAMPLED_TEXTS)} text files have several lines: each is "
                               "a caption of its own ('?captions=whole' makes a file one caption)")
        codec = guess_encoding(bytes(odd)) if odd and not odd.startswith((b"\xff\xfe", b"\xfe\xff")) else None
        if codec in (None, "utf-8-sig"):
            return None
        self._notes.append(f"{printable(last)} and others are read as {codec} where they are not UTF-8 "
                           "('?encoding=NAME' says otherwise)")
        return codec


def _captions_in(fields: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Return captions, tags and label of an object that describes one image."""
    plain = flat(fields)
    values = {name.lower().rpartition(".")[2]: plain[name] for name in reversed(plain)}
    ordered = ("captions", *(name for name in CAPTION_COLUMNS if name not in ("label", "category", "class")))
    captions = next((said for name in ordered if (said := texts(values.get(name)))), ())
    return captions, split_tags(texts(values.get("tags", values.get("keywords")))), label_of(values.get("label"))


def _are_classes(folders: set[str]) -> bool:
    """Return whether the folders right above the images are classes; "" is the source itself."""
    named = any(not _NUMBERED.fullmatch(name) and name.lower() not in SPLIT_NAMES for name in folders)
    return "" not in folders and len(folders) > 1 and named


def beside(listing: Listing) -> dict[str, str]:
    """Return an image's path below the topmost folder -> its caption file, where those lie in a folder beside it."""
    if len({file.partition("/")[0] for file in listing.texts.values() if "/" in file} - set(listing.top)) != 1:
        return {}
    files = [file for file in (*listing.texts.values(), *listing.described.values()) if "/" in file]
    by_path = {_below_top(file): file for file in files}
    if any(_below_top(image) in by_path for image in listing.images):
        return by_path
    by_name = {_stem(os.path.basename(file)): file for file in files}
    if len(by_name) < len(files):
        return {}
    named = ((_below_top(image), _stem(os.path.basename(image))) for image in listing.images)
    return {path: by_name[stem] for path, stem in named if stem in by_name}


def _below_top(path: str) -> str:
    return _stem(path.partition("/")[2])


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]
