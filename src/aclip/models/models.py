"""Building models: open_clip's own modules, fresh or with weights, at any image size."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.errors import CheckpointError
from aclip.models.network import fetching
from aclip.models.shapes import pair, patch_size_of
from aclip.models.sources import FRESH_PREPROCESS, Source, check_fetchable, frees_positions, resolve_source
from aclip.models.vision import grid_of, positions_at, vit_of

logger = logging.getLogger(__name__)


class ImageTower(nn.Module):
    """A model without text: no text parameter exists, and the state dict is `visual.*` of open_clip's.

    Without captions there is no joint space either: the tower's projection is left out, and its features are the
    pooled token, (B, C).

    Attributes:
        visual: open_clip's image tower.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        vit_of(visual).drop_projection()

    def encode_image(self, image: Float[Tensor, "B 3 h w"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Return the pooled token after the final norm, (B, C), L2-normalised on request."""
        features: Tensor = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features


def create_model(
    name: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    with_text: bool | None = True,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Build an open_clip model on the CPU in fp32, in training mode.

    Fresh weights come from torch's global generator: call `torch.manual_seed` first. The image tower's do
    not depend on `with_text`. Fresh models take ImageNet's mean and deviation; models that come with
    weights keep their own. Where weights hold an image tower only, the text tower starts fresh.

    Args:
        name: see `aclip.models.sources.resolve_source`; only a name with a pretrained tag, or on a hub,
            needs the network.
        image_size: pixels, one side or (height, width), in place of the model's own. Positions that come
            with weights are interpolated to it; so are a preset's, to an oblong size (`frees_positions`).
        with_text: False leaves the text tower out altogether (`ImageTower`); None does so where the weights hold an
            image tower only.
        checkpoint: a weight file (safetensors, or torch's) of this architecture to load.

    Returns:
        `open_clip.CLIP` (or `CustomTextCLIP`) itself, or `ImageTower`.

    Raises:
        ConfigError: an unknown name or a size that is not a whole number of patches.
        CheckpointError: weights that are missing, damaged, of another model, or out of reach without a network.
        UnsupportedModelError: a model whose towers this package cannot run.
    """
    source = resolve_source(name)
    if checkpoint is not None:
        source = replace(source, tag=None, weights=Path(checkpoint), layout="open_clip")
    size = None if image_size is None else pair(image_size)
    if size is not None:
        grid_of(size, patch_size_of(source.config))
    unfixed = size is not None and frees_positions(source.config, size)
    if source.is_remote:
        model = _fetch(source)
    else:
        model = _build(source, None if source.has_weights or unfixed else size)
    image_only = source.weights is not None and source.load_into(model)
    if image_only and with_text:
        logger.info("%s holds an image tower only: projection and text tower start fresh", source.weights)
    if size is not None:
        resize_images(visual_of(model), size)
    if unfixed:
        visual_of(model).positional_embedding.requires_grad_(True)
    if with_text is None:
        with_text = not image_only
    return model if with_text else ImageTower(visual_of(model))


def visual_of(model: nn.Module) -> Any:
    """Return the image tower of a model, `model.visual`, or of a tower itself.

    Raises:
        UnsupportedModelError: a tower that `encode_image` cannot run.
    """
    visual = getattr(model, "visual", model)
    vit_of(visual)
    return visual


def preprocess_config(model: nn.Module) -> dict[str, Any]:
    """Return open_clip's `preprocess_cfg` of a model: what `open_clip_config.json` states beside the weights.

    Keys: size (height, width), mode "RGB", mean and std per channel on a scale of 0 to 1, interpolation,
    resize_mode, fill_color.
    """
    config: dict[str, Any] = dict(visual_of(model).preprocess_cfg)
    return config


def resize_images(visual: nn.Module, image_size: tuple[int, int]) -> None:
    """Make an image tower one of another image size (height, width), its positions interpolated in place.

    Raises:
        ConfigError: not a whole number of patches.
    """
    vit = vit_of(visual)
    grid = grid_of(image_size, vit.patch_size)
    with torch.no_grad():
        positions = positions_at(vit, grid).clone()
    vit.resize(image_size, positions)


def _build(source: Source, image_size: tuple[int, int] | None) -> nn.Module:
    """Build the modules of a source with fresh weights; sizes of models with weights are changed afterwards.

    Raises:
        CheckpointError: a saved config that describes no model.
    """
    config: dict[str, Any] = dict(source.config)
    vision = dict(config["vision_cfg"])
    if image_size is not None:
        vision["image_size"] = image_size
    by_timm = bool(vision.get("timm_model_name"))
    if by_timm:
        vision["timm_model_pretrained"] = False  # of ImageNet, from the network
    cls = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    try:
        model: nn.Module = cls(**{**config, "vision_cfg": vision})
    except Exception as error:  # whatever the modules meet in sizes that do not fit each other
        if not source.has_weights:
            raise
        raise CheckpointError(f"the config of '{source.name}' describes no model: {error}") from error
    visual, wanted = visual_of(model), pair(vision.get("image_size", 224))
    if by_timm and vit_of(visual).grid_size != grid_of(wanted, patch_size_of(source.config)):
        resize_images(visual, wanted)  # timm builds at a size of its own
    fresh = {} if source.has_weights else FRESH_PREPROCESS
    preprocess = merge_preprocess_dict(asdict(PreprocessCfg()), {**(source.preprocess or fresh)})
    set_model_preprocess_cfg(model, {**preprocess, "size": pair(visual.image_size)})
    return model


def _fetch(source: Source) -> nn.Module:
    """Let open_clip fetch and build a model."""
    check_fetchable(source)
    with _tidy_logging(), fetching(f"'{source.name}{f':{source.tag}' if source.tag else ''}'"):
        model: nn.Module = open_clip.create_model(
            source.name, pretrained=source.tag, force_quick_gelu=bool(source.config.get("quick_gelu", False)))
    return model


@contextlib.contextmanager
def _tidy_logging() -> Iterator[None]:
    """Pass open_clip's warnings on under this package's name, save the one about fresh weights.

    open_clip logs through the root logger's module functions, which install a handler on the root if there
    is none, and it warns whenever no weights are loaded, which is what a fresh model is.
    """
    root, records = logging.getLogger(), []

    def take(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    placeholder = logging.NullHandler()
    root.addFilter(take)
    root.addHandler(placeholder)
    try:
        yield
    finally:
        root.removeFilter(take)
        root.removeHandler(placeholder)
    for record in records:
        message = record.getMessage()
        if record.levelno >= logging.WARNING and not message.startswith("No pretrained weights loaded"):
            logger.log(record.levelno, "%s", message)
