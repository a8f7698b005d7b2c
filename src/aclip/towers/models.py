"""Building models: open_clip's own modules, fresh or with weights, at any image size."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from aclip.errors import CheckpointError
from aclip.towers.shapes import check_config, pair
from aclip.towers.sources import WEIGHTS_NAME, Source, frees_positions, resolve_source
from aclip.towers.vision import check_visual, grid_of, positions_at

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

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
        self.visual.proj = None  # type: ignore[assignment]

    def encode_image(self, image: Float[Tensor, "B 3 h w"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Return the pooled token after the final norm, (B, C), L2-normalised on request."""
        features: Tensor = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features


def create_model(
    name: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    with_text: bool = True,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Build an open_clip model on the CPU in fp32, in training mode.

    Fresh weights come from torch's global generator: call `torch.manual_seed` first. The image tower's do
    not depend on `with_text`. Fresh models take ImageNet's mean and deviation; models that come with
    weights keep their own. Where weights hold an image tower only, the text tower starts fresh.

    Args:
        name: see `aclip.towers.sources.resolve_source`; only a name with a pretrained tag, or on a hub,
            needs the network.
        image_size: pixels, one side or (height, width), in place of the model's own. Positions that come
            with weights are interpolated to it; so are a preset's, to an oblong size (`frees_positions`).
        with_text: False leaves the text tower out altogether (`ImageTower`).
        checkpoint: a weight file (safetensors, or torch's) of this architecture to load.

    Returns:
        `open_clip.CLIP` (or `CustomTextCLIP`) itself, or `ImageTower`.

    Raises:
        ConfigError: an unknown name or a size that is not a whole number of patches.
        CheckpointError: weights that are missing, damaged, or of another model.
        UnsupportedModelError: a model whose towers this package cannot run.
    """
    source = resolve_source(name)
    size = None if image_size is None else pair(image_size)
    if size is not None:
        grid_of(size, pair(check_config(source.config)[0].patch_size))
    weighted = source.has_weights or checkpoint is not None
    unfixed = size is not None and frees_positions(source.config, size)
    model = _build(source, None if weighted or unfixed else size, fresh=not weighted)
    if source.folder is not None and is_image_only(source.folder / WEIGHTS_NAME):
        _load_weights(model, source.folder / WEIGHTS_NAME)
    if checkpoint is not None:
        _load_weights(model, Path(checkpoint))
    given = weight_file(source, checkpoint)
    if with_text and given is not None and is_image_only(given):
        logger.info("%s holds an image tower only: projection and text tower start fresh", given)
    if size is not None:
        resize_images(visual_of(model), size)
    if unfixed:
        visual_of(model).positional_embedding.requires_grad_(True)
    return model if with_text else ImageTower(visual_of(model))


def visual_of(model: nn.Module) -> nn.Module:
    """Return the image tower of a model, `model.visual`, or of a tower itself.

    Raises:
        UnsupportedModelError: a tower that `encode_image` cannot run.
    """
    visual = getattr(model, "visual", model)
    check_visual(visual)
    return visual


def preprocess_config(model: nn.Module) -> dict[str, Any]:
    """Return open_clip's `preprocess_cfg` of a model: what `open_clip_config.json` states beside the weights.

    Keys: size (height, width), mode "RGB", mean and std per channel on a scale of 0 to 1, interpolation,
    resize_mode, fill_color.
    """
    config: dict[str, Any] = dict(visual_of(model).preprocess_cfg)  # type: ignore[arg-type]
    return config


def resize_images(visual: nn.Module, image_size: tuple[int, int]) -> None:
    """Make an image tower one of another image size (height, width), its positions interpolated in place.

    Raises:
        ConfigError: not a whole number of patches.
    """
    tower = check_visual(visual)
    grid = grid_of(image_size, pair(tower.patch_size))
    with torch.no_grad():
        positions = positions_at(tower, grid).clone()
    tower.positional_embedding = nn.Parameter(positions, tower.positional_embedding.requires_grad)
    tower.grid_size, tower.image_size = grid, image_size
    tower.preprocess_cfg = {**tower.preprocess_cfg, "size": image_size}


def _build(source: Source, image_size: tuple[int, int] | None, *, fresh: bool) -> nn.Module:
    """Let open_clip build the model; sizes of models with weights are changed afterwards."""
    image_only = source.folder is not None and is_image_only(source.folder / WEIGHTS_NAME)
    try:
        with _tidy_logging():
            model: nn.Module = open_clip.create_model(
                source.name,
                pretrained=source.tag,
                load_weights=not image_only,
                force_quick_gelu=bool(source.config.get("quick_gelu", False)),
                force_image_size=image_size,
                force_preprocess_cfg={"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if fresh else None,
            )
    except Exception as error:  # whatever open_clip's readers meet in a damaged or foreign file
        if fresh:
            raise
        raise CheckpointError(f"the weights of '{source.name}' cannot be loaded: {error}") from error
    return model


def weight_file(source: Source, checkpoint: str | Path | None = None) -> Path | None:
    """Return the local file that a model's weights come from, or None for a name."""
    if checkpoint is not None:
        return Path(checkpoint)
    return source.folder / WEIGHTS_NAME if source.folder is not None else None


def is_image_only(weights: Path) -> bool:
    """Whether a safetensors file holds an image tower and nothing else.

    Raises:
        CheckpointError: a damaged or empty file.
    """
    if weights.suffix != ".safetensors" or not weights.is_file():
        return False
    try:
        with safe_open(weights, framework="pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights {weights} are damaged: {error}") from error
    if not names:
        raise CheckpointError(f"the weights {weights} are empty: no tensor is in the file")
    return all(name.startswith("visual.") for name in names)


def _load_weights(model: nn.Module, weights: Path) -> None:
    """Load a weight file of this architecture; one of an image tower alone leaves the text fresh."""
    if not weights.is_file():
        raise CheckpointError(f"there is no weight file {weights}")
    image_only = is_image_only(weights)
    try:
        with _tidy_logging():
            keys = open_clip.load_checkpoint(model, str(weights), strict=not image_only)
    except Exception as error:  # as in _build
        raise CheckpointError(f"the weights {weights} cannot be loaded into this model: {error}") from error
    if image_only:
        missing = [name for name in keys.missing_keys if name.startswith("visual.") and name != "visual.proj"]
        wrong = missing + keys.unexpected_keys
        if wrong:
            raise CheckpointError(f"the weights {weights} are of another image tower: they differ in "
                                  f"{', '.join(wrong[:3])} and {max(0, len(wrong) - 3)} more")


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
