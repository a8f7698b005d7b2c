"""Model names: presets, open_clip's models with or without pretrained weights, files, folders, runs."""

import functools
import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from aclip.errors import CheckpointError, ConfigError, UnsupportedModelError, unknown_name
from aclip.models import hugging_face, released
from aclip.models.network import check_hub, check_url, fetching
from aclip.models.shapes import check_config, pair, patch_size_of
from aclip.models.tokenizer import RememberingTokenizer
from aclip.models.vision import grid_of
from aclip.models.weights import load_numpy, load_state, read_state

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
LOCAL, HUB = "local-dir:", "hf-hub:"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FRESH_PREPROCESS: Mapping[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
"""What is trained from the start sees; the release's checkpoints do, too."""
_CHOICES = {"interpolation": ("bicubic", "bilinear", "random"), "resize_mode": ("shortest", "longest", "squash")}
"""What open_clip's `preprocess_cfg` takes."""
_BIG_VISION = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}

_HUB_WEIGHTS = (WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_WEIGHT_NAMES = (*_HUB_WEIGHTS, "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".npz")

Layout = Literal["open_clip", "hugging_face", "released"]
"""Whose names a weight file uses; a run's checkpoint has open_clip's."""

Tokenizer = Callable[[list[str]], Tensor]
"""Texts -> (B, T) int64 token ids, padded to the context length."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: as it was given; what `open_clip.create_model` takes where something has to be fetched.
        config: open_clip's `model_cfg`.
        tag: pretrained weights of open_clip's to fetch, or None.
        folder: local folder with config and weights, or None.
        weights: local weight file, or None. layout: its names.
        preprocess: what is known of open_clip's `preprocess_cfg`.
    """

    name: str
    config: Mapping[str, Any]
    tag: str | None = None
    folder: Path | None = None
    weights: Path | None = None
    layout: Layout = "open_clip"
    preprocess: Mapping[str, Any] | None = None

    @property
    def is_remote(self) -> bool:
        """Whether open_clip has to fetch it."""
        return self.tag is not None or self.name.startswith(HUB)

    @property
    def has_weights(self) -> bool:
        """Whether it brings weights, as against starting fresh."""
        return self.is_remote or self.weights is not None

    def load_into(self, model: Any) -> bool:
        """Load the local weights; return whether they are of an image tower alone.

        Raises:
            CheckpointError: damaged, or of another model.
        """
        assert self.weights is not None
        if self.weights.suffix == ".npz":
            load_numpy(model, self.weights)
            return False
        if self.layout == "hugging_face":
            assert self.folder is not None
            return load_state(model, hugging_face.read_folder(self.folder), self.weights)
        state = read_state(self.weights)
        return load_state(model, released.from_released(state) if self.layout == "released" else state, self.weights)


def resolve_source(name: str | Path) -> Source:
    """Find the model that a name means; first match wins.

        vit-tiny, ViT-B-32 (or ViT-B/32)   a preset or one of open_clip's models, fresh weights
        ViT-B-32:laion2b_s34b_b79k          the same with pretrained weights (network, then cached)
        ViT-B-32:FILE                       the same with the weights of a local file
        hf-hub:OWNER/MODEL                  an open_clip model on the Hugging Face hub (network, then cached)
        FOLDER, local-dir:FOLDER            open_clip_config.json and weights; or Hugging Face's CLIPModel
        RUN, RUN/checkpoints/step-...       a run folder: its final/, before it is finished its newest checkpoint
        FILE                                a checkpoint of the A-CLIP release, whose sizes say its architecture

    Raises:
        ConfigError: nothing of that name, with the closest name that exists.
        CheckpointError: a folder or file without a model in it, or the network is needed and not there.
        UnsupportedModelError: a model whose towers this package cannot run.
    """
    text = str(name)
    if text.startswith(HUB):
        return _hub_source(text)
    if text.startswith(LOCAL):
        return _folder_source(Path(text.removeprefix(LOCAL)))
    base, _, rest = text.partition(":")
    base = base.replace("/", "-")
    _register_presets()
    if base in open_clip.list_models():
        return _named_source(base, rest)
    if Path(text).is_dir():
        return _folder_source(Path(text))
    if Path(text).is_file():
        return _file_source(Path(text))
    if "/" in text and ":" not in text:
        raise ConfigError(f"there is no folder '{text}', nor a model of that name: name a folder with "
                          f"{CONFIG_NAME}, a run folder, or one of {', '.join(list_models())}")
    raise ConfigError(unknown_name("model", base, list_models()))


def list_models() -> list[str]:
    """Return the names that can be trained: the presets, open_clip's own ViTs, and timm's plain ones in open_clip."""
    _register_presets()
    return [name for name in open_clip.list_models() if _is_supported(open_clip.get_model_config(name))]


def model_config(name: str | Path, *, image_size: int | tuple[int, int] | None = None) -> dict[str, Any]:
    """Return open_clip's `model_cfg` of a model, complete: saved, it loads without any registered name.

    Args:
        name: as in `resolve_source`.
        image_size: pixels, one side or (height, width), in place of the model's own.

    Raises:
        As `resolve_source`; ConfigError also for an image size that is not a whole number of patches.
    """
    config: dict[str, Any] = deepcopy(dict(resolve_source(name).config))
    if image_size is not None:
        size = pair(image_size)
        grid_of(size, patch_size_of(config))
        if frees_positions(config, size):
            del config["vision_cfg"]["pos_embed_type"]
        config["vision_cfg"]["image_size"] = size[0] if size[0] == size[1] else list(size)
    return config


def frees_positions(config: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Return whether a model's fixed positions become learned ones at an image size (height, width).

    open_clip lays sine-cosine positions out on square grids alone. At an oblong size such a model starts
    from the square's positions, interpolated, and learns them from there.
    """
    return config["vision_cfg"].get("pos_embed_type") == "sin_cos_2d" and size[0] != size[1]


def tokenizer_of(model: str | Path | Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a model, by name or by config.

    The byte-pair tokenizer that open_clip bundles, unless the config names one of Hugging Face's (network,
    then cached; a folder brings its own). Captions over the context length are cut and keep their EOT.

    Args:
        model: a name as in `resolve_source`, or a config as `model_config` returns it.

    Returns:
        Texts -> (B, context_length) int64; picklable.

    Raises:
        CheckpointError: the tokenizer needs the network, which is not there, or code of its own, which is never run.
    """
    folder = None
    tokenizer: Tokenizer
    if not isinstance(model, Mapping):
        source = resolve_source(model)
        model, folder = source.config, source.folder
    text = model["text_cfg"]
    context = text.get("context_length", 77)
    options = text.get("tokenizer_kwargs") or {}
    if not isinstance(options, Mapping):
        raise CheckpointError(f"the config of this model gives its tokenizer no options by name, but {options!r}")
    options = dict(options)
    options.pop("trust_remote_code", None)  # a config from elsewhere does not decide whether its folder's code runs
    where = text.get("hf_tokenizer_name")
    if where:
        if folder is not None and any(folder.glob("tokenizer*")):
            where = str(folder)
        what = f"the tokenizer '{where}' of this model"
        if not Path(where).is_dir():
            check_hub(what, where, ("tokenizer_config.json", "tokenizer.json"))
        with fetching(what):
            tokenizer = HFTokenizer(
                where, context_length=context, tokenizer_mode=text.get("tokenizer_mode"), trust_remote_code=False,
                **options)
    else:
        try:
            tokenizer = RememberingTokenizer(context_length=context, **options)
        except (TypeError, AssertionError, OSError) as error:
            raise CheckpointError(f"the config of this model gives its tokenizer options that open_clip's does not "
                                  f"take: {error}") from error
    return tokenizer


@functools.cache
def _register_presets() -> None:
    """Tell open_clip about the presets, once and only when a model is asked for."""
    open_clip.add_model_config(Path(__file__).parent / "configs")


def _named_source(base: str, rest: str) -> Source:
    """Return an architecture, fresh, with pretrained weights, or with those of a file."""
    config = _checked(open_clip.get_model_config(base), base)
    if not rest:
        return Source(base, config)
    tags = open_clip.list_pretrained_tags_by_model(base)
    if rest in tags:
        pretrained = open_clip.get_pretrained_cfg(base, rest)
        if pretrained.get("quick_gelu", False):
            # these weights were trained with the approximate GELU, whatever the plain name says
            config = {**config, "quick_gelu": True}
        return Source(base, config, tag=rest, preprocess=_preprocessing(pretrained, base))
    file = Path(rest)
    if file.is_file():
        return Source(f"{base}:{rest}", config, weights=file,
                      preprocess=_BIG_VISION if file.suffix == ".npz" else None)
    if "/" in rest or file.suffix in _WEIGHT_SUFFIXES:
        raise CheckpointError(f"there is no weight file {rest}: '{base}:...' takes a file, or one of the pretrained "
                              f"weights {', '.join(sorted(tags)) or '(there are none)'}")
    raise ConfigError(unknown_name(f"pretrained weights of {base}", rest, tags))


def check_fetchable(source: Source) -> None:
    """Check that what a source has to fetch is in a cache or can be reached, before clients that retry are asked.

    Raises:
        CheckpointError: it is not, and cannot.
    """
    if source.tag is None:
        check_hub(f"'{source.name}'", source.name.removeprefix(HUB), _HUB_WEIGHTS)
        return
    cfg = open_clip.get_pretrained_cfg(source.name, source.tag)
    what = f"'{source.name}:{source.tag}'"
    if cfg.get("hf_hub"):
        repository, _, file = cfg["hf_hub"].rpartition("/")
        check_hub(what, repository, [file] if file else _HUB_WEIGHTS)
    else:
        check_url(what, cfg["url"])


def _hub_source(name: str) -> Source:
    what = f"'{name}'"
    check_hub(what, name.removeprefix(HUB), (CONFIG_NAME,))
    with fetching(what):
        file = Path(download_pretrained_from_hf(name.removeprefix(HUB), filename=CONFIG_NAME))
        whole = json.loads(file.read_text(encoding="utf-8"))
        config, preprocess = whole["model_cfg"], _preprocessing(whole.get("preprocess_cfg") or {}, name)
    return Source(name, _checked(config, name), preprocess=preprocess)


def _preprocessing(known: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what open_clip's table of weights, or a config, says of how a model's pictures are prepared.

    Raises:
        CheckpointError: values that open_clip does not take.
    """
    stated = {key: known[key] for key in ("mean", "std", *_CHOICES, "fill_color") if known.get(key) is not None}
    for key, value in stated.items():
        if key in _CHOICES and value not in _CHOICES[key]:
            raise CheckpointError(f"the preprocess_cfg of model '{name}' has an "
                                  f"{unknown_name(key, str(value), _CHOICES[key])}")
        if key in ("mean", "std") and not (isinstance(value, list | tuple) and len(value) == 3
                                           and all(isinstance(number, int | float) for number in value)):
            raise CheckpointError(f"the preprocess_cfg of model '{name}' has a {key} of {value!r}: it takes three "
                                  "numbers, one a channel")
    return stated


def _folder_source(folder: Path) -> Source:
    """Return the model of a folder: open_clip's, a run's, or Hugging Face's."""
    if not folder.is_dir():
        raise ConfigError(f"there is no folder '{folder}'")
    for place in (folder, folder / "final"):
        if (place / CONFIG_NAME).is_file():
            return _open_clip_folder(place)
    theirs = hugging_face.read_config(folder)
    if theirs is not None:
        try:
            config = hugging_face.open_clip_config(theirs, folder)
        except (TypeError, KeyError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"'{folder / hugging_face.CONFIG_NAME}' describes no model: {error!r}") from error
        return Source(str(folder), _checked(config, str(folder)), folder=folder, layout="hugging_face",
                      weights=hugging_face.weight_files(folder)[0],
                      preprocess=_preprocessing(hugging_face.preprocess(folder), str(folder)))
    steps = [folder] if (folder / "state.json").is_file() else sorted((folder / "checkpoints").glob("step-*[0-9]"))
    if not steps:
        raise CheckpointError(f"'{folder}' holds no model: there is neither {CONFIG_NAME} (a saved model), "
                              f"final/{CONFIG_NAME} (a finished run), checkpoints/step-* (a run) nor a Hugging Face "
                              "config.json with its model_type in it")
    return _checkpoint_source(steps[-1])


def _open_clip_folder(place: Path) -> Source:
    """Return the model of a folder with `open_clip_config.json`."""
    try:
        whole = json.loads((place / CONFIG_NAME).read_text(encoding="utf-8"))
        config, stated = whole["model_cfg"], dict(whole.get("preprocess_cfg") or {})
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{place / CONFIG_NAME}' is damaged: {error!r}") from error
    files = sorted(file for file in place.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
    known = [place / name for name in _WEIGHT_NAMES if place / name in files]
    if not files:
        raise CheckpointError(f"'{place}' holds {CONFIG_NAME} but no weights beside it ({WEIGHTS_NAME})")
    if not known and len(files) > 1:
        raise CheckpointError(f"'{place}' holds several weight files ({', '.join(f.name for f in files)}) and none of "
                              f"them is called {WEIGHTS_NAME}: rename the one that is meant")
    return Source(f"{LOCAL}{place}", _checked(config, str(place)), folder=place, weights=(known or files)[0],
                  preprocess=_preprocessing(stated, str(place)))


def _checkpoint_source(step: Path) -> Source:
    """Return the model of a run's checkpoint: the architecture that the run names, with the weights of the step."""
    settings = step.parent.parent / "config.json"
    try:
        run = json.loads(settings.read_text(encoding="utf-8"))
        model, size = run["model"], run.get("image_size")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the run of '{step}' is not known: '{settings}' is missing or damaged ({error!r})"
                              ) from error
    base = resolve_source(model)
    try:
        config = model_config(model, image_size=size)
    except ConfigError as error:
        raise CheckpointError(f"the image_size in '{settings}' is none that the run's model takes: {error}") from error
    return Source(str(step), config, folder=base.folder, weights=step,
                  preprocess=base.preprocess if base.has_weights else FRESH_PREPROCESS)


def _file_source(file: Path) -> Source:
    """Return the model of a weight file alone, if its layout says what model that is."""
    state = read_state(file)
    if not released.is_released(state):
        raise ConfigError(f"'{file}' does not say which architecture its weights are of: name it, as in "
                          f"ViT-B-16:{file}")
    config = released.released_config(state, file)
    return Source(str(file), _checked(config, str(file)), weights=file, layout="released",
                  preprocess=FRESH_PREPROCESS)


def _checked(config: Any, name: str) -> Mapping[str, Any]:
    try:
        vision, _ = check_config(config)
        if vision.timm_model_name:
            patch_size_of(config)
    except (ConfigError, UnsupportedModelError) as error:
        raise type(error)(f"model '{name}': {error}") from error
    return dict(config)


def _is_supported(config: Mapping[str, Any]) -> bool:
    try:
        vision, _ = check_config(config)
    except (ConfigError, UnsupportedModelError):
        return False
    # timm's names say their patch size; one of open_clip's (SO400M at 384) does not divide its image
    patch = re.search(r"patch(\d+)", vision.timm_model_name or "")
    return patch is None or all(side % int(patch[1]) == 0 for side in pair(vision.image_size))
