"""Zero-shot classification by class names: class lists, prompt templates, accuracy, calibration.

The embedding of a class is the L2-normalised mean, over prompt templates, of the L2-normalised features of the
filled-in prompts (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from aclip.data.captions import decode_text
from aclip.errors import ConfigError, MissingDependencyError, unknown_name
from aclip.evaluation.base import Evaluation, Evaluator
from aclip.evaluation.features import ImageFeatures, TextEncoder
from aclip.evaluation.ranking import classify, in_chunks, widened
from aclip.evaluation.retrieval import distinct
from aclip.models import LoadedModel

DEFAULT_TEMPLATES = ("{}", "a picture of {}", "a photo of a {}", "an image of {}", "a drawing of {}")
"""Prompts for classes of any kind; `{}` stands for the class name."""

IMAGENET = ("imagenet", "imagenet-subset")
"""open_clip's 1,000 class names: all of them, or those of which the set has images (ImageNet-A, -R, -100)."""

OPEN_CLIP_TEMPLATES = ("openai", "simple")
"""open_clip's 80 ImageNet prompts of CLIP (arXiv 2103.00020), and the seven that do nearly as well."""

_PROMPTS_AT_ONCE = 4096  # bounds the features held while templates are averaged
_TABBED = "write a file with lines of LABEL<TAB>CLASS NAME"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassList:
    """Classes by the names that go into prompts, and what a set calls them.

    Attributes:
        names: for prompts.
        labels: what the set calls each class, all different; names may then repeat. None: the names.
        present_only: whether classes without any image in the set are left out.
        title: for messages.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    present_only: bool = False
    title: str = "given"

    def __post_init__(self) -> None:
        if len(self.names) < 2:
            raise ConfigError(f"zero-shot classification needs at least two classes, not {len(self.names)} "
                              f"({', '.join(self.names) or 'none'})")
        # prompts ignore case; the labels of a set may not (EMNIST's A and a)
        given = [spaced(name).casefold() for name in self.names] if self.labels is None else map(spaced, self.labels)
        duplicates = [name for name, count in Counter(given).items() if count > 1]
        if duplicates:
            raise ConfigError(f"class '{duplicates[0]}' is named twice")

    def indices(self, labels: Sequence[str]) -> list[int | None]:
        """Return the index of the class of each label: a class's own (`labels`) or its name; None for others.

        If no label is either and all are whole numbers, label i is class i, from 0; too large a one is a `ConfigError`.
        """
        found = list(map(class_finder(self.names, self.labels or ()), labels))
        numeric = all(label.isascii() and label.isdecimal() for label in labels)
        if not numeric or any(index is not None for index in found):
            return found
        numbers, classes = list(map(int, labels)), f"{len(self.names)} {self.title} classes"
        lowest, largest, last = min(numbers), max(numbers), len(self.names) - 1
        if largest > last:
            raise ConfigError(f"the set's labels are numbers up to {largest}, and the {classes} count from 0 to "
                              f"{last}: if labels count from 1, {_TABBED}")
        logger.log(logging.INFO if lowest == 0 else logging.WARNING, "labels are taken as numbers of the %s, from 0: "
                   "label %d is '%s'", classes, lowest, self.names[lowest])
        return [*numbers]


def class_finder(*lists: Sequence[str]) -> Callable[[str], int | None]:
    """Return what finds the index of a class by name: exactly, else ignoring case where that is unambiguous.

    White space and underscores are equal. The first class of a name counts, and its name in the last list of names.
    """
    table: dict[str, int] = {}
    for names in lists:
        written = {spaced(name): i for i, name in reversed(list(enumerate(names)))}
        spellings = Counter(name.casefold() for name in written)
        table |= {name.casefold(): i for name, i in written.items() if spellings[name.casefold()] == 1} | written
    return lambda label: table.get(spaced(label), table.get(spaced(label).casefold()))


def known_images(
    images: ImageFeatures, labels: Sequence[str], indices: Sequence[int | None], classes: str, hint: str = ""
) -> tuple[Float[Tensor, "K D"], Int[Tensor, " K"]]:
    """Return the features and classes of the images that have one; raise a `ConfigError` (with `hint`) if none has."""
    kept = [i for i, index in enumerate(indices) if index is not None]
    if not kept:
        raise ConfigError(f"no image of the set is of one of the {classes} classes; the set has, for example: "
                          f"{', '.join(sorted(set(labels))[:5])}{hint}")
    if len(kept) < len(images):
        logger.warning("%d of %d images are of none of the %s classes and are left out", len(images) - len(kept),
                       len(images), classes)
    device = images.features.device
    return images.features[torch.tensor(kept, device=device)], torch.tensor([indices[i] for i in kept], device=device)


def find_classes(spec: str) -> ClassList:
    """Return the classes of a file, or of a published set.

    A file holds on each line a class name, or the set's label, a tab and the class name; or a JSON list of names, or a
    JSON map of labels to names. Raises `ConfigError`, or `MissingDependencyError` for names in an optional package.
    """
    if Path(spec).is_file():
        try:
            return ClassList(*_parse_classes(decode_text(Path(spec).read_bytes())))
        except ConfigError as error:
            raise ConfigError(f"{spec}: {error}") from error
    if spec in IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES
        from timm.data.imagenet_info import ImageNetInfo

        identifiers = tuple(ImageNetInfo().label_names())
        return ClassList(tuple(IMAGENET_CLASSNAMES), identifiers, present_only=spec == "imagenet-subset", title=spec)
    return ClassList(_from_clip_benchmark("en_classnames", "class list or file", spec, IMAGENET), title=spec)


def find_templates(words: str | Sequence[str]) -> tuple[str, ...]:
    """Return prompt templates: each word is one itself, a file with one a line, or the name of a published list.

    `openai` and `simple` are open_clip's, `default` is this package's, others clip-benchmark's. The class goes where
    `{}` (in files also `{c}`) stands. Raises as `find_classes` does.
    """
    words = [words] if isinstance(words, str) else words
    return tuple(template.strip().replace("{c}", "{}") for word in words for template in _templates(word))


def _templates(word: str) -> Sequence[str]:
    if Path(word).is_file():
        return list(filter(str.strip, decode_text(Path(word).read_bytes()).splitlines()))
    if "{}" in word or " " in word:
        return (word,)
    if word == "default":
        return DEFAULT_TEMPLATES
    if word in OPEN_CLIP_TEMPLATES:
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        return [fill("{}") for fill in (OPENAI_IMAGENET_TEMPLATES if word == "openai" else SIMPLE_IMAGENET_TEMPLATES)]
    return _from_clip_benchmark("en_zeroshot_classification_templates", "template without {} or list of templates",
                                word, ("default", *OPEN_CLIP_TEMPLATES))


@dataclass(frozen=True)
class ZeroShot(Evaluator):
    """Top-1 and top-5 accuracy and the mean of the classes' top-1 accuracies, fractions in [0, 1].

    For metrics, ties and `details` see `ranking.classify`; counts are `pictures`, `classes`, `skipped` and
    `outside_classes` (images left out because they are of none of the classes).

    Attributes:
        classes: a `ClassList`, or names; None for the distinct labels of the set, or its distinct captions if an image
            has no label.
        templates: prompts with `{}` for the class name.
    """

    name = "zero_shot"
    classes: ClassList | tuple[str, ...] | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    def __post_init__(self) -> None:
        bad = [template for template in self.templates if "{}" not in template]
        if bad or not self.templates:
            what = f"prompt template '{bad[0]}' has no {{}} where the class name goes" if bad else "no prompt template"
            raise ConfigError(f"{what}: write one as 'a picture of {{}}'")
        if isinstance(self.classes, tuple):
            object.__setattr__(self, "classes", ClassList(self.classes))

    def measure(self, images: ImageFeatures, texts: TextEncoder) -> Evaluation:
        """See `Evaluator.measure`; raises a `ConfigError` if no image is of one of the classes, or all are of one."""
        labels = [label for label in images.labels if label is not None]
        if len(labels) < len(images):
            labels = [own[0] if own else str(label) for own, label in zip(images.captions, images.labels, strict=True)]
        classes = self.classes or _classes_of(labels)
        assert isinstance(classes, ClassList)
        names = classes.names
        if self.classes is None and None in images.labels and 2 * len(names) > len(images):
            logger.warning("images have no label, so %s takes their captions as classes, %d for %d images, which says "
                           "little about classification: name the classes with --classes, or evaluate retrieval",
                           self.name, len(names), len(images))
        features, targets = known_images(images, labels, classes.indices(labels), f"{len(names)} {classes.title}",
                                         f"; to join them, {_TABBED}")
        if classes.present_only:
            present, targets = targets.unique(return_inverse=True)
            names = tuple(names[i] for i in present.tolist())
        counts = {"pictures": len(features), "classes": len(names), "skipped": len(images.skipped),
                  "outside_classes": len(images) - len(features)}
        embeddings = class_embeddings(texts, names, self.templates)
        return Evaluation(self.name, counts=counts, **self._classify(features, embeddings, targets, names, texts.model))

    def _classify(
        self, features: Float[Tensor, "B D"], embeddings: Float[Tensor, "M D"], targets: Int[Tensor, " B"],
        classes: tuple[str, ...], model: LoadedModel,
    ) -> dict[str, Any]:
        return classify(lambda some: widened(some) @ widened(embeddings).T, features, targets, classes)


@dataclass(frozen=True)
class Calibration(ZeroShot):
    """Expected calibration error and negative log-likelihood of zero-shot classification.

    Probabilities are softmax(logit_scale x cosine) with the model's own, learned logit_scale.

        ECE = sum over bins b of n_b / n |accuracy(b) - mean confidence(b)|

    over `bins` bins (i / bins, (i + 1) / bins] of the confidence, the highest probability of an image (Guo et al. 2017,
    arXiv 1706.04599, equation 3); NLL = mean of -log p(right class), in nats. Metrics are `ece`, `nll`, `confidence`
    (mean) and `accuracy` (fraction of images whose likeliest class is right, the first of equally likely ones).
    `chance` of `nll` is that of equal probabilities, log M. `details` hold the reliability diagram.

    Attributes:
        bins: of the confidence.
    """

    name = "calibration"
    bins: int = 15

    def _classify(
        self, features: Float[Tensor, "B D"], embeddings: Float[Tensor, "M D"], targets: Int[Tensor, " B"],
        classes: tuple[str, ...], model: LoadedModel,
    ) -> dict[str, Any]:
        from torchmetrics.functional.classification import binary_calibration_error

        clip: Any = model.model
        scale = clip.logit_scale.exp().item()
        confidences, corrects, nll = [], [], 0.0
        for some, own in in_chunks(features, targets, len(classes)):
            logits = scale * some @ embeddings.T
            nll += float(F.cross_entropy(logits, own, reduction="sum"))
            best, guess = logits.softmax(dim=1).max(dim=1)
            confidences.append(best.cpu())
            corrects.append((guess == own).cpu())
        confidence, correct = torch.cat(confidences).double(), torch.cat(corrects).double()
        bins = _reliability(confidence, correct, self.bins)
        ece = float(binary_calibration_error(confidence, correct.long(), n_bins=self.bins, norm="l1"))
        return {"metrics": {"ece": ece, "nll": nll / len(features), "confidence": float(confidence.mean()),
                            "accuracy": float(correct.mean())},
                "chance": {"nll": math.log(len(classes)), "accuracy": 1 / len(classes)},
                "details": {"reliability": bins, "logit_scale": scale}}


def class_embeddings(texts: TextEncoder, classes: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "M D"]:
    """Embed classes by their names, (M, D) float32 and L2-normalised; the text encoder caches the result.

    e_c = normalise(mean over t of normalise(text(t filled with c)))
    """
    names = list(dict.fromkeys(classes))
    at_once = max(1, _PROMPTS_AT_ONCE // len(templates))

    def embed() -> Float[Tensor, "M D"]:
        embeddings = []
        for start in range(0, len(names), at_once):
            some = names[start : start + at_once]
            features = texts([template.replace("{}", name) for name in some for template in templates])
            embeddings.append(F.normalize(features.view(len(some), len(templates), -1).mean(dim=1), dim=-1))
        row = {name: i for i, name in enumerate(names)}
        return torch.cat(embeddings)[[row[name] for name in classes]]

    return texts.cached((tuple(classes), tuple(templates)), embed)


def _reliability(confidence: Float[Tensor, " B"], correct: Float[Tensor, " B"], bins: int) -> list[dict[str, Any]]:
    """Return accuracy and mean confidence of the images in each non-empty bin."""
    bin_of = torch.bucketize(confidence, torch.linspace(0, 1, bins + 1, dtype=confidence.dtype)) - 1
    return [{"from": i / bins, "to": (i + 1) / bins, "pictures": int((bin_of == i).sum()),
             "confidence": float(confidence[bin_of == i].mean()), "accuracy": float(correct[bin_of == i].mean())}
            for i in bin_of.unique().tolist()]


def _classes_of(labels: Sequence[str]) -> ClassList:
    kinds = list(dict.fromkeys(map(spaced, labels)))
    spelled, _ = distinct(kinds)
    if len(spelled) < len(kinds):
        logger.warning("%d labels of the set make %d classes, as prompts ignore case: to distinguish them, %s for "
                       "--classes", len(kinds), len(spelled), _TABBED)
    if len(spelled) < 2:
        raise ConfigError(f"zero-shot classification needs at least two classes, and all {len(labels)} images of the "
                          f"set are of class '{spelled[0]}': name the others with --classes")
    return ClassList(tuple(spelled))


def _parse_classes(text: str) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    if text.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not valid JSON: {error}") from error
        names, labels = (value, None) if isinstance(value, list) else (list(value.values()), tuple(value))
        if not all(isinstance(name, str) for name in names):
            raise ConfigError('JSON class files hold a list of names, ["cat", "dog"], or a map of labels to names, '
                              '{"n02123045": "tabby cat"}')
        return tuple(names), labels
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    untabbed = [line for line in lines if "\t" not in line]
    if len(untabbed) == len(lines):
        return tuple(lines), None
    if untabbed:
        raise ConfigError(f"'{untabbed[0]}' has no tab, and other lines have: {_TABBED}, or with class names only")
    columns = zip(*(line.split("\t", 1) for line in lines), strict=True)
    given, written = (tuple(map(str.strip, column)) for column in columns)
    return written, given


def _from_clip_benchmark(file: str, kind: str, name: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return a list that the package clip-benchmark ships, without importing it."""
    if Path(name).suffix or "/" in name:
        raise ConfigError(f"there is no file '{name}'")
    package = find_spec("clip_benchmark")
    if package is None or package.origin is None:
        raise MissingDependencyError(f"{unknown_name(kind, name, known)}; those of other published sets are in the "
                                     "package clip-benchmark: pip install clip-benchmark")
    content: dict[str, Any] = json.loads((Path(package.origin).parent / "datasets" / f"{file}.json").read_text("utf-8"))
    if name not in content:
        raise ConfigError(unknown_name(kind, name, (*known, *content)))
    return tuple(content[name])


def spaced(label: str) -> str:
    """Return a label with single spaces for underscores and any white space; case distinguishes labels."""
    return " ".join(label.replace("_", " ").split()) or label
