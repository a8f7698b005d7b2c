"""Which pictures of a set belong to which of some classes."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from aclip.errors import ConfigError
from aclip.evaluation.retrieval import distinct

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassList:
    """Classes that pictures are told apart by.

    A set may call them otherwise than prompts do: by an identifier (`labels`), by their number in the list (labels
    that are all whole numbers, see `first_number`), or, if `in_order`, by anything whose sorted order is that of the
    list, as the folders of many published sets are.

    Attributes:
        names: that go into prompts.
        labels: what the set calls each of them, all different; the names may then repeat. None: the names alone.
        in_order: whether labels that are not all among the names stand for the classes in their sorted order.
        present_only: whether classes of which the set has no picture are left out.
        title: what to call them in messages.
        first_number: of the first class, where labels are numbers; None is 0 if a label is 0, and 1 if none is and the
            last class has a label then.

    Raises:
        ConfigError: fewer than two classes, or one that is there twice.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    in_order: bool = False
    present_only: bool = False
    title: str = "given"
    first_number: int | None = None

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ConfigError(f"zero-shot classification tells classes apart: {len(self.names)} of them "
                              f"({', '.join(self.names) or 'none'}) is not enough")
        given = self.names if self.labels is None else self.labels
        # prompts do not tell upper and lower case apart, the labels of a set may (EMNIST's A and a)
        twice = first_repeated([_key(name) if self.labels is None else _spaced(name) for name in given])
        if twice is not None:
            raise ConfigError(f"class '{given[twice]}' is named twice: every class of a zero-shot evaluation once")

    def numbers(self, labels: Sequence[str]) -> list[int | None]:
        """Return the number of the class that each label stands for, or None for one that is none of them.

        Raises:
            ConfigError: no label is one, their sorted order cannot be matched, or nothing tells where numbers begin.
        """
        find = _Finder(self.names, self.labels or ())
        kinds = sorted(set(labels))
        if all(label.isdecimal() for label in kinds):
            kinds.sort(key=int)  # folders 1, 2, ..., 10 are in the order of their numbers, not 1, 10, 2
        known = [label for label in kinds if find(label) is not None]
        if known and (len(known) == len(kinds) or not self.in_order):
            return [find(label) for label in labels]
        first = self._first_number(kinds)
        if first is not None and any(0 <= int(label) - first < len(self.names) for label in kinds):
            logger.info("labels %s to %s are taken for numbers of the %d %s classes, from %d", kinds[0], kinds[-1],
                        len(self.names), self.title, first)
            counted = (int(label) - first for label in labels)
            return [number if 0 <= number < len(self.names) else None for number in counted]
        if self.in_order and len(kinds) == len(self.names) and 2 * len(known) < len(kinds):
            logger.warning("the set's %d classes are taken for the %s ones in sorted order: '%s' for '%s', '%s' for "
                           "'%s'", len(kinds), self.title, kinds[0], self.names[0], kinds[-1], self.names[-1])
            order = {label: i for i, label in enumerate(kinds)}
            return [order[label] for label in labels]
        some = ", ".join(kinds[:5])
        if 2 * len(known) >= len(kinds):  # nearly the same names: not another way to call them
            others = ", ".join([label for label in kinds if find(label) is None][:5])
            raise ConfigError(f"{len(known)} of the set's {len(kinds)} classes are {self.title} classes by name, but "
                              f"not: {others}; give a file with lines of the set's label, a tab, and the class name")
        if self.in_order:
            raise ConfigError(f"the set has {len(kinds)} classes, for example: {some}; the {len(self.names)} "
                              f"{self.title} classes can be matched by their names, or by order where there are as "
                              "many: else give a file with lines of the set's label, a tab, and the class name")
        raise ConfigError(f"no picture of the set is of one of the {len(self.names)} {self.title} classes; "
                          f"the set has, for example: {some}; a file with lines of the set's label, a tab, and the "
                          "class name joins them")

    def _first_number(self, kinds: Sequence[str]) -> int | None:
        """Return where labels, sorted, begin to count the classes; None if they are no numbers of classes.

        Raises:
            ConfigError: they are, and may begin at 0 or at 1: a wrong guess would shift every class.
        """
        if not all(label.isdecimal() and label.isascii() for label in kinds):
            return None
        if self.first_number is not None:
            return self.first_number
        lowest, highest, last = int(kinds[0]), int(kinds[-1]), len(self.names)
        if lowest == 0:
            return 0 if highest < last else None
        if highest < last:
            raise ConfigError(f"the set's labels are numbers, {kinds[0]} to {kinds[-1]}, of {last} {self.title} "
                              f"classes, and as neither 0 nor {last} is there, nothing tells whether they count from "
                              "0 or from 1: say so with --first-label")
        return 1 if highest == last else None


