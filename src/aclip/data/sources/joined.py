"""Several sources, one after the other, as one."""

from collections.abc import Sequence

from aclip.data.sources.base import RawSample, Runs, Source


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
        self._runs = Runs([len(source) for source in sources])

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._runs)

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
        number, index = self._runs.place(index)
        return self.sources[number], index
