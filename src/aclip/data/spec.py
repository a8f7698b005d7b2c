"""What a user writes to name data: `PATH?option=value&option=value[first:last]=weight`.

The path may be a file, a folder, a pattern (`shards/{0000..0099}.tar`, `lists/*.csv`), an address (`s3://...`) or a set
(`emoji:train`). **A path that exists exactly as written is that path**, whatever syntax its name looks like, and so is
the value of an option; where a name would still be taken for syntax, `%26` writes `&`, `%3F` writes `?` and `%3D` `=`.
"""

import difflib
import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote

from aclip.errors import ConfigError, DataError, unknown_name
from aclip.files import data_root

OPTIONS = ("image", "caption", "tags", "label", "images", "split", "encoding", "templates", "captions", "labels",
           "root", "stretch")  # fmt: skip
"""Every option that some source takes."""

_QUERY = re.compile(r"\?(?=\w+=)")
_SLICE = re.compile(r"(.+)\[(-?\d*):(-?\d*)\]", re.DOTALL)
_WEIGHT = re.compile(r"(.+)=([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf)", re.DOTALL)
_UNFINISHED_QUERY = re.compile(r".*[?&]\w+", re.DOTALL)
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_BRACES = re.compile(r"\{([^{}]*)\}")
_QUOTING = "in a value, write %26 for an & that another name and = follow"
_MOST_FILES = 1_000_000


@dataclass(frozen=True)
class Spec:
    """A parsed specification."""

    text: str  # as the user wrote it
    path: str  # file, folder, pattern, address or set; `~` expanded
    options: Mapping[str, str] = field(default_factory=dict)  # name -> value, as written
    part: tuple[int, int | None] | None = None  # of the samples, the last exclusive or None for the end
    weight: float | None = None  # of the source in a mixture

    def allow(self, *known: str) -> None:
        """Refuse other options."""
        for name in self.options:
            if name not in known:
                raise ConfigError(f"'{self.text}': {unknown_name('option', name, known)}")

    def get(self, name: str) -> str | None:
        """Return an option's value with its %XX decoded, or None without the option."""
        value = self.options.get(name)
        return None if value is None else unquote(value)

    def one_of(self, name: str, known: Sequence[str]) -> str:
        """Return an option's value, the first of `known` without the option."""
        value = self.get(name) or known[0]
        if value not in known:
            raise ConfigError(f"'{self.text}': {unknown_name(f'value of {name!r}', value, known)}")
        return value

    def without(self, name: str) -> "Spec":
        """Return the specification without an option."""
        return replace(self, options={one: value for one, value in self.options.items() if one != name})

    def folder(self, name: str) -> Path | None:
        """Return the folder that an option names, or None without the option."""
        if name not in self.options:
            return None
        folder = Path(as_named(self.options[name], os.path.isdir)).expanduser()
        for one in (folder, Path(self.path).parent / folder):
            if one.is_dir():
                return one
        raise ConfigError(f"'{self.text}': the folder '{folder}' of '{name}=' does not exist, neither as it is written "
                          f"nor beside {Path(self.path).name}")

    def with_path(self, path: str | Path) -> "Spec":
        """Return the same options for another path, without part and weight."""
        query = "&".join(f"{name}={value}" for name, value in self.options.items())
        text = f"{path}?{query}" if query else str(path)
        return replace(self, text=text, path=str(path), part=None, weight=None)


def as_named(value: str, exists: Callable[[str], bool]) -> str:
    """Return the value of an option as written if that `exists`, else with its %XX decoded."""
    return value if exists(value) or "%" not in value else unquote(value)


