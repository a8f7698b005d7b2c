"""Losses as pure functions of tensors (`aclip.losses`).

All compute in float32 under any autocast state, since differences of logits near 100 do not survive 16-bit arithmetic.

Across ranks: rows are gathered with their gradient (`aclip.dist.gather`), so every rank must pass equally many. Each
rank returns the loss of its own rows against those of all ranks; the mean over ranks is the loss of the whole batch,
and gradients averaged over ranks are its gradients. Of the (WB, WB) logits of W ranks with B rows, a rank computes
(B, WB), in chunks of rows where these are many (`sum_over_rows`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aclip import dist

__all__ = ["affinity_loss", "byol_loss", "chance_loss", "clip_loss", "codeword_loss", "hidden_token_loss",
           "ntxent_loss", "sigmoid_loss", "sum_over_rows"]

# Logits held at a time, 64 MiB in float32; softmax and masks take about three times as much on top.
LOGITS_AT_ONCE = 2**24


def clip_loss(
    image_features: Float[Tensor, "B D"], text_features: Float[Tensor, "B D"], logit_scale: Float[Tensor, ""] | float,
    caption_ids: Int[Tensor, " B"] | None = None, *,
    guide: Float[Tensor, "B E"] | None = None, false_negatives: float = 1.0,
) -> Float[Tensor, ""]:
    """Return the symmetric InfoNCE of CLIP (Radford et al., arXiv 2103.00020, figure 3).

    L = 1/2 mean_i [-log softmax_j(s v_i . t_j)]_{j=i} + 1/2 mean_i [-log softmax_j(s t_i . v_j)]_{j=i}

    Across ranks, j runs over the rows of all ranks, i over this rank's; the mean over ranks is the loss of the batch.

    Args:
        image_features, text_features: (B, D) float, L2-normalised rows v and t.
        logit_scale: s > 0, the multiplier itself and not its log (CLIP's parameter holds the log).
        caption_ids: (B,) int64. Different pairs with equal ids are not each other's negatives: they are left out of
            the denominators. None: all pairs differ.
        guide: (B, E) float, another model's L2-normalised features g of the captions, without gradient. Different pairs
            with g_i . g_j >= `false_negatives` are left out in the same way, after GIST (Solatorio, arXiv 2402.16829,
            section 3.2), which compares with the similarity of the pair itself instead of a constant.
        false_negatives: a cosine.

    Returns:
        () float32, at least 0; log(batch) where all features are equal (`chance_loss`).

    Example:
        >>> aclip.losses.clip_loss(torch.eye(4), torch.eye(4), logit_scale=1.0)
        tensor(0.7437)
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = image_features.float(), text_features.float()
        labels = torch.arange(len(image), device=image.device) + dist.rank() * len(image)
        fill_alike = _filling(caption_ids, guide, false_negatives)

        def contrast(rows: Tensor, columns: Tensor) -> Tensor:
            def loss(rows: Tensor, labels: Tensor) -> Tensor:
                logits = logit_scale * rows @ columns.T
                return F.cross_entropy(fill_alike(logits, labels, float("-inf")), labels, reduction="sum")

            return sum_over_rows(loss, rows, labels, columns=len(columns))

        return (contrast(image, dist.gather(text)) + contrast(text, dist.gather(image))) / (2 * len(image))


def _filling(
    caption_ids: Int[Tensor, " B"] | None, guide: Float[Tensor, "B E"] | None = None, false_negatives: float = 1.0
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Return what sets logits (R, WB) of the pairs at positions (R,) to a value where other pairs are no negatives."""
    ids = None if caption_ids is None else dist.gather(caption_ids)
    guides = None if guide is None else dist.gather(guide.detach().float())

    def fill(logits: Tensor, labels: Tensor, value: float) -> Tensor:
        if ids is not None:
            logits = logits.masked_fill((ids[labels, None] == ids).scatter(1, labels[:, None], False), value)
        if guides is not None:
            alike = guides[labels] @ guides.T >= false_negatives
            logits = logits.masked_fill(alike.scatter(1, labels[:, None], False), value)
        return logits

    return fill


def chance_loss(caption_ids: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """Return `clip_loss` for features that are all equal: the loss of a model that has learned nothing.

    mean_i log(1 + number of pairs j whose caption differs from that of i), i over this rank's pairs, j over those of
    all ranks; log(batch) where all captions differ. `caption_ids` as for `clip_loss`. No host synchronisation.

    Example:
        >>> aclip.losses.chance_loss(torch.arange(64))
        tensor(4.1589)
    """
    everyone = dist.gather(caption_ids).sort().values
    own = caption_ids.contiguous()
    equal = torch.searchsorted(everyone, own, right=True) - torch.searchsorted(everyone, own)
    return torch.log(1.0 + len(everyone) - equal).mean()


def sigmoid_loss(
    image_features: Float[Tensor, "B D"], text_features: Float[Tensor, "B D"], logit_scale: Float[Tensor, ""] | float,
    logit_bias: Float[Tensor, ""] | float, caption_ids: Int[Tensor, " B"] | None = None, *,
    guide: Float[Tensor, "B E"] | None = None, false_negatives: float = 1.0,
) -> Float[Tensor, ""]:
    """Return the sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343, equation 1).

    L = -1/B sum_i sum_j log sigmoid(z_ij (s v_i . t_j + b)), z_ij = 1 where i = j, else -1

    Across ranks, j runs over the rows of all ranks, i over this rank's; the mean over ranks is the loss of the batch.

    Args:
        image_features, text_features: (B, D) float, L2-normalised rows v and t.
        logit_scale: s > 0, the multiplier itself and not its log.
        logit_bias: b.
        caption_ids: (B,) int64. Cross terms of different pairs with equal ids are left out of the sum. None: all pairs
            differ.
        guide, false_negatives: further cross terms to leave out, as for `clip_loss`.

    Returns:
        () float32, at least 0.

    Example:
        >>> aclip.losses.sigmoid_loss(torch.eye(4), torch.eye(4), logit_scale=10.0, logit_bias=-5.0)
        tensor(0.0269)
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, all_text = image_features.float(), dist.gather(text_features.float())
        labels = torch.arange(len(image), device=image.device) + dist.rank() * len(image)
        fill_alike = _filling(caption_ids, guide, false_negatives)

        def loss(rows: Tensor, labels: Tensor) -> Tensor:
            logits = logit_scale * rows @ all_text.T + logit_bias
            pairs = labels[:, None] == torch.arange(len(all_text), device=rows.device)
            losses = -F.logsigmoid(torch.where(pairs, logits, -logits))
            return fill_alike(losses, labels, 0.0).sum(dim=1).sum()

        return sum_over_rows(loss, image, labels, columns=len(all_text)) / len(image)


def affinity_loss(
    image_features: Float[Tensor, "B D"], text_features: Float[Tensor, "B D"], logit_scale: Float[Tensor, ""] | float,
    teacher_image_features: Float[Tensor, "B E"], teacher_text_features: Float[Tensor, "B E"],
    teacher_logit_scale: Float[Tensor, ""] | float, caption_ids: Int[Tensor, " B"] | None = None, *,
    label_share: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the divergence between the similarities of a batch as a teacher and as a student see them.

    MobileCLIP's distillation loss (Vasu et al., arXiv 2311.17049, section 4.1), and with a = `label_share` > 0 the
    hybrid one of CLIP-Refine (Yamaguchi et al., arXiv 2504.12717, section 4.2), which mixes in the pairs themselves:

        L = 1/2 mean_i KL(q_i. || p_i.) + 1/2 (the same for captions against images)
        p_ij = softmax_j(s v_i . t_j),  q_ij = a [i = j] + (1 - a) softmax_j(s' v'_i . t'_j)

    Across ranks, j runs over the rows of all ranks, i over this rank's; the mean over ranks is the loss of the batch.

    Args:
        image_features, text_features: (B, D) float, the student's, L2-normalised rows v and t.
        logit_scale: s > 0, the multiplier itself and not its log.
        teacher_image_features, teacher_text_features: (B, E) float, the teacher's v' and t', without gradient.
        teacher_logit_scale: s' > 0.
        caption_ids: (B,) int64. Different pairs with equal ids are left out of both distributions. None: all differ.
        label_share: a, in [0, 1].

    Returns:
        () float32, at least 0; 0 where both see the same and a = 0.

    Example:
        >>> student, teacher = (torch.eye(4), torch.eye(4), 1.0), (torch.eye(4), torch.eye(4), 10.0)
        >>> aclip.losses.affinity_loss(*student, *teacher)
        tensor(0.7423)
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, text, teacher_image, teacher_text = (
            features.float() for features in (image_features, text_features, teacher_image_features.detach(),
                                              teacher_text_features.detach()))
        width = image.shape[1]
        labels = torch.arange(len(image), device=image.device) + dist.rank() * len(image)
        fill_alike = _filling(caption_ids)

        def diverge(rows: Tensor, columns: Tensor, teacher_rows: Tensor, teacher_columns: Tensor) -> Tensor:
            def loss(rows: Tensor, labels: Tensor) -> Tensor:
                own, theirs = rows.split([width, rows.shape[1] - width], dim=1)
                logits, targets = logit_scale * own @ columns.T, teacher_logit_scale * theirs @ teacher_columns.T
                logits, targets = (fill_alike(x, labels, torch.finfo(x.dtype).min) for x in (logits, targets))
                with torch.no_grad():
                    q = (1 - label_share) * targets.softmax(dim=1)
                    q.scatter_(1, labels[:, None], label_share, reduce="add")
                return F.kl_div(logits.log_softmax(dim=1), q, reduction="sum")

            return sum_over_rows(loss, torch.cat([rows, teacher_rows], dim=1), labels, columns=2 * len(columns))

        return (diverge(image, dist.gather(text), teacher_image, dist.gather(teacher_text))
                + diverge(text, dist.gather(image), teacher_text, dist.gather(teacher_image))) / (2 * len(image))


def ntxent_loss(z1: Float[Tensor, "B D"], z2: Float[Tensor, "B D"], temperature: float) -> Float[Tensor, ""]:
    """Return NT-Xent of SimCLR (Chen et al., arXiv 2002.05709, equation 1), the mean over the 2B anchors.

    l(i, j) = -log( exp(z_i . z_j / tau) / sum_{k != i} exp(z_i . z_k / tau) ), z normalised to unit length, j the other
    view of i, k over all 2B rows but i itself.

    Across ranks, k runs over the rows of all ranks, i over this rank's; the mean over ranks is the loss of the batch.

    Args:
        z1, z2: (B, D) float, projections of the two views, in the same order; normalised here.
        temperature: tau > 0.

    Returns:
        () float32, at least 0; log(2 batch - 1) where all projections are equal.

    Example:
        >>> aclip.losses.ntxent_loss(torch.eye(4), torch.eye(4), temperature=0.5)
        tensor(0.5944)
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
        everyone = torch.cat([dist.gather(z1), dist.gather(z2)])
        rows = torch.arange(len(z1), device=z1.device) + dist.rank() * len(z1)
        half = len(everyone) // 2

        def loss(z: Tensor, own: Tensor) -> Tensor:
            logits = (z @ everyone.T / temperature).scatter(1, own[:, None], float("-inf"))
            return F.cross_entropy(logits, (own + half) % (2 * half), reduction="sum")

        first, second = (sum_over_rows(loss, z, own, columns=2 * half) for z, own in ((z1, rows), (z2, rows + half)))
        return (first + second) / (2 * len(z1))


def byol_loss(prediction: Float[Tensor, "B D"], target: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """Return BYOL's regression loss (Grill et al., arXiv 2006.07733, equation 2).

    L = mean_i [2 - 2 cos(prediction_i, target_i)]

    Across ranks it is local; the mean over ranks is the loss of the batch.

    Args:
        prediction, target: (B, D) float, normalised here; `target` receives no gradient.

    Returns:
        () float32 in [0, 4].

    Example:
        >>> aclip.losses.byol_loss(torch.eye(4), torch.eye(4))
        tensor(0.)
    """
    with torch.autocast(prediction.device.type, enabled=False):
        return (2 - 2 * F.cosine_similarity(prediction.float(), target.detach().float(), dim=1)).mean()


def codeword_loss(
    logits: Float[Tensor, "M W"], teacher_logits: Float[Tensor, "M W"], centre: Float[Tensor, " W"],
    temperature: float, teacher_temperature: float,
) -> Float[Tensor, ""]:
    """Return the cross-entropy between soft codewords, as in DINO (Caron et al., arXiv 2104.14294, section 3.1).

        L = sum_m [-sum_w q_mw log p_mw]
        p_m = softmax(s_m / tau),  q_m = softmax((t_m - centre) / tau_teacher)

    Across ranks it is local, apart from `centre`, which the caller computes over all of them.

    Args:
        logits, teacher_logits: (M, W) float, s and t over W codewords; t receive no gradient.
        centre: (W,) float, the teacher's mean logits.
        temperature, teacher_temperature: tau > tau_teacher > 0, so that the targets are sharp.

    Returns:
        () float32, the sum over rows; 0 with a gradient of 0 for M = 0.

    Example:
        >>> aclip.losses.codeword_loss(torch.zeros(1, 8), torch.eye(1, 8), torch.zeros(8), 0.1, 0.04)
        tensor(2.0794)
    """
    with torch.autocast(logits.device.type, enabled=False):
        targets = ((teacher_logits.detach().float() - centre) / teacher_temperature).softmax(dim=1)
        return F.cross_entropy(logits.float() / temperature, targets, reduction="sum")


def hidden_token_loss(
    logits: Float[Tensor, "M W"], tokens: Int[Tensor, " M"], hidden: Bool[Tensor, " M"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy of hidden tokens (BERT, Devlin et al., arXiv 1810.04805, section 3.1).

        L = -1/n sum_{m hidden} log softmax(s_m)[token_m],  n = hidden tokens

    Across ranks, n is the mean number of hidden tokens per rank. The mean over ranks is then the mean over all hidden
    tokens, even where ranks have different numbers of them.

    Args:
        logits: (M, W) float, s over a vocabulary of W.
        tokens: (M,) int64, the original tokens.
        hidden: (M,) bool, which rows count.

    Returns:
        () float32, at least 0; 0 with a gradient of 0 if nothing is hidden.

    Example:
        >>> aclip.losses.hidden_token_loss(torch.zeros(2, 8), torch.tensor([3, 1]), torch.tensor([True, False]))
        tensor(2.0794)
    """
    with torch.autocast(logits.device.type, enabled=False):
        targets = tokens.masked_fill(~hidden, -100)  # which cross_entropy ignores
        total = F.cross_entropy(logits.float(), targets, reduction="sum")
        return total * dist.world_size() / dist.sum_over_ranks(hidden.sum()).clamp(min=1)


def sum_over_rows(
    loss: Callable[[Tensor, Tensor], Tensor], rows: Float[Tensor, "B D"], labels: Int[Tensor, " B"], *, columns: int
) -> Float[Tensor, ""]:
    """Return `loss(rows, labels)`, a sum over rows, computed in chunks of at most `LOGITS_AT_ONCE` logits.

    With more than one chunk, the backward pass recomputes the logits of each (one more product of B x WB x D), so that
    only those of one chunk are held. Tensors that `loss` closes over receive their gradients as well.

    Args:
        loss: maps some rows and their labels to the sum of their losses, by way of (rows, columns) logits.
        rows, labels: split alike.
        columns: logits per row.

    Example:
        >>> def loss(rows, labels):
        ...     return torch.nn.functional.cross_entropy(rows @ torch.eye(4), labels, reduction="sum")
        >>> aclip.losses.sum_over_rows(loss, torch.eye(4), torch.arange(4), columns=4)
        tensor(2.9747)
    """
    chunk = max(1, LOGITS_AT_ONCE // columns)
    if len(rows) <= chunk:
        return loss(rows, labels)
    losses: list[Tensor] = [
        checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(rows.split(chunk), labels.split(chunk), strict=True)]
    return torch.stack(losses).sum()
