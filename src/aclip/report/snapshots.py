"""What a model looks at: snapshots over training, and scores and masks drawn over an image.

Layers have few pixels a patch; a page lays them over an image and lets the browser enlarge them, `heat_map` and
`kept_patches` do the same in Pillow.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from aclip import models
from aclip.data import augment
from aclip.errors import CheckpointError
from aclip.files import write_atomically
from aclip.method import Method, resized
from aclip.plan import PassPlan
from aclip.structs import Batch, Encoded, ViewBatch

HEAT_OPACITY = 0.72  # over the grey image
VEIL_OPACITY = 0.86  # over a removed patch

# Nine anchors of Inferno (van der Walt and Smith, 2015; CC0), whose lightness rises evenly with the score.
_HEAT = np.array([
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85),
    (227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164),
], dtype=np.float64)

_VEIL = np.array([(122, 127, 138), (206, 209, 214)], dtype=np.uint8)  # a checkerboard, which shows on any photograph
_CHECKS = 2  # along a side of a patch


@dataclass(frozen=True)
class Snapshot:
    """One file of `snapshots/`: what the masking read and kept of some images after a step."""

    images: UInt8[Tensor, "n 3 H W"]  # without augmentation
    scores: Float[Tensor, "n N"]  # attention of CLS to each patch
    keep_indices: Int[Tensor, "n K"]  # ascending
    grid: tuple[int, int]  # patches (down, across)
    captions: tuple[str, ...]
    step: int
    maps: Float[Tensor, "n N"] | None = None  # similarity of each patch to the caption; None without text


def snapshot_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    dtypes = {"images": torch.uint8, "scores": torch.float32, "keep_indices": torch.int64, "maps": torch.float32}
    tensors = {name: getattr(snapshot, name).detach().to("cpu", dtype).contiguous() for name, dtype in dtypes.items()
               if getattr(snapshot, name) is not None}
    header = {"captions": json.dumps(snapshot.captions), "grid": json.dumps(snapshot.grid), "step": str(snapshot.step)}
    write_atomically(path, save(tensors, metadata=header))


def read_snapshot(path: Path) -> Snapshot:
    """Read what `write_snapshot` wrote; a `CheckpointError` for a file that is missing, truncated, or another one."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in {"images", "scores", "keep_indices", *file.keys()}}
        down, across = json.loads(header["grid"])
        captions = tuple(json.loads(header["captions"]))
        return Snapshot(**tensors, grid=(down, across), captions=captions, step=int(header["step"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a readable snapshot: {error}") from error


def take_snapshot(
    method: Method, images: Sequence[Image.Image], captions: Sequence[str], step: int, folder: Path,
    tokens: Int[Tensor, "n T"] | None = None,
) -> Path:
    """Write what `method` scores and keeps of whole, unaugmented RGB images after `step` steps; return the file.

    The passes run as in training, on views that each show the whole image. The pass that masks most is shown; a
    recipe without masking shows the online encoder's attention, and keeps everything. With the captions' tokens, the
    file also has the map of each caption, by the online encoder. The method is unchanged.
    """
    batch = _whole_images(images, method.plan.view_sizes).to(method.mean.device)
    with torch.no_grad():
        passes = method.run_passes(batch)
        shown = max(method.plan.passes.values(), key=lambda p: p.num_patches - p.num_keep)
        keep = passes[shown.name].keep_indices
        scores = _scores(method, batch, passes, shown)
        maps = _maps(method, batch, tokens, shown) if tokens is not None and method.plan.shape.scored else None
    kept = torch.arange(shown.num_patches).expand(batch.size, -1) if keep is None else keep[0]
    path = snapshot_path(folder, step)
    pixels = batch.views[shown.spec.views[0]].pixels
    write_snapshot(path, Snapshot(pixels, scores, kept, shown.grid_size, tuple(captions), step, maps))
    return path


def heat_colours(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """Return sRGB colours of values in [0, 1] (clipped)."""
    position = np.clip(values, 0.0, 1.0) * (len(_HEAT) - 1)
    channels = [np.interp(position, np.arange(len(_HEAT)), anchors) for anchors in _HEAT.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def heat_layer(
    scores: Float[Tensor, " N"], grid: tuple[int, int], limits: tuple[float, float] | None = None
) -> Image.Image:
    """Return the scores of one image as RGB colours, one pixel a patch, the darkest for equal ones.

    Scores are stretched between `limits`; by default from their minimum to their 98th percentile, so that a single
    patch with most of the attention, which ViTs have, does not leave all others black.
    """
    values = np.nan_to_num(scores.detach().cpu().double().numpy()).reshape(grid)
    low, high = limits or (values.min(), np.quantile(values, 0.98))
    stretched = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return Image.fromarray(heat_colours(stretched))


def veil_layer(keep_indices: Int[Tensor, " K"], grid: tuple[int, int]) -> Image.Image:
    """Return a grey RGBA checkerboard over the removed patches of one image, clear where kept."""
    opacity = np.full(grid[0] * grid[1], round(255 * VEIL_OPACITY), dtype=np.uint8)
    opacity[keep_indices.cpu().numpy()] = 0
    alpha = opacity.reshape(grid).repeat(_CHECKS, axis=0).repeat(_CHECKS, axis=1)
    return Image.fromarray(np.dstack([_VEIL[np.indices(alpha.shape).sum(axis=0) % 2], alpha]))


def to_image(pixels: UInt8[Tensor, "3 H W"], side: int | None = None) -> Image.Image:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    if side is not None:
        image.thumbnail((side, side))
    return image


def heat_map(
    image: Image.Image, scores: Float[Tensor, " N"], grid: tuple[int, int], limits: tuple[float, float] | None = None
) -> Image.Image:
    """Return the smoothed `heat_layer` over a grey copy of `image`, RGB."""
    heat = heat_layer(scores, grid, limits).resize(image.size, Image.Resampling.BICUBIC)
    return Image.blend(image.convert("L").convert("RGB"), heat, HEAT_OPACITY)


def kept_patches(image: Image.Image, keep_indices: Int[Tensor, " K"], grid: tuple[int, int]) -> Image.Image:
    """Return `image` with the removed patches under a grey checkerboard, RGB."""
    veil = veil_layer(keep_indices, grid).resize(image.size, Image.Resampling.NEAREST)
    veiled = Image.alpha_composite(image.convert("L").convert("RGBA"), veil).convert("RGB")
    removed = veil.getchannel("A").point(lambda alpha: 255 if alpha else 0)
    return Image.composite(veiled, image.convert("RGB"), removed)


def _scores(method: Method, batch: Batch, passes: dict[str, Encoded], shown: PassPlan) -> Tensor:
    used = method.scores_for(method.plan, shown, shown.spec.views[0], batch.views, passes)
    if used is not None:
        return used
    if not method.plan.shape.scored:  # the tower has no attention to show
        return torch.zeros(batch.size, shown.num_patches)
    encoding = models.encode_image(models.visual_of(method.model), _pixels(method, batch, shown), return_scores=True)
    assert encoding.scores is not None
    return encoding.scores


def _maps(method: Method, batch: Batch, tokens: Tensor, shown: PassPlan) -> Tensor:
    texts = F.normalize(models.encode_text(method.model, tokens.to(method.mean.device)).float(), dim=-1)
    visual, images = models.visual_of(method.model), _pixels(method, batch, shown)
    return torch.cat([models.text_maps(visual, image[None], text[None])[:, 0]
                      for image, text in zip(images, texts, strict=True)])


def _pixels(method: Method, batch: Batch, shown: PassPlan) -> Tensor:
    return resized(augment.apply(batch.views[shown.spec.views[0]], method.mean, method.std), shown.image_size)


def _whole_images(images: Sequence[Image.Image], sizes: Mapping[str, tuple[int, int]]) -> Batch:
    n = len(images)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(n, 4)
    views = {}
    for name, (height, width) in sizes.items():
        arrays = [np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
        views[name] = ViewBatch(pixels, box, torch.zeros(n, dtype=torch.bool))
    nothing = torch.zeros(n, 1, dtype=torch.int64)
    return Batch(views, nothing, nothing[:, 0], torch.arange(n))
