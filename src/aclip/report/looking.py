"""What a method looks at: its own scoring and masking on plain pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aclip import models
from aclip.data import augment
from aclip.method import Method, resized
from aclip.plan import PassPlan
from aclip.report.snapshots import snapshot_path, write_snapshot
from aclip.structs import Batch, Encoded, ViewBatch


def take_snapshot(
    method: Method, pictures: Sequence[Image.Image], captions: Sequence[str], step: int, folder: Path
) -> Path:
    """Write what `method` scores and keeps of whole, unaugmented pictures; return the file.

    The method's passes run as in training, on views that each show the whole picture. Shown is the pass
    that masks; a recipe without masking shows where its encoder looks, and keeps everything.

    Args:
        method: left as it was; nothing is trained, no statistics move.
        pictures: RGB. captions: one each.
        step: optimizer steps done.
        folder: the run's `snapshots`.
    """
    device = method.mean.device
    sizes = method.plan.view_sizes
    batch = _whole_pictures(pictures, sizes).to(device)
    with torch.no_grad():
        passes = method.run_passes(batch)
        shown = max(method.plan.passes, key=lambda p: p.num_patches - p.num_keep)
        view = shown.spec.views[0]
        encoded = passes[shown.spec.name]
        keep = encoded.keep_indices[0] if encoded.keep_indices is not None else _everything(batch, shown.num_patches)
        scores = _scores(method, batch, passes, shown)
    path = snapshot_path(folder, step)
    write_snapshot(path, batch.views[view].pixels, scores, keep, shown.grid_size, captions, step)
    return path


def _scores(method: Method, batch: Batch, passes: dict[str, Encoded], shown: PassPlan) -> Tensor:
    """Return the scores that a pass used, on its grid, or the online encoder's if it used none."""
    used = method.scores_for(method.plan, shown, shown.spec.views[0], batch.views, passes)
    if used is not None:
        return used
    view = batch.views[shown.spec.views[0]]
    if not method.plan.shape.scored:  # nobody asks for the patches: there is nothing to show
        return torch.zeros(batch.size, shown.num_patches)
    pixels = resized(augment.apply(view, method.mean, method.std), shown.image_size)
    encoding = models.encode_image(models.visual_of(method.model), pixels, return_scores=True)
    assert encoding.scores is not None
    return encoding.scores


def _whole_pictures(pictures: Sequence[Image.Image], sizes: Mapping[str, tuple[int, int]]) -> Batch:
    """Return a batch whose views all show the whole picture, each at its size."""
    n = len(pictures)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(n, 4)
    views = {}
    for name, (height, width) in sizes.items():
        arrays = [np.asarray(p.resize((width, height), Image.Resampling.BICUBIC)) for p in pictures]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
        views[name] = ViewBatch(pixels, box, torch.zeros(n, dtype=torch.bool))
    nothing = torch.zeros(n, 1, dtype=torch.int64)
    return Batch(views, nothing, nothing[:, 0], torch.arange(n))


def _everything(batch: Batch, count: int) -> Tensor:
    return torch.arange(count).expand(batch.size, count)
