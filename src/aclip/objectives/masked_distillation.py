"""Masked self-distillation: the EMA encoder's features of removed patches, predicted from the others (MaskCLIP)."""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from aclip import dist
from aclip.config import Count, Pass, Positive
from aclip.ema import frozen_copy
from aclip.errors import ConfigError
from aclip.objectives.base import Objective
from aclip.objectives.decoder import PatchDecoder, missing_patches
from aclip.objectives.functional import codeword_loss, sum_over_rows
from aclip.structs import StepContext, TowerShape

BOTTLENECK = 256  # width in which patches are compared with codewords, as in DINO and iBOT


class MaskedDistillation(Objective):
    """The image part of MaskCLIP (Dong et al., arXiv 2208.12262, section 3.2), a reconstruction.

        L = mean_{k removed} [-sum_w q_kw log p_kw]
        p = softmax(h(decoder(f))_k / tau),  q = softmax((h_ema(f_ema)_k - centre) / tau_teacher)

    f are the online encoder's tokens of the kept patches, f_ema the EMA encoder's of the whole image, h an online
    quantizer and h_ema its EMA. The mean is over the removed patches of all views and samples. The same number is
    removed from every view, so that the mean over ranks is the loss of the whole batch. With nothing removed the loss
    is 0, with a gradient of 0.

    The paper has no public code. It names the parts: a one-layer decoder with mask tokens, the teacher's features of
    the full image as targets, "soft codewords" of an online quantizer after iBOT (arXiv 2111.07832), cross-entropy.
    Chosen here:

    - decoder: `PatchDecoder`, as wide as the tower, so that one quantizer reads both decoder and teacher;
    - h(x) = cosine of Linear(C, 256)(x) and each codeword, without iBOT's two hidden layers of 2,048, which would cost
      nearly as much as the decoder at ViT-B/16;
    - 8,192 codewords from width 768 on, in proportion below (`num_codewords`);
    - tau 0.1, tau_teacher 0.04, and as `centre` the mean logits of the batch over all ranks, which must pass equally
      many rows. DINO's is a moving average over steps; a function of the batch alone needs no state.

    The logits of removed patches over codewords are large and computed in chunks (`functional.sum_over_rows`).

    Reads the online pass, then the teacher pass: the same views at the same resolution, whole.

    Args:
        reads, shape: see `Objective`.
        decoder_layers: blocks of the decoder.
        codewords: how many; None is `num_codewords`.
        student_temperature: tau.
        teacher_temperature: tau_teacher.

    Raises:
        ConfigError: passes that cannot be compared patch by patch.
    """

    takes = (Pass, Pass)
    needs_patches = True
    needs_masking = True

    def __init__(
        self,
        reads: Mapping[str, Pass],
        shape: TowerShape,
        decoder_layers: Count = 1,
        codewords: Count | None = None,
        student_temperature: Positive = 0.1,
        teacher_temperature: Positive = 0.04,
    ) -> None:
        super().__init__(reads, shape)
        _check_comparable(reads)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.decoder = PatchDecoder(shape.width, shape.width, decoder_layers)
        self.quantizer = Quantizer(shape.width, codewords or num_codewords(shape))
        self.ema_quantizer = cast(Quantizer, frozen_copy(self.quantizer))

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Read the kept patches of the online pass and all patches of the EMA pass."""
        student, teacher = (context.passes[name] for name in self.reads)
        assert student.patches is not None
        assert teacher.patches is not None
        targets = teacher.patches.flatten(0, 1)
        if student.keep_indices is None:  # explicit, so that the mask token is part of the graph in every step
            keep = torch.arange(targets.shape[1], device=targets.device).expand(len(targets), -1)
        else:
            keep = student.keep_indices.flatten(0, 1)
        decoded = self.decoder(student.cls.flatten(0, 1), student.patches.flatten(0, 1), keep, student.grid_size)
        removed = removed_indices(keep, math.prod(student.grid_size))
        decoded, targets = (
            x.take_along_dim(removed[:, :, None], dim=1).flatten(0, 1) for x in (decoded, targets)
        )
        with torch.no_grad():
            centre = self.ema_quantizer.mean(targets)

        def loss(decoded: Tensor, rows: Tensor) -> Tensor:
            with torch.no_grad():
                teacher_logits = self.ema_quantizer(targets[rows])
            return codeword_loss(self.quantizer(decoded), teacher_logits, centre, self.student_temperature,
                                 self.teacher_temperature)

        rows = torch.arange(len(decoded), device=decoded.device)
        return sum_over_rows(loss, decoded, rows, columns=len(self.quantizer.codewords)) / max(1, len(decoded))

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the quantizer and its average; the decoder has none."""
        return [(self.quantizer, self.ema_quantizer)]

    def decoder_macs(self, images: Sequence[tuple[int, int, int]], text_tokens: float) -> float:
        """See `Objective.decoder_macs`; the quantizers, 1.4 % of MaskCLIP's image part at ViT-B/16, are not counted."""
        views, num_patches, _ = images[0]
        return views * self.decoder.macs(num_patches)


