"""Zero-shot classification by class names: class lists, prompt templates, accuracy, calibration.

The embedding of a class is the L2-normalised mean, over prompt templates, of the L2-normalised features of the
filled-in prompts (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from aclip.errors import ConfigError, MissingDependencyError, UnsupportedModelError, unknown_name
from aclip.evaluation.base import Evaluation, Evaluator
from aclip.evaluation.features import ImageFeatures, TextEncoder
from aclip.evaluation.ranking import CHUNK_ELEMENTS, accuracies, confusions, rank_both_ways
from aclip.evaluation.retrieval import distinct

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

    Raises:
        ConfigError: fewer than two classes, or a duplicate.
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
        given = map(_folded, self.names) if self.labels is None else map(_spaced, self.labels)
        duplicates = [name for name, count in Counter(given).items() if count > 1]
        if duplicates:
            raise ConfigError(f"class '{duplicates[0]}' is named twice")

    def indices(self, labels: Sequence[str]) -> list[int | None]:
        """Return the index of the class of each label, or None for a label of no class.

        A label is a class's own (`labels`) or its name. If no label is either and all are whole numbers, label i is
        class i, from 0.

        Raises:
            ConfigError: no label has a class, or a number is too large.
        """
        find = ClassFinder(self.names, self.labels or ())
        kinds = sorted(set(labels))
        if any(find(label) is not None for label in kinds):
            return [find(label) for label in labels]
        if not all(label.isascii() and label.isdecimal() for label in kinds):
            raise ConfigError(f"no image of the set is of one of the {len(self.names)} {self.title} classes; the set "
                              f"has, for example: {', '.join(kinds[:5])}; to join them, {_TABBED}")
        largest = max(map(int, kinds))
        if largest >= len(self.names):
            raise ConfigError(f"the set's labels are numbers up to {largest}, and the {len(self.names)} {self.title} "
                              f"classes count from 0 to {len(self.names) - 1}: if labels count from 1, {_TABBED}")
        lowest = min(kinds, key=int)
        logger.log(logging.INFO if int(lowest) == 0 else logging.WARNING,
                   "labels are taken as numbers of the %d %s classes, from 0: label %s is '%s'", len(self.names),
                   self.title, lowest, self.names[int(lowest)])
        return [int(label) for label in labels]


class ClassFinder:
    """Finds the index of a class by name: exactly, else ignoring case where that is unambiguous.

    White space and underscores are equal. Of a name that several classes have, the first counts; later lists of names
    take precedence over earlier ones.
    """

    def __init__(self, *lists: Sequence[str]) -> None:
        self._indices: dict[str, int] = {}
        for names in lists:
            written = {_spaced(name): i for i, name in reversed(list(enumerate(names)))}
            spellings = Counter(name.casefold() for name in written)
            folded = {name.casefold(): i for name, i in written.items() if spellings[name.casefold()] == 1}
            self._indices |= folded | written

    def __call__(self, label: str) -> int | None:
        return self._indices.get(_spaced(label), self._indices.get(_folded(label)))


def distinct_labels(labels: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the distinct labels, spaces and underscores as single spaces, and the index of each image's.

    Case distinguishes labels: EMNIST has 62 classes, A beside a.
    """
    first: dict[str, int] = {}
    numbers = [first.setdefault(_spaced(label), len(first)) for label in labels]
    return list(first), numbers


