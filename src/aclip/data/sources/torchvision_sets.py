"""Published classification sets as torchvision lays them out on a disk: `torchvision:food101?root=/data&split=test`.

torchvision itself reads them and nothing is ever downloaded. Sets that are kept as pickles (CIFAR) are opened only if
their files have the published checksums, which torchvision compares first.
"""

import io
from pathlib import Path
from typing import Any

from aclip.data.sources.base import RawSample, Source, Summary
from aclip.data.spec import Spec
from aclip.errors import BadSampleError, ConfigError, DataError, unknown_name

PREFIX = "torchvision:"

SETS: dict[str, tuple[str, ...]] = {
    "caltech101": ("Caltech101",),
    "cars": ("StanfordCars", "train", "test"),
    "cifar10": ("CIFAR10", "train", "test"),
    "cifar100": ("CIFAR100", "train", "test"),
    "clevr_count_all": ("CLEVRClassification", "train", "val"),
    "country211": ("Country211", "train", "valid", "test"),
    "dtd": ("DTD", "train", "val", "test"),
    "eurosat": ("EuroSAT",),
    "fer2013": ("FER2013", "train", "test"),
    "fgvc_aircraft": ("FGVCAircraft", "train", "val", "trainval", "test"),
    "flowers": ("Flowers102", "train", "val", "test"),
    "food101": ("Food101", "train", "test"),
    "gtsrb": ("GTSRB", "train", "test"),
    "mnist": ("MNIST", "train", "test"),
    "pcam": ("PCAM", "train", "val", "test"),
    "pets": ("OxfordIIITPet", "trainval", "test"),
    "renderedsst2": ("RenderedSST2", "train", "val", "test"),
    "stl10": ("STL10", "train", "test"),
    "sun397": ("SUN397",),
    "svhn": ("SVHN", "train", "test"),
}
"""Classes of `torchvision.datasets` and their splits, by the names that clip-benchmark gives the sets."""

_SPLIT_IS_FLAG = ("CIFAR10", "CIFAR100", "MNIST")  # `train=True` or False


class TorchvisionSource(Source):
    """A set that torchvision reads, its classes as labels; images have no captions.

    Labels are class names where torchvision knows them and `labels` is not "number", else numbers of four digits.
    """

    def __init__(self, spec: Spec) -> None:
        """Open `torchvision:NAME?root=FOLDER&split=SPLIT`."""
        from torchvision import datasets

        spec.allow("root", "split", "labels")
        root, split, labels = spec.get("root"), spec.get("split"), spec.one_of("labels", ("name", "number"))
        if root is None:
            raise ConfigError(f"'{spec.text}': say where it lies, as in '{spec.path}?root=FOLDER&split=test'")
        self._short = spec.path.removeprefix(PREFIX)
        if self._short not in SETS:
            raise ConfigError(unknown_name("set of torchvision", self._short, SETS))
        kind, *splits = SETS[self._short]
        if (split or "all") not in (known := splits or ["all"]):
            raise ConfigError(f"'{spec.path}' has the splits {', '.join(known)}: say which, as in "
                              f"'{spec.path}?root={root}&split={known[-1]}'")
        self.spec = f"{spec.path}?root={root}&split={split or 'all'}"
        chosen: dict[str, Any] = {"train": split == "train"} if kind in _SPLIT_IS_FLAG else {"split": split}
        try:
            self._set = getattr(datasets, kind)(root=str(Path(root).expanduser()), **(chosen if splits else {}))
        except Exception as error:  # RuntimeError of a set that is not there, OSError, ImportError of a reader, ...
            raise DataError(f"torchvision cannot open '{self.spec}': {error}; root must be the "
                            "parent of the folder that torchvision's download creates") from error
        names = getattr(self._set, "classes", None) or getattr(self._set, "categories", None)
        self._names = list(map(str, names)) if labels == "name" and isinstance(names, list | tuple) else []

    def __len__(self) -> int:
        return len(self._set)

    def name(self, index: int) -> str:
        return f"{self._short} {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        return ()

    @property
    def summary(self) -> Summary:
        return Summary(self.spec, len(self), 0, len(self))

    def read(self, index: int) -> RawSample:
        """Read an image, as PNG."""
        try:
            image, target = self._set[index]
        except Exception as error:  # whatever a damaged file meets in torchvision's readers
            raise BadSampleError(f"torchvision cannot read it: {error}") from error
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG", compress_level=1)
        number = int(target)
        label = self._names[number] if number < len(self._names) else f"{number:04d}"
        return RawSample(self.name(index), buffer.getvalue(), (), label=label)
