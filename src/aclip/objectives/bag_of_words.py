"""Captions as classes: the tokens of a caption, told from the image's patches (SuperClass)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from aclip import dist
from aclip.config import Pass, TextPass
from aclip.errors import ConfigError
from aclip.objectives.base import Objective
from aclip.objectives.functional import sum_over_rows
from aclip.structs import StepContext, TowerShape
from aclip.tokens import is_word


class BagOfWords(Objective):
    """Softmax cross-entropy against the tokens of the caption (Huang et al., arXiv 2411.03313, section 3).

        L = mean over views and samples of -sum_c y_c log softmax(W mean_k f_k + b)_c
        y_c = w_c / sum w over the distinct tokens c of the caption,  w_c = max(0, log(N / (1 + n_c)))

    f are the patch tokens after the final norm (the kept ones, where some were removed), N the captions seen, n_c those
    of them with token c. SOT, EOT and padding are no classes. Where all weights of a caption are 0, its tokens weigh
    alike; a caption without tokens adds 0. No text tower is needed.

    N and n_c are counted in training, each batch before it is weighted, over all ranks: these hold the same counts, and
    the mean of the losses over ranks is that of the whole batch. They are saved in checkpoints.

    Deviations: the paper's formula has N and n_c of the whole data set, of which these running counts are an estimate
    that repeats itself from the second epoch on; the weights are kept from falling below 0, which they do for tokens
    of (nearly) all captions; the tokens are what the text pass leaves of a caption, in the model's own vocabulary.

    Reads the image pass, then the text pass.

    Attributes:
        captions_seen: () int64, N.
        captions_with: (vocabulary,) int64, n_c.

    Raises:
        ConfigError: a text tower that does not read at EOT, the highest id: its captions cannot be told from padding.
    """

    takes = (Pass, TextPass)
    needs_patches = True
    needs_pooled = False

    captions_seen: Tensor
    captions_with: Tensor

    def __init__(self, reads: Sequence[Pass | TextPass], shape: TowerShape) -> None:
        super().__init__(reads, shape)
        if not shape.text_cut:
            raise ConfigError("objective 'bag_of_words' finds the end of a caption by its EOT, the highest id, as "
                              "causal text towers pooled at EOT do: name a model such as ViT-B-16")
        self.head = nn.Linear(shape.width, shape.vocab_size)
        self.register_buffer("captions_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("captions_with", torch.zeros(shape.vocab_size, dtype=torch.int64))

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        """Read the patch tokens of image pass `reads[0]` and the tokens of text pass `reads[1]`."""
        patches, tokens = context.passes[self.reads[0]].patches, context.texts[self.reads[1]].tokens
        assert patches is not None
        words = distinct_words(tokens)
        if self.training:
            self.count(tokens, words)
        targets = self.targets(tokens, words)

        def loss(seen: Tensor, captions: Tensor) -> Tensor:
            logits = self.head(seen).float()
            # the sum over the vocabulary is one over the caption: elsewhere y is 0
            log_likelihood = logits.gather(1, tokens[captions]) - logits.logsumexp(dim=1, keepdim=True)
            total: Tensor = -(targets[captions] * log_likelihood).sum(dim=1).sum()
            return total

        seen = patches.mean(dim=2).flatten(0, 1)
        captions = torch.arange(len(tokens), device=tokens.device).repeat(len(patches))
        return sum_over_rows(loss, seen, captions, columns=self.head.out_features) / len(seen)

    def logits(self, pairs: int, images: Sequence[tuple[int, int, int]], text_tokens: int) -> int:
        """Return one for every view and word of the vocabulary."""
        return pairs * images[0][0] * self.head.out_features

    def count(self, tokens: Int[Tensor, "B T"], words: Bool[Tensor, "B T"]) -> None:
        """Add the captions of all ranks to the counts; every rank must bring equally many."""
        counts = torch.zeros_like(self.captions_with).scatter_add(0, tokens.flatten(), words.flatten().long())
        self.captions_with += dist.sum_over_ranks(counts)
        self.captions_seen += len(tokens) * dist.world_size()

    def targets(self, tokens: Int[Tensor, "B T"], words: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return y at each distinct word, (B, T) float32: rows sum to 1, or are 0 for a caption without words."""
        rarity = torch.log(self.captions_seen.double() / (1 + self.captions_with[tokens]).double())
        weights = rarity.clamp(min=0) * words
        weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, words.double())
        return (weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)).float()


def distinct_words(tokens: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Return where each word of a caption (`is_word`) stands first."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    words = is_word(tokens)
    same = (tokens[:, :, None] == tokens[:, None, :]) & words[:, None, :]
    return words & ~(same & (place[:, None] > place)).any(dim=2)
