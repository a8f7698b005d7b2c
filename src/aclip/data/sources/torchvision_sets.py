"""Published classification sets as torchvision lays them out on a disk: `torchvision:food101?root=/data&split=test`.

torchvision itself reads them and nothing is ever downloaded. Sets that are kept as pickles (CIFAR) are opened only if
their files have the published checksums, which torchvision compares first.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aclip.data.sources.base import RawSample, Source, Summary
from aclip.data.spec import Spec
from aclip.errors import BadSampleError, ConfigError, DataError, unknown_name

PREFIX = "torchvision:"


@dataclass(frozen=True)
class _Set:
    """How a set is opened.

    Attributes:
        kind: name of the class in `torchvision.datasets`.
        splits: that it has, with the arguments that choose each; one "all" where it has none.
    """

    kind: str
    splits: dict[str, dict[str, Any]]


def _splits(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in names}


_BY_FLAG: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_WHOLE: dict[str, dict[str, Any]] = {"all": {}}

SETS: dict[str, _Set] = {
    "caltech101": _Set("Caltech101", _WHOLE),
    "cars": _Set("StanfordCars", _splits("train", "test")),
    "cifar10": _Set("CIFAR10", _BY_FLAG),
    "cifar100": _Set("CIFAR100", _BY_FLAG),
    "clevr_count_all": _Set("CLEVRClassification", _splits("train", "val")),
    "country211": _Set("Country211", _splits("train", "valid", "test")),
    "dtd": _Set("DTD", _splits("train", "val", "test")),
    "eurosat": _Set("EuroSAT", _WHOLE),
    "fer2013": _Set("FER2013", _splits("train", "test")),
    "fgvc_aircraft": _Set("FGVCAircraft", _splits("train", "val", "trainval", "test")),
    "flowers": _Set("Flowers102", _splits("train", "val", "test")),
    "food101": _Set("Food101", _splits("train", "test")),
    "gtsrb": _Set("GTSRB", _splits("train", "test")),
    "mnist": _Set("MNIST", _BY_FLAG),
    "pcam": _Set("PCAM", _splits("train", "val", "test")),
    "pets": _Set("OxfordIIITPet", _splits("trainval", "test")),
    "renderedsst2": _Set("RenderedSST2", _splits("train", "val", "test")),
    "stl10": _Set("STL10", _splits("train", "test")),
    "sun397": _Set("SUN397", _WHOLE),
    "svhn": _Set("SVHN", _splits("train", "test")),
}
"""By the names under which clip-benchmark holds their class names and prompts."""


class TorchvisionSource(Source):
    """A set that torchvision reads, its classes as labels; images have no captions.

    Labels are class names where torchvision knows them, else numbers, of as many digits as the highest.

    Attributes:
        spec: the specification.
    """

    def __init__(self, spec: str, root: Path, split: str | None = None, labels: str = "name") -> None:
        """Open `torchvision:NAME` below `root`, the folder that torchvision would be given.

        Args:
            spec: the name with its prefix.
            root: the folder.
            split: of those the set has; None where it has none.
            labels: "name", or "number" for lists of class names in torchvision's order.

        Raises:
            ConfigError: an unknown set, split or kind of label.
            DataError: it is not there, or not whole.
        """
        short = spec.removeprefix(PREFIX)
        if short not in SETS:
            raise ConfigError(unknown_name("set of torchvision", short, SETS))
        known = SETS[short]
        if split is None and "all" in known.splits:
            split = "all"
        if split not in known.splits:
            raise ConfigError(f"'{spec}' has the splits {', '.join(known.splits)}: say which, as in "
                              f"'{spec}?root={root}&split={list(known.splits)[-1]}'")
        if labels not in ("name", "number"):
            raise ConfigError(unknown_name("kind of label", labels, ("name", "number")))
        self.spec = f"{spec}?root={root}&split={split}"
        self._set = _open(known, root, split, self.spec)
        self._names = _class_names(self._set) if labels == "name" else None
        self._short = short

    def __len__(self) -> int:
        return len(self._set)

    def name(self, index: int) -> str:
        """Return the set's name and the sample's number."""
        return f"{self._short} {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        """Return no captions."""
        return ()

    @property
    def summary(self) -> Summary:
        """All images, without captions."""
        return Summary(self.spec, len(self), 0, len(self))

    def read(self, index: int) -> RawSample:
        """Read an image, as PNG.

        Raises:
            BadSampleError: torchvision cannot read it.
        """
        try:
            image, target = self._set[index]
        except Exception as error:  # whatever a damaged file meets in torchvision's readers
            raise BadSampleError(f"torchvision cannot read it: {error}") from error
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG", compress_level=1)
        number = int(target)
        label = self._names[number] if self._names is not None and number < len(self._names) else f"{number:04d}"
        return RawSample(self.name(index), buffer.getvalue(), (), label=label)


def open_torchvision(spec: Spec) -> TorchvisionSource:
    """Open `torchvision:NAME?root=FOLDER&split=SPLIT`.

    Raises:
        ConfigError, DataError: as `TorchvisionSource`.
    """
    spec.allow("root", "split", "labels")
    if "root" not in spec.options:
        raise ConfigError(f"'{spec.text}': say where it lies, as in '{spec.path}?root=FOLDER&split=test'")
    return TorchvisionSource(spec.path, Path(spec.get("root", "")).expanduser(), spec.get("split"), spec.get("labels",
                                                                                                             "name"))


def _open(known: _Set, root: Path, split: str, name: str) -> Any:
    from torchvision import datasets

    kind: Callable[..., Any] = getattr(datasets, known.kind)
    try:
        return kind(root=str(root), **known.splits[split])
    except Exception as error:  # RuntimeError of a set that is not there, OSError, ImportError of a reader, ...
        raise DataError(f"torchvision cannot open '{name}': {error}; it wants the folder above the one that its own "
                        "download makes") from error


def _class_names(dataset: Any) -> list[str] | None:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else None
