"""What an evaluation reads: an encoder and a set of pictures.

Both are protocols: anything with these attributes can be evaluated. The encoder has no argument for a
mask, so no evaluation can run on masked pictures.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

from jaxtyping import Float, Int
from torch import Tensor

Space = Literal["joint", "trunk"]
"""Where features lie: in the joint space with text, or before the projection into it, where probes read."""

Progress = Callable[[int], None]
"""Called after every batch with the number of pictures in it."""


class Encoder(Protocol):
    """A model as `aclip.load` returns it; one without a text tower encodes no text."""

    @property
    def tokenizer(self) -> Callable[[list[str]], Int[Tensor, "B T"]]:
        """Texts -> (B, T) int64 token ids."""

    @property
    def preprocess(self) -> Callable[[Any], Float[Tensor, "3 h w"]]:
        """PIL image -> (3, h, w) float32, normalised with the model's own mean and deviation."""

    def encode_image(
        self, pixels: Float[Tensor, "B 3 h w"], /, normalize: bool = True
    ) -> Float[Tensor, "B D"]:
        """Normalised pixels -> (B, D) features in the joint space, L2-normalised on request."""

    def encode_trunk(self, pixels: Float[Tensor, "B 3 h w"], /) -> Float[Tensor, "B C"]:
        """Normalised pixels -> (B, C) pooled tokens before the projection into the joint space."""

    def encode_text(self, tokens: Int[Tensor, "B T"], /, normalize: bool = True) -> Float[Tensor, "B D"]:
        """Token ids -> (B, D) features in the joint space, L2-normalised on request."""


class PictureBatch(Protocol):
    """Some pictures of an evaluation set, in the set's order."""

    @property
    def pixels(self) -> Float[Tensor, "B 3 h w"]:
        """(B, 3, h, w) float32, preprocessed for the encoder."""

    @property
    def captions(self) -> Sequence[str]:
        """The one caption of each picture."""

    @property
    def all_captions(self) -> Sequence[tuple[str, ...]]:
        """All captions of each picture, the one first."""

    @property
    def labels(self) -> Sequence[str | None]:
        """The class of each picture, where the source has one."""

    @property
    def keys(self) -> Sequence[str]:
        """The pictures' names."""


class PictureSet(Protocol):
    """Held-out pictures with captions; `aclip.data.EvaluationSet` is one."""

    def __iter__(self) -> Iterator[PictureBatch]:
        """Yield every usable picture once, in a fixed order."""

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        """After iteration, (name, reason) of every picture that could not be used."""