def classes_of(labels: Sequence[str]) -> ClassList:
    """Return the distinct labels of a set as classes, underscores as spaces.

    Raises:
        ConfigError: there is only one.
    """
    kinds, _ = told_apart(labels)
    spelled, _ = distinct(kinds)
    if len(spelled) < len(kinds):
        logger.warning("%d labels of the set make %d classes, for prompts do not tell upper and lower case apart: a "
                       "file for --classes, with lines of the label, a tab, and a class name, does", len(kinds),
                       len(spelled))
    if len(spelled) < 2:
        raise ConfigError(f"zero-shot classification tells classes apart, and all {len(labels)} pictures of the set "
                          f"are of class '{spelled[0]}': name the others with --classes")
    return ClassList(tuple(spelled))


def first_repeated(names: Sequence[str]) -> int | None:
    """Return the place of the first name that has been there before, or None."""
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name in seen:
            return i
        seen.add(name)
    return None


def told_apart(labels: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the distinct labels, spaces and underscores as single spaces, and the number of each picture's.

    Case tells them apart: a set means what it writes, such as EMNIST with its 62 classes, A beside a.
    """
    first: dict[str, int] = {}
    numbers = [first.setdefault(_spaced(label), len(first)) for label in labels]
    return list(first), numbers


def members(names: Sequence[str], classes: Sequence[str], kind: str) -> tuple[list[int], list[int]]:
    """Find the pictures that are of one of `classes`, and say how many are not.

    Args:
        names: the class of every picture; spacing does not matter, nor does case where it tells no classes apart.
        classes: class names, each once.
        kind: what to call them in messages, e.g. "training".

    Returns:
        The numbers of the pictures that are of one, and the number of each one's class.

    Raises:
        ConfigError: no picture is of any of them.
    """
    find = _Finder(classes)
    numbers = [find(name) for name in names]
    others = dict.fromkeys(name for name, number in zip(names, numbers, strict=True) if number is None)
    return among(numbers, len(classes), kind, list(others))


def among(
    numbers: Sequence[int | None], classes: int, kind: str, others: Sequence[str] = ()
) -> tuple[list[int], list[int]]:
    """Return the numbers of the pictures that have a class, and the class of each; see `members`."""
    kept = [i for i, number in enumerate(numbers) if number is not None]
    if not kept:
        raise ConfigError(f"no picture of the set is of one of the {classes} {kind} classes; "
                          f"the set has, for example: {', '.join(others[:5])}")
    if len(kept) < len(numbers):
        logger.warning("%d of %d pictures are of none of the %s classes and are left out",
                       len(numbers) - len(kept), len(numbers), kind)
    return kept, [number for number in numbers if number is not None]


class _Finder:
    """Finds the number of a class by one of its names: as written, or in other case where that means no other class.

    Of a name that several classes of a list have, the first counts; later lists go before earlier ones.
    """

    def __init__(self, *lists: Sequence[str]) -> None:
        self._numbers: dict[str, int] = {}
        for names in lists:
            written = {_spaced(name): i for i, name in reversed(list(enumerate(names)))}
            spellings = Counter(map(_key, written))
            self._numbers |= {_key(name): i for name, i in written.items() if spellings[_key(name)] == 1} | written

    def __call__(self, label: str) -> int | None:
        return self._numbers.get(_spaced(label), self._numbers.get(_key(label)))


def _spaced(label: str) -> str:
    return " ".join(label.replace("_", " ").split()) or label


def _key(label: str) -> str:
    return _spaced(label).casefold()
