"""Masked language modelling: the hidden tokens of a caption, predicted from the others (BERT, in MaskCLIP)."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from open_clip.transformer import Transformer
from torch import Tensor, nn

from aclip.config import Count, TextPass
from aclip.errors import ConfigError
from aclip.models.blocks import run_blocks
from aclip.objectives.base import Objective, block_macs
from aclip.objectives.functional import hidden_token_loss
from aclip.structs import StepContext, TowerShape

HEAD_WIDTH = 64  # of attention, as in CLIP's text towers


class MaskedLanguage(Objective):
    """The text part of MaskCLIP (Dong et al., arXiv 2208.12262, section 3.3), a reconstruction.

        L = mean_{i hidden} [-log softmax(W norm(decoder(states))_i + b)[token_i]]

    The mean is over the hidden tokens of the whole batch, on all ranks (`functional.hidden_token_loss`), and does not
    depend on padding. With nothing hidden the loss is 0, with a gradient of 0.

    The paper has no public code. It names the parts: BERT's masking, a decoder after the text encoder that separates
    the two tasks, cross-entropy. Chosen here:

    - the encoder is CLIP's causal one, so that the state of a hidden token depends on the words before it alone;
    - the decoder is bidirectional, without padding: `decoder_layers` blocks as wide as the text tower, with heads of
      width 64, a final norm, and its own linear map to the vocabulary. It adds no positions, which the encoder's states
      hold.

    Reads one text pass.

    Args:
        reads, shape: see `Objective`.
        decoder_layers: blocks of the decoder.

    Raises:
        ConfigError: a text pass that hides nothing.
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
        self.transformer = Transformer(width, decoder_layers, max(1, width // HEAD_WIDTH))
        self.norm = nn.LayerNorm(width)
        self.vocabulary = nn.Linear(width, shape.vocab_size)

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Read the tokens and states of the pass."""
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
        """Return those of the blocks on all tokens, and of the vocabulary on the hidden ones."""
        width = self.vocabulary.in_features
        blocks = len(self.transformer.resblocks) * block_macs(text_tokens, width, 4 * width)
        return blocks + self.mask_ratio * text_tokens * width * self.vocabulary.out_features


def max_hidden(count: int, mask_ratio: float) -> int:
    """Return a number that the hidden ones of `count` tokens exceed with a probability of at most 1e-9.

    Bernstein's inequality: P(X >= n p + t) <= exp(-t^2 / (2 n p (1 - p) + 2/3 t)). If it is exceeded, the last hidden
    tokens of the batch are left out.

    Args:
        count: n, at least the number of tokens that can be hidden.
        mask_ratio: p.
    """
    rarity = math.log(1e9)
    excess = rarity / 3 + math.sqrt((rarity / 3) ** 2 + 2 * rarity * count * mask_ratio * (1 - mask_ratio))
    return min(count, math.ceil(count * mask_ratio + excess))