def parse_spec(text: str) -> Spec:
    """Parse a specification; nothing is opened, only the existence of paths is looked at.

    >>> parse_spec("a.csv?image=file&caption=Q&A[:10]=2").options
    {'image': 'file', 'caption': 'Q&A'}

    Raises:
        ConfigError: an unknown or empty option, a negative slice, or a weight that is not positive.
    """
    path = os.path.expanduser(text)
    weight: float | None = None
    if os.path.exists(path):
        return Spec(text, path)
    if (match := _WEIGHT.fullmatch(path)) and not _is_value(path, match[1]):
        weight, path = float(match[2]), match[1]
        if not 0.0 < weight < math.inf:
            raise ConfigError(f"the weight of '{path}' must be a positive number, not {match[2]}")
    part: tuple[int, int | None] | None = None
    while not os.path.exists(path) and (match := _SLICE.fullmatch(path)):
        path, start, end = match.groups()
        if "-" in start + end:
            raise ConfigError(f"'{match[0]}': a part takes no negative numbers, it is counted from the first sample: "
                              f"'{path}[:1000]' is the first thousand, '{path}[1000:]' the rest")
        first, last = part or (0, None)  # a part of this part
        ends = [int(end)] if end else []
        ends += [] if last is None else [int(start or 0) + last]
        part = int(start or 0) + first, min(ends, default=None)
    if os.path.exists(path):
        return Spec(text, path, part=part, weight=weight)
    path, options = _split_query(text, path)
    if options and not os.path.exists(path) and (match := _SLICE.fullmatch(path)):
        query = "&".join(f"{name}={value}" for name, value in options.items())
        raise ConfigError(f"'{text}': a part comes after the options, as in '{match[1]}?{query}{path[len(match[1]):]}'")
    return Spec(text, path, options, part, weight)


def _is_value(text: str, head: str) -> bool:
    """Return whether the number at the end of `text`, behind `head` and "=", belongs to an option's value."""
    if _UNFINISHED_QUERY.fullmatch(head):
        return True
    value = re.split(r"[?&]\w+=", text)[-1]
    return value != text and os.path.exists(os.path.expanduser(value))


def _split_query(text: str, path: str) -> tuple[str, dict[str, str]]:
    """Return the path and its options: the first `?name=` whose front exists starts them, else the first of all."""
    starts = [match.start() for match in _QUERY.finditer(path) if match.start()]
    if not starts:
        return path, {}
    start = next((one for one in starts if os.path.exists(path[:one])), starts[0])
    fields = re.split(r"(?:^|&)(\w+)=", path[start + 1 :])[1:]
    options = dict(zip(fields[::2], fields[1::2], strict=True))
    for name, value in options.items():
        if name not in OPTIONS:
            raise ConfigError(f"'{text}': {unknown_name('option', name, OPTIONS)} ({_QUOTING})")
        if not value:
            raise ConfigError(f"'{text}': the option '{name}' is empty")
    return path[:start], options


def split_name(text: str) -> tuple[str | None, str]:
    """Return the name and the specification of `NAME=SPEC`; None and all of it where it has no name.

    >>> split_name("val=pairs.csv"), split_name("pairs.csv")
    (('val', 'pairs.csv'), (None, 'pairs.csv'))
    """
    match = _NAMED.fullmatch(text)
    if match is None or os.path.exists(os.path.expanduser(text)):
        return None, text
    whole = parse_spec(text)
    if os.path.exists(whole.path) or ("=" in whole.path and expand_paths(whole.path, missing_ok=True)):
        return None, text
    return match[1], match[2]


def expand_paths(pattern: str, missing_ok: bool = False) -> list[Path]:
    """Return the files that a path, glob or brace pattern names, sorted within each pattern.

    `{0000..0012}` counts with leading zeros, `{train,val}` lists.

    Raises:
        DataError: a file of a brace pattern or path that does not exist, or a glob that matches nothing.
    """
    if os.path.exists(pattern):
        return [Path(pattern)]
    paths: list[Path] = []
    missing: list[str] = []
    for one in expand_braces(pattern):
        found = [one] if os.path.isfile(one) else sorted(glob.glob(one, recursive=True))
        paths.extend(Path(path) for path in found)
        if not found:
            missing.append(one)
    if missing and not missing_ok:
        if os.path.exists(front := re.sub(r"\[[\d:]*$", "", pattern)):
            raise DataError(f"no such file: {pattern}; a part of a source ends with ], as in '{front}[:1000]'")
        several = f" ({len(missing)} missing, {len(paths)} found for {pattern})" if missing != [pattern] else ""
        raise DataError(f"no such file: {missing[0]}{several}")
    return paths


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield what a pattern with braces stands for; a pattern without is itself."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    choices: Sequence[str] = match[1].split(",")
    if counted := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = map(int, counted.groups())
        if last - first > _MOST_FILES:
            raise ConfigError(f"'{pattern}' expands to more than {_MOST_FILES:,} files: check the braces")
        choices = [str(number).zfill(len(counted[1])) for number in range(first, last + 1)]
    for choice in choices:
        yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def is_pattern(path: str) -> bool:
    """Return whether a path that does not exist may be a pattern of files."""
    return "{" in path or glob.has_magic(path)


