"""A folder of pictures, each with its captions in a `.txt` file of the same name beside it."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from aclip.data.captions import caption_lines, decode_text
from aclip.data.decode import IMAGE_EXTENSIONS
from aclip.data.sources.base import PackedStrings, RawSample, printable
from aclip.errors import BadSampleError, DataError

CLASS_TEMPLATES = ("a photo of a {}.",)
"""Captions of class folders, unless others are given."""

_log = logging.getLogger(__name__)


class FolderSource:
    """Pictures found in a folder and below, in the order of their paths.

    `cats/tom.jpg` has the captions of `cats/tom.txt`, one a line, and the label "cats". Names that begin
    with a dot are passed over. Where a picture has no text file, its captions are the `templates` with the name of
    its folder in place of `{}`: "a photo of a tabby cat." for `tabby_cat/tom.jpg`.

    Attributes:
        name: the folder.
        templates: for pictures without a text file; none leaves them without a caption.
    """

    def __init__(self, folder: Path, templates: Sequence[str] = ()) -> None:
        """List the pictures in `folder`.

        If there is no text file at all, and every picture lies in a folder below, these are taken for classes:
        `templates` is then `CLASS_TEMPLATES`, and that is logged.

        Raises:
            DataError: there are none.
        """
        self.name = str(folder)
        self._folder = folder
        pictures, texts = _list_files(folder)
        if not pictures:
            raise DataError(
                f"no pictures in {folder}: looked there and below for {', '.join(sorted(IMAGE_EXTENSIONS))}"
            )
        orphans = sorted(texts - {_stem(path) for path in pictures})
        if orphans:
            _log.warning(
                "%s: %d text files have no picture beside them, e.g. %s.txt", folder, len(orphans), orphans[0]
            )
        self._pictures = PackedStrings(sorted(pictures))
        self.templates = tuple(templates)
        if not texts and not templates and all("/" in path for path in pictures):
            self.templates = CLASS_TEMPLATES
            _log.info("%s: no text files, so the folders' names are the captions: '%s'", folder, CLASS_TEMPLATES[0])

    def __len__(self) -> int:
        return len(self._pictures)

    def key(self, index: int) -> str:
        """Return the picture's path below the folder."""
        return printable(self._pictures[index])

    def read(self, index: int) -> RawSample:
        """Read a picture and its captions.

        Raises:
            BadSampleError: a file that cannot be read.
        """
        picture = self._pictures[index]
        path = self._folder / picture
        try:
            image = path.read_bytes()
            text = path.with_suffix(".txt")
            captions = caption_lines(decode_text(text.read_bytes())) if text.is_file() else None
        except OSError as error:
            raise BadSampleError(f"cannot read the file: {error.strerror}") from error
        parent = printable(PurePosixPath(picture).parent.name)
        if captions is None:
            words = " ".join(parent.replace("_", " ").split())
            captions = tuple(template.replace("{}", words) for template in self.templates if words)
        return RawSample(self.key(index), image, captions, label=parent or None)


def holds_pictures(folder: Path) -> bool:
    """Return whether `folder` or a folder below it has a picture, by file name."""
    return bool(_list_files(folder)[0])


def holds_texts(folder: Path) -> bool:
    """Return whether `folder` or a folder below it has a `.txt` file beside a picture."""
    pictures, texts = _list_files(folder)
    return not texts.isdisjoint(map(_stem, pictures))


def _list_files(folder: Path) -> tuple[list[str], set[str]]:
    """Return the pictures' paths and the text files' paths without their ending, below `folder`."""
    pictures: list[str] = []
    texts: set[str] = set()
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name).relative_to(folder).as_posix()
            if _is_picture(name):
                pictures.append(path)
            elif name.endswith(".txt") and not name.startswith("."):
                texts.add(_stem(path))
    return pictures, texts


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
