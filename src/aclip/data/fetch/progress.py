"""How a fetch tells what it is doing, without knowing who listens."""

from typing import Literal, Protocol

Unit = Literal["bytes", "pictures"]


class Progress(Protocol):
    """Receives the stages of a fetch, one after the other.

    The calls come from one thread, in order: `start`, any number of `advance`, the next `start`, ...
    """

    def start(self, stage: str, total: int, unit: Unit) -> None:
        """Begin a stage of `total` units; the stage before is over.

        Args:
            stage: what is done, in a word or two, e.g. "downloading".
            total: units of the whole stage.
            unit: what is counted.
        """
        ...

    def advance(self, amount: int, *, cached: bool = False) -> None:
        """Count `amount` more units as done.

        Args:
            amount: units done since the last call.
            cached: they were found done by an earlier call, so they say nothing about the rate.
        """
        ...


class Silent:
    """The progress nobody watches."""

    def start(self, stage: str, total: int, unit: Unit) -> None:
        """Do nothing."""

    def advance(self, amount: int, *, cached: bool = False) -> None:
        """Do nothing."""
