"""The losses as pure functions of tensors; what they are computed from is in this package's classes.

All are computed in float32 whatever the autocast state, since differences of logits near 100 do not
survive 16-bit arithmetic. On several ranks the rows are gathered with gradient (`aclip.dist.gather`): each
rank returns the loss of its own rows against everybody's, and the mean over ranks is the loss of the
whole batch.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from aclip import dist


def clip_loss(
    image_features: Float[Tensor, "B D"],
    text_features: Float[Tensor, "B D"],
    logit_scale: Float[Tensor, ""] | float,
    caption_ids: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (Radford et al., arXiv 2103.00020, figure 3).

    L = 1/2 mean_i [-log softmax_j(s v_i . t_j)]_{j=i} + 1/2 mean_i [-log softmax_j(s t_i . v_j)]_{j=i}

    Args:
        image_features: (B, D) rows of unit length.
        text_features: (B, D) rows of unit length.
        logit_scale: the multiplier s (already exponentiated).
        caption_ids: (B,) int64; where two different pairs have equal ids, neither is a negative of the
            other: they are left out of each other's denominator.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = image_features.float(), text_features.float()
        all_image, all_text = dist.gather(image), dist.gather(text)
        labels = torch.arange(len(image), device=image.device) + dist.rank() * len(image)
        by_image = logit_scale * image @ all_text.T
        by_text = logit_scale * text @ all_image.T
        if caption_ids is not None:
            same = caption_ids[:, None] == dist.gather(caption_ids)[None, :]
            same[torch.arange(len(image), device=image.device), labels] = False
            by_image = by_image.masked_fill(same, float("-inf"))
            by_text = by_text.masked_fill(same, float("-inf"))
        return (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2


def ntxent_loss(
    z1: Float[Tensor, "B D"], z2: Float[Tensor, "B D"], temperature: float
) -> Float[Tensor, ""]:
    """NT-Xent (Chen et al., arXiv 2002.05709, equation 1), mean over the 2B anchors.

    l(i, j) = -log( exp(z_i . z_j / tau) / sum_{k != i} exp(z_i . z_k / tau) ), z normalised to unit length,
    j the other view of i, k over all 2B rows but i itself.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
        everyone = torch.cat([dist.gather(z1), dist.gather(z2)])
        rows = torch.arange(len(z1), device=z1.device) + dist.rank() * len(z1)
        half = len(everyone) // 2
        losses = []
        for z, own, other in ((z1, rows, rows + half), (z2, rows + half, rows)):
            logits = z @ everyone.T / temperature
            logits = logits.scatter(1, own[:, None], float("-inf"))
            losses.append(F.cross_entropy(logits, other))
        return (losses[0] + losses[1]) / 2


def byol_loss(prediction: Float[Tensor, "B D"], target: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """BYOL's regression (Grill et al., arXiv 2006.07733, equation 2): mean(2 - 2 cos(prediction, target)).

    The target carries no gradient.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        return (2 - 2 * F.cosine_similarity(prediction.float(), target.detach().float(), dim=1)).mean()
