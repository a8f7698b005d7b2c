"""The losses as pure functions of tensors; what they are computed from is in this package's classes.

All are computed in float32 whatever the autocast state, since differences of logits near 100 do not
survive 16-bit arithmetic. On several ranks the rows are gathered with gradient (`aclip.dist.gather`): each
rank returns the loss of its own rows against everybody's, and the mean over ranks is the loss of the
whole batch. Of the (WB, WB) logits a rank computes (B, WB), some rows at a time where these are many
(`sum_over_rows`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aclip import dist

LOGITS_AT_ONCE = 2**24
"""Logits that are held at a time, 64 MiB; their softmax and masks take some three times as much besides."""

_NOT_A_TOKEN = -1


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
        labels = torch.arange(len(image), device=image.device) + dist.rank() * len(image)
        all_ids = None if caption_ids is None else dist.gather(caption_ids)

        def contrast(rows: Tensor, everyone: Tensor) -> Tensor:
            def loss(rows: Tensor, labels: Tensor) -> Tensor:
                logits = logit_scale * rows @ everyone.T
                if all_ids is not None:
                    same = (all_ids[labels, None] == all_ids).scatter(1, labels[:, None], False)
                    logits = logits.masked_fill(same, float("-inf"))
                return F.cross_entropy(logits, labels, reduction="sum")

            return sum_over_rows(loss, rows, labels, columns=len(everyone))

        return (contrast(image, dist.gather(text)) + contrast(text, dist.gather(image))) / (2 * len(image))


def chance_loss(caption_ids: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """Return what `clip_loss` is where all features are alike, for this rank's rows, without waiting for the device.

    mean_i log(1 + number of pairs j with another caption than i), over the pairs of all ranks: ln(batch) where all
    captions differ. It is the same in both directions and for every view.

    Args:
        caption_ids: (B,) int64, as for `clip_loss`.
    """
    everyone = dist.gather(caption_ids).sort().values
    own = caption_ids.contiguous()
    equal = torch.searchsorted(everyone, own, right=True) - torch.searchsorted(everyone, own)
    return torch.log(1.0 + len(everyone) - equal).mean()


def sum_over_rows(
    loss: Callable[[Tensor, Tensor], Tensor], rows: Float[Tensor, "B D"], labels: Int[Tensor, " B"], *, columns: int
) -> Float[Tensor, ""]:
    """Return `loss(rows, labels)`, a sum over rows, computed for so many rows at a time as `LOGITS_AT_ONCE` allows.

    Where that takes several times, the logits of each are computed again in the backward pass, one more product of
    B x WB x D, so that never more than one part of them is held. What `loss` reads besides gets its gradient, too.

    Args:
        loss: of some rows, with (rows, columns) logits within.
        rows: (B, D) float32.
        labels: (B,) int64, passed on with them.
        columns: logits of a row.
    """
    most = max(1, LOGITS_AT_ONCE // columns)
    if len(rows) <= most:
        return loss(rows, labels)
    parts: list[Tensor] = [
        checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(rows.split(most), labels.split(most), strict=True)]
    return torch.stack(parts).sum()


def sigmoid_loss(
    image_features: Float[Tensor, "B D"],
    text_features: Float[Tensor, "B D"],
    logit_scale: Float[Tensor, ""] | float,
    logit_bias: Float[Tensor, ""] | float,
    caption_ids: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343, equation 1).

    L = -1/B sum_i sum_j log sigmoid(z_ij (s v_i . t_j + b)), z_ij = 1 where i = j, else -1

    Args:
        image_features: (B, D) rows of unit length.
        text_features: (B, D) rows of unit length.
        logit_scale: the multiplier s (already exponentiated).
        logit_bias: b.
        caption_ids: (B,) int64; where two different pairs have equal ids, their cross terms are left out of the sum,
            neither positive nor negative.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, all_text = image_features.float(), dist.gather(text_features.float())
        labels = torch.arange(len(image), device=image.device) + dist.rank() * len(image)
        all_ids = None if caption_ids is None else dist.gather(caption_ids)

        def loss(rows: Tensor, labels: Tensor) -> Tensor:
            logits = logit_scale * rows @ all_text.T + logit_bias
            pairs = labels[:, None] == torch.arange(len(all_text), device=rows.device)
            losses = -F.logsigmoid(torch.where(pairs, logits, -logits))
            if all_ids is not None:
                losses = losses.masked_fill((all_ids[labels, None] == all_ids) & ~pairs, 0.0)
            return losses.sum(dim=1).sum()

        return sum_over_rows(loss, image, labels, columns=len(all_text)) / len(image)


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

        def loss(z: Tensor, own: Tensor) -> Tensor:
            logits = (z @ everyone.T / temperature).scatter(1, own[:, None], float("-inf"))
            return F.cross_entropy(logits, (own + half) % (2 * half), reduction="sum")

        total = sum(sum_over_rows(loss, z, own, columns=2 * half) for z, own in ((z1, rows), (z2, rows + half)))
        assert isinstance(total, Tensor)
        return total / (2 * len(z1))


def byol_loss(prediction: Float[Tensor, "B D"], target: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """BYOL's regression (Grill et al., arXiv 2006.07733, equation 2): mean(2 - 2 cos(prediction, target)).

    The target carries no gradient.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        return (2 - 2 * F.cosine_similarity(prediction.float(), target.detach().float(), dim=1)).mean()


def codeword_loss(
    logits: Float[Tensor, "M W"],
    teacher_logits: Float[Tensor, "M W"],
    centre: Float[Tensor, " W"],
    temperature: float,
    teacher_temperature: float,
) -> Float[Tensor, ""]:
    """Cross-entropy between soft codewords, as in DINO (Caron et al., arXiv 2104.14294, section 3.1), summed over rows.

        L = sum_m [-sum_w q_mw log p_mw]
        p_m = softmax(s_m / tau),  q_m = softmax((t_m - centre) / tau_teacher)

    The teacher carries no gradient. Without rows the loss is 0, with a gradient of 0.

    Args:
        logits: (M, W) the student's, s, over W codewords.
        teacher_logits: (M, W) the teacher's, t.
        centre: (W,) what all rows of the teacher have in common.
        temperature: tau of the student.
        teacher_temperature: tau of the teacher, lower than the student's to keep its codewords sharp.
    """
    with torch.autocast(logits.device.type, enabled=False):
        targets = ((teacher_logits.detach().float() - centre) / teacher_temperature).softmax(dim=1)
        return F.cross_entropy(logits.float() / temperature, targets, reduction="sum")


def hidden_token_loss(
    logits: Float[Tensor, "M W"], tokens: Int[Tensor, " M"], hidden: Bool[Tensor, " M"]
) -> Float[Tensor, ""]:
    """Cross-entropy of the hidden tokens (BERT, Devlin et al., arXiv 1810.04805, section 3.1).

        L = -1/n sum_{m hidden} log softmax(s_m)[token_m],  n = hidden tokens

    n is counted over all ranks and divided by their number, so that the mean over ranks is the mean over all hidden
    tokens, however many each rank has. With nothing hidden the loss is 0, with a gradient of 0.

    Args:
        logits: (M, W) s over a vocabulary of W.
        tokens: (M,) int64 what stood there.
        hidden: (M,) bool, which rows count.
    """
    with torch.autocast(logits.device.type, enabled=False):
        targets = tokens.masked_fill(~hidden, _NOT_A_TOKEN)
        total = F.cross_entropy(logits.float(), targets, ignore_index=_NOT_A_TOKEN, reduction="sum")
        return total * dist.world_size() / dist.sum_over_ranks(hidden.sum()).clamp(min=1)
