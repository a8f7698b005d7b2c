"""What every export format provides: a refusal, a writer, and a reader of another library to check it with."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from aclip.errors import MissingDependencyError
from aclip.models import LoadedModel, preprocess_config


@dataclass(frozen=True)
class Subject:
    """A model to be handed out.

    Attributes:
        model: in evaluation mode, fp32, on the CPU.
        config: open_clip's `model_cfg` of it, complete.
        name: how people call it: the run's folder name, or the model's.
    """

    model: LoadedModel
    config: Mapping[str, Any]
    name: str

    @property
    def preprocess(self) -> dict[str, Any]:
        """open_clip's `preprocess_cfg`: size, mean, std, interpolation, resize_mode."""
        return preprocess_config(self.model.model)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the input in pixels."""
        size = self.preprocess["size"]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def context_length(self) -> int:
        """T, the tokens that the text tower reads."""
        return int(self.config["text_cfg"].get("context_length", 77))

    @property
    def logit_scale(self) -> float | None:
        """What similarities are multiplied with, already exponentiated; None without text."""
        return multiplier(self.model.model) if self.model.has_text else None

    @property
    def logit_bias(self) -> float | None:
        """What is added to multiplied similarities (SigLIP); None where the model has none."""
        bias = getattr(self.model.model, "logit_bias", None)
        return None if bias is None else float(bias.detach())


@dataclass(frozen=True)
class Readback:
    """An exported model as its own library loads it.

    Attributes:
        encode_image: (B, 3, h, w) preprocessed pixels -> (B, D) features, normalised or not.
        encode_text: (B, T) tokens at full context -> (B, D), or None without text.
        preprocess: a picture -> (3, h, w), where the format brings its own.
        tokenize: texts -> (B, T), where the format brings its own; ids after the first EOT do not count.
        logit_scale: what the format says similarities are multiplied with.
    """

    encode_image: Callable[[Float[Tensor, "B 3 h w"]], Float[Tensor, "B D"]]
    encode_text: Callable[[Int[Tensor, "B T"]], Float[Tensor, "B D"]] | None = None
    preprocess: Callable[[Image.Image], Float[Tensor, "3 h w"]] | None = None
    tokenize: Callable[[list[str]], Int[Tensor, "B T"]] | None = None
    logit_scale: float | None = None


class ExportFormat(ABC):
    """One format; the contract tests run over all that are in `EXPORTS`.

    Attributes:
        about: one line for lists. library: what reads it, as the model card names it.
    """

    about: ClassVar[str]
    library: ClassVar[str]

    @abstractmethod
    def check_can_represent(self, subject: Subject) -> None:
        """Check before anything is written.

        Raises:
            UnsupportedModelError: what this format cannot represent, and which can.
            MissingDependencyError: a package that writing or checking needs.
        """

    @abstractmethod
    def write(self, subject: Subject, folder: Path) -> None:
        """Write all files but the model card into an empty folder."""

    @abstractmethod
    def read(self, folder: Path, subject: Subject) -> Readback:
        """Load what was written, with the library that it is for."""

    @abstractmethod
    def usage(self, subject: Subject) -> str:
        """Return lines of Python that load it and compute features, for the model card."""


def multiplier(model: Any) -> float:
    """Return what a model multiplies similarities with; open_clip and transformers hold its logarithm."""
    return float(model.logit_scale.detach().exp())


def missing(package: str, extra: str, purpose: str) -> MissingDependencyError:
    """Return the error for an optional package that is not installed."""
    return MissingDependencyError(f"{purpose} needs the package {package}: pip install 'attentive-clip[{extra}]'")


def fp32_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state, fp32 where it is of floats, each tensor with memory of its own."""
    return {name: (t.float() if t.is_floating_point() else t).detach().cpu().contiguous().clone()
            for name, t in module.state_dict().items()}
