"""Model names: presets, open_clip's models with or without pretrained weights, folders, runs."""

import functools
import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from aclip.errors import CheckpointError, ConfigError, UnsupportedModelError, unknown_name
from aclip.towers.shapes import check_config, pair
from aclip.towers.tokenizer import RememberingTokenizer
from aclip.towers.vision import grid_of

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
LOCAL, HUB = "local-dir:", "hf-hub:"

Tokenizer = Callable[[list[str]], Tensor]
"""Texts -> (B, T) int64 token ids, padded to the context length."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: what `open_clip.create_model` takes.
        config: open_clip's `model_cfg`.
        tag: pretrained weights of open_clip's to fetch, or None.
        folder: local folder with config and weights, or None.
    """

    name: str
    config: Mapping[str, Any]
    tag: str | None = None
    folder: Path | None = None

    @property
    def has_weights(self) -> bool:
        """Whether it brings weights, as against starting fresh."""
        return self.tag is not None or self.folder is not None or self.name.startswith(HUB)


def resolve_source(name: str | Path) -> Source:
    """Find the model that a name means; first match wins.

        vit-tiny, ViT-B-32 (or ViT-B/32)   a preset or one of open_clip's models, fresh weights
        ViT-B-32:laion2b_s34b_b79k          the same with pretrained weights (network, then cached)
        hf-hub:OWNER/MODEL                  an open_clip model on the Hugging Face hub (network, then cached)
        FOLDER, local-dir:FOLDER            a folder with open_clip_config.json and weights
        RUN                                 a run folder: its final/

    Raises:
        ConfigError: nothing of that name, with the closest name that exists.
        CheckpointError: a folder without a model in it.
        UnsupportedModelError: a model whose towers this package cannot run.
    """
    text = str(name)
    if text.startswith(HUB):
        return _hub_source(text)
    if text.startswith(LOCAL):
        return _folder_source(Path(text.removeprefix(LOCAL)))
    base, _, tag = text.replace("/", "-").partition(":")
    _register_presets()
    if base in open_clip.list_models():
        return _named_source(base, tag)
    if Path(text).is_dir():
        return _folder_source(Path(text))
    if "/" in text and ":" not in text:
        raise ConfigError(f"there is no folder '{text}', nor a model of that name: name a folder with "
                          f"{CONFIG_NAME}, a run folder, or one of {', '.join(list_models())}")
    raise ConfigError(unknown_name("model", base, list_models()))


def list_models() -> list[str]:
    """Return the names that can be trained: the presets and open_clip's own ViTs."""
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
        grid_of(size, pair(check_config(config)[0].patch_size))
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
    """
    folder = None
    tokenizer: Tokenizer
    if not isinstance(model, Mapping):
        source = resolve_source(model)
        model, folder = source.config, source.folder
    text = model["text_cfg"]
    context = text.get("context_length", 77)
    options = dict(text.get("tokenizer_kwargs") or {})
    if text.get("hf_tokenizer_name"):
        where = str(folder) if folder is not None else text["hf_tokenizer_name"]
        tokenizer = HFTokenizer(
            where, context_length=context, tokenizer_mode=text.get("tokenizer_mode"), **options)
    else:
        tokenizer = RememberingTokenizer(context_length=context, **options)
    return tokenizer


@functools.cache
def _register_presets() -> None:
    """Tell open_clip about the presets, once and only when a model is asked for."""
    open_clip.add_model_config(Path(__file__).parent / "configs")


def _named_source(base: str, tag: str) -> Source:
    config = _checked(open_clip.get_model_config(base), base)
    if not tag:
        return Source(base, config)
    tags = open_clip.list_pretrained_tags_by_model(base)
    if tag not in tags:
        raise ConfigError(unknown_name(f"pretrained weights of {base}", tag, tags))
    if open_clip.get_pretrained_cfg(base, tag).get("quick_gelu", False):
        # these weights were trained with the approximate GELU, whatever the plain name says
        config = {**config, "quick_gelu": True}
    return Source(base, config, tag=tag)


def _hub_source(name: str) -> Source:
    try:
        config = open_clip.get_model_config(name)
    except Exception as error:  # no network, no such model, no config in it: the hub client's own errors
        raise CheckpointError(f"'{name}' cannot be fetched: {error}") from error
    return Source(name, _checked(config, name))


def _folder_source(folder: Path) -> Source:
    if not folder.is_dir():
        raise ConfigError(f"there is no folder '{folder}'")
    place = folder if (folder / CONFIG_NAME).is_file() else folder / "final"
    if not (place / CONFIG_NAME).is_file():
        raise CheckpointError(f"'{folder}' holds no model: there is neither {CONFIG_NAME} (a saved model) "
                              f"nor final/{CONFIG_NAME} (a finished run) in it")
    if not any(file.suffix in (".safetensors", ".bin", ".pth", ".pt") for file in place.iterdir()):
        raise CheckpointError(f"'{place}' holds {CONFIG_NAME} but no weights beside it ({WEIGHTS_NAME})")
    try:
        config = json.loads((place / CONFIG_NAME).read_text(encoding="utf-8"))["model_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{place / CONFIG_NAME}' is damaged: {error!r}") from error
    return Source(f"{LOCAL}{place}", _checked(config, str(place)), folder=place)


def _checked(config: Any, name: str) -> Mapping[str, Any]:
    try:
        check_config(config)
    except (ConfigError, UnsupportedModelError) as error:
        raise type(error)(f"model '{name}': {error}") from error
    return dict(config)


def _is_supported(config: Mapping[str, Any]) -> bool:
    try:
        check_config(config)
    except (ConfigError, UnsupportedModelError):
        return False
    return True
