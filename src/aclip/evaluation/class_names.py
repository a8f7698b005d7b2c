"""Class names and prompt templates: the user's own, and those that other packages hold for published sets."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aclip.errors import ConfigError, MissingDependencyError, unknown_name
from aclip.evaluation.classes import ClassList
from aclip.evaluation.zero_shot import DEFAULT_TEMPLATES, check_templates

IMAGENET = ("imagenet", "imagenet-subset")
"""Names of open_clip's 1,000 classes: all of them, or those of which the set has pictures (ImageNet-A, -R, -100)."""

CLASS_LISTS = (
    "caltech101", "country211", "eurosat", "fer2013", "flowers", "gtsrb", "mnist", "pcam", "pets", "svhn",
    "clevr_closest_object_distance", "clevr_count_all", "diabetic_retinopathy", "dmlab",
    "kitti_closest_vehicle_distance",
)  # fmt: skip
"""Sets whose class names clip-benchmark holds; those of other sets are what their folders are called."""

OPEN_CLIP_TEMPLATES = ("openai", "simple")
"""open_clip's 80 prompts of CLIP (arXiv 2103.00020) for ImageNet, and the seven that do nearly as well."""

TEMPLATE_LISTS = (
    *CLASS_LISTS, "cars", "cifar10", "cifar100", "dtd", "fgvc_aircraft", "food101", "renderedsst2", "resisc45", "stl10",
    "sun397", "voc2007",
)  # fmt: skip
"""Sets whose prompts clip-benchmark holds."""


def find_classes(spec: str) -> ClassList:
    """Return the classes of a file, or of a published set.

    A file names one class a line, or has on each line what the set calls the class, a tab, and the name for prompts. A
    file goes before a set of the same name.

    Raises:
        ConfigError: neither; or a file without classes, with one alone, with one twice, or that cannot be read.
        MissingDependencyError: a set whose names an optional package holds.
    """
    if Path(spec).is_file():
        return read_classes(Path(spec))
    if spec in IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES
        from timm.data.imagenet_info import ImageNetInfo

        identifiers = tuple(ImageNetInfo().label_names())
        return ClassList(tuple(IMAGENET_CLASSNAMES), identifiers, present_only=spec == "imagenet-subset", title=spec)
    if spec in CLASS_LISTS:
        return ClassList(tuple(_held_by_clip_benchmark("en_classnames", spec)), in_order=True, title=spec)
    if Path(spec).suffix or "/" in spec:
        raise ConfigError(f"there is no file '{spec}' with class names")
    raise ConfigError(unknown_name("class list or file", spec, (*IMAGENET, *CLASS_LISTS)))


def read_classes(path: Path) -> ClassList:
    """Return the class names in a file; see `find_classes`."""
    lines = [line.strip() for line in _text(path, "class names").splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{path} holds no class names: write one a line")
    pairs = [tuple(part.strip() for part in line.partition("\t")[::2]) for line in lines]
    tabbed = [bool(name) for _, name in pairs]
    if any(tabbed) and not all(tabbed):
        raise ConfigError(f"{path}: '{lines[tabbed.index(False)]}' has no tab, and other lines do: write a label, a "
                          "tab and a class name on every line, or class names alone")
    labels = tuple(label for label, _ in pairs)
    try:
        return ClassList(tuple(name for _, name in pairs), labels) if all(tabbed) else ClassList(labels)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def find_templates(words: list[str]) -> tuple[str, ...]:
    """Return prompt templates: each word is one itself, a file with one a line, or the name of a published list.

    `openai` and `simple` are open_clip's, `default` is this package's, other names are sets' of clip-benchmark. The
    class goes where `{}` (or, in files, `{c}`) stands.

    Raises:
        ConfigError: a word that is none of these, or a template without a place for the class.
        MissingDependencyError: a list that an optional package holds.
    """
    return tuple(template for word in words for template in _templates(word))


def _templates(word: str) -> tuple[str, ...]:
    if "{}" in word:
        return (word,)
    if Path(word).is_file():
        lines = [line.strip().replace("{c}", "{}") for line in _text(Path(word), "templates").splitlines()]
        found = tuple(filter(None, lines))
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
    if word in TEMPLATE_LISTS:
        return tuple(text.replace("{c}", "{}") for text in
                     _held_by_clip_benchmark("en_zeroshot_classification_templates", word))
    if " " in word:
        check_templates((word,))
    if Path(word).suffix or "/" in word:
        raise ConfigError(f"there is no file '{word}' with templates")
    raise ConfigError(unknown_name("list of templates, or template without {},", word,
                                   ("default", *OPEN_CLIP_TEMPLATES, *TEMPLATE_LISTS)))


def _held_by_clip_benchmark(file: str, name: str) -> list[str]:
    """Return a list that the package clip-benchmark holds, without importing it."""
    package = find_spec("clip_benchmark")
    if package is None or package.origin is None:
        raise MissingDependencyError(f"class names and templates of '{name}' are held by the package clip-benchmark: "
                                     "pip install clip-benchmark, or write them into a file, one a line")
    content: dict[str, Any] = json.loads((Path(package.origin).parent / "datasets" / f"{file}.json").read_text("utf-8"))
    if name not in content:
        raise ConfigError(f"this version of clip-benchmark has no {file.replace('_', ' ')} of '{name}'")
    return list(content[name])


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {what} from {path}: {error}") from error