ACCEPTED = (
    "WebDataset shards (a .tar file, 'shards/{0000..0012}.tar', a folder of them, or the same behind s3:// or http://)",
    "a list of images and captions (CSV, TSV, JSON, JSON lines, COCO or Karpathy captions)",
    "Parquet, Arrow or a folder that save_to_disk wrote",
    "a folder of images with captions beside them or in a list, or of class folders",
    "a set as torchvision lays it out ('torchvision:food101?root=FOLDER&split=test')",
    "a set that was fetched ('emoji:train')",
)


def _missing(path: str) -> DataError:
    """Return the error for a path that does not exist: what it may have been meant to be, or what can be given."""
    folder = os.path.dirname(path)
    with suppress(OSError):
        near = difflib.get_close_matches(os.path.basename(path), os.listdir(folder or "."), n=1)
        if near:
            return DataError(f"'{path}' does not exist: did you mean '{os.path.join(folder, near[0])}'?")
    return DataError(f"'{path}' does not exist: give {'; '.join(ACCEPTED)}")


def absolute(text: str) -> str:
    """Return `[NAME=]SPEC` with the relative paths in it made absolute; addresses and names of sets stay.

    A run keeps its data this way, so that it can be resumed from another working folder.
    """
    name, rest = split_name(text)
    spec = parse_spec(rest)
    for before, path in (("", spec.path), ("images=", spec.get("images"))):
        if path and "://" not in path and not os.path.isabs(path) and (os.path.exists(path) or is_pattern(path)):
            rest = rest.replace(before + path, before + os.path.join(os.getcwd(), path), 1)
    return rest if name is None else f"{name}={rest}"


# Data sets that have been fetched by name

DESCRIPTION = "dataset.json"  # file of a set's folder that is written when the set is complete
_SET = re.compile(r"([A-Za-z][\w-]+)(?::([\w-]*))?")  # two letters, as C: is a drive


def split_sizes(folder: Path) -> dict[str, int]:
    """Return the number of samples in each split of a complete set; empty for any other folder."""
    try:
        splits = json.loads((folder / DESCRIPTION).read_bytes())["splits"]
        return {split: int(facts["samples"]) for split, facts in splits.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def locate(path: str) -> str:
    """Return where a source lies: a file, a folder (of `NAME:SPLIT`, too), a pattern, an address, or torchvision's.

    Raises:
        DataError: there is nothing of this name.
    """
    if path.startswith("file://") and not os.path.exists(path):
        path = unquote(path.removeprefix("file://"))
    known = os.path.isfile(path) or os.path.isdir(path) or is_pattern(path)
    if known or "://" in path or path.startswith("torchvision:"):
        return path
    match = None if os.path.exists(path) else _SET.fullmatch(path)
    if match is None:
        raise _missing(path)
    name, split = match.groups()
    folder = data_root() / name
    splits = split_sizes(folder)
    if split in splits:
        return str(folder / split)
    if splits:
        choices = ", ".join(f"{name}:{one}" for one in splits)
        raise DataError(f"'{path}' names no split of the data set '{name}': there are {choices}")
    if split is None:
        raise _missing(path)
    raise DataError(f"'{path}' does not exist, and the data set '{name}' is not in {folder.parent}: fetch it with "
                    f"`aclip data fetch {name}`")