class Quantizer(nn.Module):
    """Maps features to their cosine similarity with every codeword.

        s_w = cos(W x + b, c_w)

    Args:
        width: of the features.
        codewords: how many.
    """

    def __init__(self, width: int, codewords: int) -> None:
        super().__init__()
        self.bottleneck = nn.Linear(width, BOTTLENECK)
        self.codewords = nn.Parameter(torch.randn(codewords, BOTTLENECK) * BOTTLENECK**-0.5)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B W"]:
        """Return (..., W) similarities in [-1, 1], in the autocast precision."""
        return F.linear(self.unit(x), F.normalize(self.codewords, dim=-1))

    def unit(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B E"]:
        """Return the bottleneck features that are compared with codewords, float32 rows of unit length."""
        return F.normalize(self.bottleneck(x).float(), dim=-1)

    def mean(self, x: Float[Tensor, "M C"]) -> Float[Tensor, " W"]:
        """Return the mean similarities over the rows of all ranks, float32; 0 without rows.

        They are linear in `unit`, so that the similarities of single rows are not needed.
        """
        total = dist.sum_over_ranks(self.unit(x).sum(dim=0)) / max(1, len(x) * dist.world_size())
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize(self.codewords.float(), dim=-1) @ total


def num_codewords(shape: TowerShape) -> int:
    """Return the number of codewords: 8,192 as in iBOT, 32/3 of the width for towers below 768."""
    return min(8192, shape.width * 32 // 3)


def removed_indices(keep_indices: Int[Tensor, "B K"], num_patches: int) -> Int[Tensor, "B R"]:
    """Return the patches that are not kept, (B, N - K) int64 ascending, without host synchronisation."""
    removed_first = missing_patches(keep_indices, num_patches).byte().argsort(dim=1, descending=True, stable=True)
    return removed_first[:, : num_patches - keep_indices.shape[1]]


def _check_comparable(reads: Mapping[str, Pass]) -> None:
    what = "objective 'masked_distillation'"
    (student_name, student), (teacher_name, teacher) = reads.items()
    if student.encoder != "online" or teacher.encoder != "ema":
        raise ConfigError(f"{what} distils an EMA pass into an online pass, but '{student_name}' is {student.encoder} "
                          f"and '{teacher_name}' is {teacher.encoder}")
    if (student.views, student.resolution) != (teacher.views, teacher.resolution):
        seen = [f"'{name}' has {', '.join(p.views)} at resolution {p.resolution:g}" for name, p in reads.items()]
        raise ConfigError(f"{what} compares patch by patch, so both passes need the same views at the same "
                          f"resolution, but {' and '.join(seen)}")
    if teacher.mask_ratio > 0:
        raise ConfigError(f"{what} learns from whole images, but pass '{teacher_name}' removes patches: set its "
                          "masking to 'none'")
    if student.fill:
        raise ConfigError(f"{what} has its own mask tokens, but pass '{student_name}' fills: set fill to false")
