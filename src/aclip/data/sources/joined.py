"""Several sources, one after the other, as one."""

from collections.abc import Sequence

import numpy as np

from aclip.data.sources.base import RawSample, Source


class Joined:
    """The samples of several sources, numbered through: what `lists/{a,b}.csv` names.

    Attributes:
        name: what the user called it.
        sources: in their order.
    """

    def __init__(self, name: str, sources: Sequence[Source]) -> None:
        """Join `sources`, at least one."""
        self.name = name
        self.sources = tuple(sources)
        self._ends = np.cumsum([len(source) for source in sources], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        """Return the name of the source and of the sample in it."""
        source, index = self._place(index)
        return f"{source.name}: {source.key(index)}"

    def read(self, index: int) -> RawSample:
        """Read sample `index`.

        Raises:
            BadSampleError: as the source that has it.
        """
        source, index = self._place(index)
        return source.read(index)

    def _place(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        return source, index - int(self._ends[number]) + len(source)
