"""Which pictures of a set belong to which of some classes."""

import logging
from collections.abc import Sequence

from aclip.errors import ConfigError
from aclip.evaluation.retrieval import distinct

logger = logging.getLogger(__name__)


def members(names: Sequence[str], classes: Sequence[str], kind: str) -> tuple[list[int], list[int]]:
    """Find the pictures that are of one of `classes`, and say how many are not.

    Args:
        names: the class of every picture; case and spacing do not matter.
        classes: class names, each once.
        kind: what to call them in messages, e.g. "given".

    Returns:
        The numbers of the pictures that are of one, and the number of each one's class.

    Raises:
        ConfigError: no picture is of any of them.
    """
    seen, numbers = distinct([*classes, *names])
    numbers = numbers[len(classes) :]
    kept = [i for i, number in enumerate(numbers) if number < len(classes)]
    if not kept:
        raise ConfigError(f"no picture of the set is of one of the {len(classes)} {kind} classes; "
                          f"the set has, for example: {', '.join(seen[len(classes):][:5])}")
    if len(kept) < len(names):
        logger.warning("%d of %d pictures are of none of the %s classes and are left out",
                       len(names) - len(kept), len(names), kind)
    return kept, [numbers[i] for i in kept]
