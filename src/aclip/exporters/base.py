"""The interface of an export format."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from aclip.errors import MissingDependencyError
from aclip.models import LoadedModel


@dataclass(frozen=True)
class Readback:
    """An export as its own library loads it.

    Attributes:
        encode_image: (B, 3, h, w) preprocessed pixels -> (B, D) features, normalised or not.
        encode_text: (B, T) tokens at full context -> (B, D); None without a text tower.
        preprocess: image -> (3, h, w), where the format has its own preprocessing.
        tokenize: texts -> (B, T), where the format has its own tokenizer; ids after the first EOT are ignored.
        logit_scale: multiplier of similarities, where the format stores it.
    """

    encode_image: Callable[[Float[Tensor, "B 3 h w"]], Float[Tensor, "B D"]]
    encode_text: Callable[[Int[Tensor, "B T"]], Float[Tensor, "B D"]] | None = None
    preprocess: Callable[[Image.Image], Float[Tensor, "3 h w"]] | None = None
    tokenize: Callable[[list[str]], Int[Tensor, "B T"]] | None = None
    logit_scale: float | None = None


class Exporter(ABC):
    """One export format. Models are on the CPU, in fp32 and evaluation mode.

    Attributes:
        library: what reads the format, as messages and the model card name it.
    """

    library: ClassVar[str]

    def check_supported(self, model: LoadedModel) -> None:  # noqa: B027 - most formats take any model
        """Check that the format can represent a model, before anything is written.

        Raises:
            UnsupportedModelError: it cannot; the message names formats that can.
            MissingDependencyError: writing or reading needs a package that is not installed.
        """

    @abstractmethod
    def write(self, model: LoadedModel, config: Mapping[str, Any], folder: Path) -> None:
        """Write everything but the model card into an empty folder; `config` is open_clip's `model_cfg`, complete."""

    @abstractmethod
    def read(self, folder: Path, model: LoadedModel) -> Readback:
        """Load what was written, with the library it is for."""

    @abstractmethod
    def usage(self, model: LoadedModel) -> str:
        """Return Python code for the model card that loads the export from `FOLDER` and computes features."""


def logit_multiplier(model: Any) -> float:
    """Return the multiplier of similarities; open_clip and transformers store its logarithm."""
    return float(model.logit_scale.exp().item())


def missing_package(package: str, extra: str) -> MissingDependencyError:
    """Return the error for an optional package that is not installed."""
    return MissingDependencyError(f"this export needs the package {package}: pip install 'attentive-clip[{extra}]'")


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that replaces it on success; on an error `folder` stays as it was."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
