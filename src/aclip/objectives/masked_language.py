"""Masked language modelling: the hidden tokens of a caption, predicted from the others (BERT, in MaskCLIP)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from open_clip.transformer import Transformer
from torch import Tensor, nn

from aclip.config import TextPass
from aclip.errors import ConfigError
from aclip.models.blocks import run_blocks
from aclip.objectives.base import Objective, block_macs
from aclip.objectives.functional import hidden_token_loss
from aclip.structs import StepContext, TowerShape

HEAD_WIDTH = 64  # of attention, as in CLIP's text towers


class MaskedLanguage(Objective):
    """The text part of MaskCLIP (Dong et al., arXiv 2208.12262, section 3.3), a reconstruction.

        L = mean_{i hidden} [-log softmax(W norm(decoder(states))_i + b)[token_i]]

    The mean is over the hidden tokens of the whole batch, all ranks together, see `functional.hidden_token_loss`. It
    does not depend on how far captions are padded. With nothing hidden the loss is 0, with a gradient of 0.

    No code of the paper was ever released. It names the parts: BERT's masking, a decoder after the text encoder that
    keeps the two tasks apart, cross-entropy. What is chosen here:

    - the encoder is CLIP's causal one, so that a hidden token's state knows the words before it alone;
    - the decoder sees in both directions, but no padding: `decoder_layers` blocks as wide as the text tower, with 64
      wide heads, a final norm, and a linear map to the vocabulary of its own. It adds no positions, which the
      encoder's states hold.

    Args:
        decoder_layers: blocks of the decoder.

    Raises:
        ConfigError: a text pass that hides nothing.
    """

    takes = (TextPass,)
    needs_text = True
    needs_masking = True

    def __init__(self, reads: Sequence[TextPass], shape: TowerShape, decoder_layers: int = 4) -> None:
        super().__init__(reads, shape)
        self.mask_ratio = reads[0].mask_ratio
        if self.mask_ratio == 0:
            raise ConfigError(f"objective 'masked_language' predicts hidden tokens, but text pass '{reads[0].name}' "
                              "hides none: set its mask_ratio, e.g. to 0.2")
        width = shape.text_width
        self.transformer = Transformer(width, decoder_layers, max(1, width // HEAD_WIDTH))
        self.norm = nn.LayerNorm(width)
        self.vocabulary = nn.Linear(width, shape.vocab_size)

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Read the tokens and states of text pass `reads[0]`."""
        text = context.texts[self.reads[0]]
        assert text.states is not None
        assert text.hidden is not None
        place = torch.arange(text.tokens.shape[1], device=text.tokens.device)
        until_end = place <= text.tokens.argmax(dim=1, keepdim=True)
        x, _ = run_blocks(self.transformer, text.states, visible=until_end)
        # a logit for every token of the vocabulary is large: only for hidden tokens, of which a fixed number is taken,
        # whose last few are mostly not hidden and do not count, so that no size is read back from the device
        hidden = text.hidden.flatten()
        first = hidden.byte().argsort(descending=True, stable=True)[: most_hidden(len(hidden), self.mask_ratio)]
        logits = self.vocabulary(self.norm(x.flatten(0, 1).index_select(0, first)))
        return hidden_token_loss(logits, text.tokens.flatten()[first], hidden[first])

    def decoder_macs(self, images: Sequence[tuple[int, int, int]], text_tokens: float) -> float:
        """Return those of the blocks on all tokens, and of the vocabulary on the hidden share of them."""
        width = self.vocabulary.in_features
        blocks = len(self.transformer.resblocks) * block_macs(text_tokens, width, 4 * width)
        return blocks + self.mask_ratio * text_tokens * width * self.vocabulary.out_features


def most_hidden(count: int, mask_ratio: float) -> int:
    """Return a number of tokens that hiding each of `count` with probability `mask_ratio` exceeds once in 10^9 times.

    Bernstein's inequality: P(X >= n p + t) <= exp(-t^2 / (2 n p (1 - p) + 2/3 t)). Should it be exceeded all the same,
    the last hidden tokens of the batch are left out.

    Args:
        count: n, at least the number of tokens that can be hidden.
        mask_ratio: p.
    """
    rarity = math.log(1e9)
    excess = rarity / 3 + math.sqrt((rarity / 3) ** 2 + 2 * rarity * count * mask_ratio * (1 - mask_ratio))
    return min(count, math.ceil(count * mask_ratio + excess))
