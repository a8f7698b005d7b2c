"""Carrying a score map from the crop that was scored to the crop that is masked."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def crop_scores(
    scores: Float[Tensor, "B Nc"],
    context_grid: tuple[int, int],
    context_box: Float[Tensor, "B 4"],
    view_box: Float[Tensor, "B 4"],
    grid_size: tuple[int, int],
    flipped: Bool[Tensor, " B"] | None = None,
    padding: Literal["border", "zeros"] = "border",
) -> Float[Tensor, "B N"]:
    """Resample score maps onto each view's own patch grid, batched and on the device.

    The score of view patch (i, j) is the context map, bilinear between patch centres, at the source pixel
        y = top + (i + 1/2) / h * height,   x = left + (j + 1/2) / w * width
    of the view's box; in a flipped view patch j shows source column w - 1 - j.

    Args:
        scores: (B, Nc) float, on the context's grid.
        context_grid: patches (down, across) of the context.
        context_box: (B, 4) the scored crop (top, left, height, width) in source pixels.
        view_box: (B, 4) the view, in the same frame of source pixels.
        grid_size: patches (down, across) of the view.
        flipped: (B,) bool, views mirrored left to right; None means none.
        padding: outside the context's outermost patch centres "border" continues the edge value; with
            "zeros" patches whose centre lies outside the context box score 0, as in the A-CLIP release.

    Returns:
        (B, N) float32.
    """
    h, w = grid_size
    maps = scores.float().reshape(-1, 1, *context_grid)
    context, view = context_box.float(), view_box.float()
    rows = (torch.arange(h, device=maps.device, dtype=torch.float32) + 0.5) / h
    columns = (torch.arange(w, device=maps.device, dtype=torch.float32) + 0.5) / w
    y = view[:, 0, None] + rows * view[:, 2, None]
    x = view[:, 1, None] + columns * view[:, 3, None]
    # grid_sample without align_corners: -1 and 1 are the outer edges of the map's corner pixels
    y = (y - context[:, 0, None]) / context[:, 2, None] * 2 - 1
    x = (x - context[:, 1, None]) / context[:, 3, None] * 2 - 1
    if flipped is not None:
        x = torch.where(flipped[:, None], x.flip(1), x)
    points = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    sampled = F.grid_sample(maps, points, mode="bilinear", padding_mode="border", align_corners=False)
    if padding == "zeros":
        sampled = sampled * (points.abs() <= 1).all(dim=-1)[:, None]
    return sampled.flatten(1)
