"""The two reconstructions of MaskCLIP: masked self-distillation of patches, and masked language modelling (BERT)."""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import Transformer
from torch import Tensor, nn

from aclip import dist
from aclip.config import Count, Pass, Positive, TextPass
from aclip.ema import frozen_copy
from aclip.errors import ConfigError
from aclip.models.blocks import run_blocks
from aclip.objectives.base import Objective, block_macs
from aclip.objectives.functional import codeword_loss, hidden_token_loss, sum_over_rows
from aclip.objectives.reconstruction import PatchDecoder, kept_indices, missing_patches
from aclip.structs import StepContext, TowerShape


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
    Chosen here: a `PatchDecoder` as wide as the tower, so that one quantizer reads both decoder and teacher; a
    `Quantizer` without iBOT's two hidden layers of 2,048, which would cost nearly as much as the decoder at ViT-B/16;
    the temperatures; and as `centre` the mean logits of the batch over all ranks, which must pass equally many rows.
    DINO's is a moving average over steps; a function of the batch alone needs no state.

    Reads the online pass, then the EMA pass: the same views at the same resolution, whole.

    Args:
        decoder_layers: blocks of the decoder.
        codewords: how many; None is 8,192 as in iBOT, 32/3 of the width for towers below 768.
        student_temperature, teacher_temperature: tau and tau_teacher.
    """

    takes = (Pass, Pass)
    needs_patches = True
    needs_masking = True

    def __init__(
        self, reads: Mapping[str, Pass], shape: TowerShape, decoder_layers: Count = 1, codewords: Count | None = None,
        student_temperature: Positive = 0.1, teacher_temperature: Positive = 0.04,
    ) -> None:
        super().__init__(reads, shape)
        (student_name, student), (teacher_name, teacher) = reads.items()
        if ((student.encoder, student.fill, teacher.encoder, teacher.mask_ratio) != ("online", False, "ema", 0.0)
                or (student.views, student.resolution) != (teacher.views, teacher.resolution)):
            raise ConfigError("objective 'masked_distillation' distils an EMA pass of whole images into an online pass "
                              "that does not fill, with the same views at the same resolution: correct pass "
                              f"'{student_name}' or '{teacher_name}'")
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.decoder = PatchDecoder(shape.width, shape.width, decoder_layers)
        self.quantizer = Quantizer(shape.width, codewords or min(8192, shape.width * 32 // 3))
        self.ema_quantizer = cast(Quantizer, frozen_copy(self.quantizer))

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        student, teacher = (context.passes[name] for name in self.reads)
        assert student.patches is not None
        assert teacher.patches is not None
        targets, keep = teacher.patches.flatten(0, 1), kept_indices(student).flatten(0, 1)
        decoded = self.decoder(student.cls.flatten(0, 1), student.patches.flatten(0, 1), keep, student.grid_size)
        missing = missing_patches(keep, math.prod(student.grid_size))
        # a stable sort, unlike nonzero, does not synchronise with the host
        removed = missing.byte().argsort(dim=1, descending=True, stable=True)[:, : missing.shape[1] - keep.shape[1]]
        decoded, targets = (x.take_along_dim(removed[:, :, None], dim=1).flatten(0, 1) for x in (decoded, targets))
        with torch.no_grad():
            centre = self.ema_quantizer.mean(targets)

        def loss(decoded: Tensor, rows: Tensor) -> Tensor:  # logits over codewords are large: in chunks
            with torch.no_grad():
                teacher_logits = self.ema_quantizer(targets[rows])
            return codeword_loss(self.quantizer(decoded), teacher_logits, centre, self.student_temperature,
                                 self.teacher_temperature)

        rows = torch.arange(len(decoded), device=decoded.device)
        return sum_over_rows(loss, decoded, rows, columns=len(self.quantizer.codewords)) / max(1, len(decoded))

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.quantizer, self.ema_quantizer)]

    def decoder_macs(self, images: Sequence[tuple[int, int, int]], text_tokens: float) -> float:
        views, num_patches, _ = images[0]  # the quantizers, 1.4 % of MaskCLIP's image part at ViT-B/16, do not count
        return views * self.decoder.macs(num_patches)


class Quantizer(nn.Module):
    """Maps features to their similarity with every codeword: s_w = cos(W x + b, c_w), 256 wide as in DINO and iBOT."""

    def __init__(self, width: int, codewords: int) -> None:
        super().__init__()
        self.bottleneck = nn.Linear(width, 256)
        self.codewords = nn.Parameter(torch.randn(codewords, 256) * 256**-0.5)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B W"]:
        return F.linear(self.unit(x), F.normalize(self.codewords, dim=-1))

    def unit(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B E"]:
        """Return what is compared with codewords, float32 rows of unit length."""
        return F.normalize(self.bottleneck(x).float(), dim=-1)

    def mean(self, x: Float[Tensor, "M C"]) -> Float[Tensor, " W"]:
        """Return the mean similarities over the rows of all ranks, float32; 0 without rows. Linear in `unit`."""
        total = dist.sum_over_ranks(self.unit(x).sum(dim=0)) / max(1, len(x) * dist.world_size())
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize(self.codewords.float(), dim=-1) @ total


class MaskedLanguage(Objective):
    """The text part of MaskCLIP (Dong et al., arXiv 2208.12262, section 3.3), a reconstruction.

        L = mean_{i hidden} [-log softmax(W norm(decoder(states))_i + b)[token_i]]

    The mean is over the hidden tokens of the whole batch, on all ranks (`functional.hidden_token_loss`), and does not
    depend on padding. With nothing hidden the loss is 0, with a gradient of 0.

    The paper has no public code. It names the parts: BERT's masking, a decoder after the text encoder that separates
    the two tasks, cross-entropy. Chosen here: CLIP's causal encoder, so that the state of a hidden token depends on the
    words before it alone; a bidirectional decoder without padding, `decoder_layers` blocks as wide as the text tower,
    with heads of width 64, a final norm, and its own linear map to the vocabulary. It adds no positions, which the
    encoder's states hold.

    Reads one text pass.

    Args:
        decoder_layers: blocks of the decoder.
    """

    takes = (TextPass,)
    needs_text = True
    needs_masking = True

    def __init__(self, reads: Mapping[str, TextPass], shape: TowerShape, decoder_layers: Count = 4) -> None:
        super().__init__(reads, shape)
        (name, text), = reads.items()
        self.mask_ratio = text.mask_ratio
        if self.mask_ratio == 0:
            raise ConfigError(f"objective 'masked_language' predicts hidden tokens, but text pass '{name}' hides none: "
                              "set its mask_ratio, e.g. to 0.2")
        width = shape.text_width
        self.transformer = Transformer(width, decoder_layers, max(1, width // 64))
        self.norm = nn.LayerNorm(width)
        self.vocabulary = nn.Linear(width, shape.vocab_size)

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        text = context.texts[self.reads[0]]
        assert text.states is not None
        assert text.hidden is not None
        position = torch.arange(text.tokens.shape[1], device=text.tokens.device)
        until_end = position <= text.tokens.argmax(dim=1, keepdim=True)
        x, _ = run_blocks(self.transformer, text.states, visible=until_end)
        # Logits over the vocabulary are large, so they are computed for hidden tokens alone. Their number is fixed, so
        # that no size is read back from the device; the last few are mostly not hidden and do not count.
        hidden = text.hidden.flatten()
        first = hidden.byte().argsort(descending=True, stable=True)[: max_hidden(len(hidden), self.mask_ratio)]
        logits = self.vocabulary(self.norm(x.flatten(0, 1).index_select(0, first)))
        return hidden_token_loss(logits, text.tokens.flatten()[first], hidden[first])

    def decoder_macs(self, images: Sequence[tuple[int, int, int]], text_tokens: float) -> float:
        width = self.vocabulary.in_features
        blocks = len(self.transformer.resblocks) * block_macs(text_tokens, width, 4 * width)
        return blocks + self.mask_ratio * text_tokens * width * self.vocabulary.out_features


def max_hidden(count: int, mask_ratio: float) -> int:
    """Return a number that the hidden ones of `count` tokens exceed with a probability of at most 1e-9.

    Bernstein's inequality, n = `count`, p = `mask_ratio`: P(X >= n p + t) <= exp(-t^2 / (2 n p (1 - p) + 2/3 t)). If it
    is exceeded, the last hidden tokens of the batch are left out.
    """
    rarity = math.log(1e9)
    excess = rarity / 3 + math.sqrt((rarity / 3) ** 2 + 2 * rarity * count * mask_ratio * (1 - mask_ratio))
    return min(count, math.ceil(count * mask_ratio + excess))