def select_known(
    indices: Sequence[int | None], classes: int, title: str, labels: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Return the positions of the images that have a class, and the class of each; log how many have none.

    Raises:
        ConfigError: none has.
    """
    kept = [i for i, index in enumerate(indices) if index is not None]
    if not kept:
        raise ConfigError(f"no image of the set is of one of the {classes} {title} classes; the set has, for example: "
                          f"{', '.join(list(dict.fromkeys(labels))[:5])}")
    if len(kept) < len(indices):
        logger.warning("%d of %d images are of none of the %s classes and are left out", len(indices) - len(kept),
                       len(indices), title)
    return kept, [index for index in indices if index is not None]


def find_classes(spec: str) -> ClassList:
    """Return the classes of a file, or of a published set.

    Files hold one class name a line, or on each line the set's label, a tab and the class name, or a JSON list of
    names, or a JSON map of labels to names. A file takes precedence over a set of the same name.

    Raises:
        ConfigError: neither; or an unreadable file, fewer than two classes, or a duplicate.
        MissingDependencyError: a set whose names are in an optional package.
    """
    if Path(spec).is_file():
        text = _read_text(Path(spec))
        try:
            return _parse_classes(text)
        except ConfigError as error:
            raise ConfigError(f"{spec}: {error}") from error
    if spec in IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES
        from timm.data.imagenet_info import ImageNetInfo

        identifiers = tuple(ImageNetInfo().label_names())
        return ClassList(tuple(IMAGENET_CLASSNAMES), identifiers, present_only=spec == "imagenet-subset", title=spec)
    if Path(spec).suffix or "/" in spec:
        raise ConfigError(f"there is no file '{spec}' with class names")
    return ClassList(tuple(_from_clip_benchmark("en_classnames", "class list or file", spec, IMAGENET)), title=spec)


def find_templates(words: str | Sequence[str]) -> tuple[str, ...]:
    """Return prompt templates: each word is one itself, a file with one a line, or the name of a published list.

    `openai` and `simple` are open_clip's, `default` is this package's, others clip-benchmark's. The class goes where
    `{}` (in files also `{c}`) stands.

    Raises:
        ConfigError: an unknown name, or a template without a place for the class.
        MissingDependencyError: a list in an optional package.
    """
    words = [words] if isinstance(words, str) else words
    return tuple(template for word in words for template in _templates(word))


def _templates(word: str) -> tuple[str, ...]:
    if "{}" in word:
        return (word,)
    if Path(word).is_file():
        found = tuple(filter(None, (line.strip().replace("{c}", "{}") for line in _read_text(Path(word)).splitlines())))
        try:
            check_templates(found)
        except ConfigError as error:
            raise ConfigError(f"{word}: {error}") from error
        return found
    if word == "default":
        return DEFAULT_TEMPLATES
    if word in OPEN_CLIP_TEMPLATES:
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        functions = OPENAI_IMAGENET_TEMPLATES if word == "openai" else SIMPLE_IMAGENET_TEMPLATES
        return tuple(fill("{}") for fill in functions)
    if " " in word:
        check_templates((word,))
    if Path(word).suffix or "/" in word:
        raise ConfigError(f"there is no file '{word}' with templates")
    published = _from_clip_benchmark("en_zeroshot_classification_templates", "template without {} or list of templates",
                                     word, ("default", *OPEN_CLIP_TEMPLATES))
    return tuple(text.replace("{c}", "{}") for text in published)


def check_templates(templates: Sequence[str]) -> None:
    """Raise a `ConfigError` if there is no template, or one without `{}`."""
    if not templates:
        raise ConfigError("zero-shot classification needs at least one prompt template, e.g. 'a picture of {}'")
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"prompt template '{template}' has no {{}} where the class name goes, "
                              "e.g. 'a picture of {}'")


@dataclass(frozen=True)
class NamedClasses(Evaluator):
    """An evaluator that classifies images by the names of the classes.

    Attributes:
        classes: a `ClassList`, or names; None for the distinct labels of the set, or its distinct captions if an image
            has no label.
        templates: prompts with `{}` for the class name.

    Raises:
        ConfigError: no template, a template without `{}`, a duplicate class, or fewer than two.
    """

    classes: ClassList | tuple[str, ...] | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    def __post_init__(self) -> None:
        check_templates(self.templates)
        if isinstance(self.classes, tuple):
            object.__setattr__(self, "classes", ClassList(self.classes))

    def targets(self, images: ImageFeatures) -> tuple[tuple[str, ...], list[int], list[int]]:
        """Return the class names, the images that are of one, and the class of each.

        Raises:
            ConfigError: no image is of one of the classes, or all are of one.
        """
        labels = [label for label in images.labels if label is not None]
        if len(labels) < len(images):
            labels = [caption or str(label) for caption, label in zip(images.captions, images.labels, strict=True)]
        classes = self.classes or _classes_of(labels)
        assert isinstance(classes, ClassList)
        if self.classes is None and None in images.labels and 2 * len(classes.names) > len(images):
            logger.warning("images have no label, so %s takes their captions as classes, %d for %d images, which says "
                           "little about classification: name the classes with --classes, or evaluate retrieval",
                           self.name, len(classes.names), len(images))
        kept, indices = select_known(classes.indices(labels), len(classes.names), classes.title, labels)
        if classes.present_only:
            present = sorted(set(indices))
            return tuple(classes.names[i] for i in present), kept, [present.index(i) for i in indices]
        return classes.names, kept, indices

    def count(self, images: ImageFeatures, kept: int, classes: int) -> dict[str, int]:
        """Return the counts of an evaluation."""
        return {"pictures": kept, "classes": classes, "skipped": len(images.skipped),
                "outside_classes": len(images) - kept}


@dataclass(frozen=True)
class ZeroShot(NamedClasses):
    """Top-1 and top-5 accuracy and the mean of the classes' top-1 accuracies, fractions in [0, 1].

    Metrics are `top1`, `top5` (of more than five classes) and `mean_per_class`; counts are `pictures`, `classes`,
    `skipped` and `outside_classes` (images left out because they are of none of the classes). Ties count against the
    model, see `aclip.evaluation.ranking`; of classes with equal names (ImageNet has two such pairs), which no model can
    distinguish, the first counts as nearer. `details` hold the accuracy of every class and its confusions.
    """

    name = "zero_shot"

    def measure(self, images: ImageFeatures, texts: TextEncoder) -> Evaluation:
        """See `Evaluator.measure`.

        Raises:
            ConfigError: no image is of one of the classes, or all are of one.
        """
        classes, kept, indices = self.targets(images)
        embeddings = class_embeddings(texts, classes, self.templates)
        targets = torch.tensor(indices, device=embeddings.device)
        features = images.features[torch.tensor(kept, device=embeddings.device)]
        numbers = torch.arange(len(classes), device=embeddings.device)
        found = rank_both_ways(features, embeddings, targets, numbers)
        targets = targets.cpu()
        rank = found.queries - _later_namesakes(classes)[targets]
        return Evaluation(self.name, *accuracies(rank, targets, len(classes)),
                          self.count(images, len(kept), len(classes)),
                          details=confusions(classes, targets, rank, found.nearest))


@dataclass(frozen=True)
class Calibration(NamedClasses):
    """Expected calibration error and negative log-likelihood of zero-shot classification.

    Probabilities are softmax(logit_scale x cosine) with the model's own, learned logit_scale.

        ECE = sum over bins b of n_b / n |accuracy(b) - mean confidence(b)|

    over `bins` bins of equal width of the confidence, the highest probability of an image (Guo et al. 2017, arXiv
    1706.04599, equation 3); NLL = mean of -log p(right class), in nats. Metrics are `ece`, `nll`, `confidence` (mean)
    and `accuracy` (fraction of images whose likeliest class is right, the first of equally likely ones). `chance` of
    `nll` is that of equal probabilities, log M. `details` hold the reliability diagram.

    Attributes:
        bins: of the confidence.
    """

    name = "calibration"
    bins: int = 15

    def measure(self, images: ImageFeatures, texts: TextEncoder) -> Evaluation:
        """See `Evaluator.measure`.

        Raises:
            ConfigError: no image is of one of the classes, or all are of one.
            UnsupportedModelError: the model has no logit_scale.
        """
        from torchmetrics.functional.classification import binary_calibration_error

        classes, kept, indices = self.targets(images)
        embeddings = class_embeddings(texts, classes, self.templates)
        scale = _logit_scale(texts.model)
        targets = torch.tensor(indices, device=embeddings.device)
        features = images.features[torch.tensor(kept, device=embeddings.device)]
        rows = max(1, CHUNK_ELEMENTS // len(classes))
        confidences, corrects, nll = [], [], 0.0
        for some, own in zip(features.split(rows), targets.split(rows), strict=True):
            logits = scale * some @ embeddings.T
            nll += float(F.cross_entropy(logits, own, reduction="sum"))
            best, guess = logits.softmax(dim=1).max(dim=1)
            confidences.append(best.cpu())
            corrects.append((guess == own).cpu())
        # torchmetrics gives a confidence of exactly 1 a bin of its own
        confidence, correct = torch.cat(confidences).double().clamp(max=1 - 1e-9), torch.cat(corrects)
        metrics = {"ece": float(binary_calibration_error(confidence, correct.long(), n_bins=self.bins, norm="l1")),
                   "nll": nll / len(kept), "confidence": float(confidence.mean()),
                   "accuracy": float(correct.double().mean())}
        chance = {"nll": float(torch.tensor(len(classes)).log()), "accuracy": 1 / len(classes)}
        return Evaluation(self.name, metrics, chance, self.count(images, len(kept), len(classes)), details={
            "reliability": _reliability(confidence, correct, self.bins), "logit_scale": scale})


def class_embeddings(texts: TextEncoder, classes: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "M D"]:
    """Embed classes by their names; the text encoder caches the result.

    e_c = normalise(mean over t of normalise(text(t filled with c)))

    Returns:
        (M, D) float32, L2-normalised, in the order of `classes`; classes of equal names have equal rows.
    """
    names = list(dict.fromkeys(classes))
    at_once = max(1, _PROMPTS_AT_ONCE // len(templates))

    def embed() -> Float[Tensor, "M D"]:
        embeddings = []
        for start in range(0, len(names), at_once):
            some = names[start : start + at_once]
            features = texts.encode([template.replace("{}", name) for name in some for template in templates])
            embeddings.append(F.normalize(features.view(len(some), len(templates), -1).mean(dim=1), dim=-1))
        row = {name: i for i, name in enumerate(names)}
        return torch.cat(embeddings)[[row[name] for name in classes]]

    return texts.cached((tuple(classes), tuple(templates)), embed)


def _later_namesakes(classes: Sequence[str]) -> Int[Tensor, " M"]:
    """Return how many later classes have the name of each."""
    left = Counter(classes)
    later = []
    for name in classes:
        left[name] -= 1
        later.append(left[name])
    return torch.tensor(later)


def _reliability(confidence: Float[Tensor, " B"], correct: Bool[Tensor, " B"], bins: int) -> list[dict[str, Any]]:
    """Return accuracy and mean confidence of the images in each non-empty bin [i / bins, (i + 1) / bins)."""
    bin_of = torch.bucketize(confidence, torch.linspace(0, 1, bins + 1, dtype=confidence.dtype), right=True) - 1
    return [{"from": i / bins, "to": (i + 1) / bins, "pictures": int((bin_of == i).sum()),
             "confidence": float(confidence[bin_of == i].mean()),
             "accuracy": float(correct[bin_of == i].double().mean())} for i in bin_of.unique().tolist()]


def _logit_scale(model: Any) -> float:
    """Return the factor of cosines: exp of the model's parameter `logit_scale`."""
    while not isinstance(parameter := getattr(model, "logit_scale", None), Tensor) and hasattr(model, "model"):
        model = model.model  # `LoadedModel`, or what wraps it, around open_clip's own
    if not isinstance(parameter, Tensor):
        raise UnsupportedModelError("this model has no logit_scale, so its similarities are not probabilities")
    return float(parameter.detach().float().exp())


def _classes_of(labels: Sequence[str]) -> ClassList:
    """Return the distinct labels of a set as classes, underscores as spaces."""
    kinds, _ = distinct_labels(labels)
    spelled, _ = distinct(kinds)
    if len(spelled) < len(kinds):
        logger.warning("%d labels of the set make %d classes, as prompts ignore case: to distinguish them, %s for "
                       "--classes", len(kinds), len(spelled), _TABBED)
    if len(spelled) < 2:
        raise ConfigError(f"zero-shot classification needs at least two classes, and all {len(labels)} images of the "
                          f"set are of class '{spelled[0]}': name the others with --classes")
    return ClassList(tuple(spelled))


def _parse_classes(text: str) -> ClassList:
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return _classes_from_json(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"not valid JSON: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError("no class names: write one a line")
    pairs = [(label.strip(), name.strip()) for label, _, name in (line.partition("\t") for line in lines)]
    tabbed = [bool(name) for _, name in pairs]
    if any(tabbed) and not all(tabbed):
        raise ConfigError(f"'{lines[tabbed.index(False)]}' has no tab, and other lines have: write "
                          "LABEL<TAB>CLASS NAME on every line, or class names only")
    labels = tuple(label for label, _ in pairs)
    return ClassList(tuple(name for _, name in pairs), labels) if all(tabbed) else ClassList(labels)


def _classes_from_json(value: Any) -> ClassList:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ClassList(tuple(value))
    if isinstance(value, dict) and all(isinstance(name, str) for name in value.values()):
        return ClassList(tuple(value.values()), tuple(value))
    if isinstance(value, dict) and all(type(number) is int for number in value.values()):  # names to numbers
        return ClassList(tuple(value), tuple(map(str, value.values())))
    raise ConfigError('JSON class files hold a list of names, ["cat", "dog"], or a map of labels to names, '
                      '{"n02123045": "tabby cat"}')


def _from_clip_benchmark(file: str, kind: str, name: str, known: Sequence[str]) -> list[str]:
    """Return a list that the package clip-benchmark ships, without importing it."""
    package = find_spec("clip_benchmark")
    if package is None or package.origin is None:
        raise MissingDependencyError(f"{unknown_name(kind, name, known)}; those of other published sets are in the "
                                     "package clip-benchmark: pip install clip-benchmark")
    content: dict[str, Any] = json.loads((Path(package.origin).parent / "datasets" / f"{file}.json").read_text("utf-8"))
    if name not in content:
        raise ConfigError(unknown_name(kind, name, (*known, *content)))
    return list(content[name])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _spaced(label: str) -> str:
    return " ".join(label.replace("_", " ").split()) or label


def _folded(label: str) -> str:
    return _spaced(label).casefold()
