"""Captions as classes: the tokens of a caption, predicted from the image's patches (SuperClass)."""

from collections.abc import Mapping

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

    f are the (kept) patch tokens after the final norm, N the number of captions seen, n_c of those with token c. SOT,
    EOT and padding are no classes. If all weights of a caption are 0, its tokens have equal weights; a caption without
    tokens adds 0. No text tower is needed.

    N and n_c are counted during training over all ranks, each batch before it is weighted, so that every rank holds the
    same counts and the mean over ranks is the loss of the whole batch. They are saved in checkpoints.

    Deviations from the paper: N and n_c are running counts, not those of the whole data set, and go on over epochs;
    weights are clamped at 0, below which they fall for tokens of nearly all captions; the classes are the tokens that
    the text pass leaves of a caption, in the model's own vocabulary.

    Reads the image pass, then the text pass.
    """

    takes = (Pass, TextPass)
    needs_patches = True
    needs_pooled = False

    captions_seen: Tensor  # N, () int64
    captions_with: Tensor  # n_c, (vocabulary,) int64

    def __init__(self, reads: Mapping[str, Pass | TextPass], shape: TowerShape) -> None:
        super().__init__(reads, shape)
        if not shape.text_cut:
            raise ConfigError("objective 'bag_of_words' finds the end of a caption by its EOT, the highest id, as "
                              "causal text towers pooled at EOT do: choose a model such as ViT-B-16")
        self.head = nn.Linear(shape.width, shape.vocab_size)
        self.register_buffer("captions_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("captions_with", torch.zeros(shape.vocab_size, dtype=torch.int64))

    def forward(self, context: StepContext) -> Float[Tensor, ""]:
        image_pass, text_pass = self.reads
        patches, tokens = context.passes[image_pass].patches, context.texts[text_pass].tokens
        assert patches is not None
        words = distinct_words(tokens)
        if self.training:
            self.count(tokens, words)
        targets = self.targets(tokens, words)

        def loss(means: Tensor, captions: Tensor) -> Tensor:
            logits = self.head(means).float()
            # y is 0 outside the caption, so that the sum over the vocabulary is one over the caption's tokens
            log_likelihood = logits.gather(1, tokens[captions]) - logits.logsumexp(dim=1, keepdim=True)
            total: Tensor = -(targets[captions] * log_likelihood).sum(dim=1).sum()
            return total

        means = patches.mean(dim=2).flatten(0, 1)
        captions = torch.arange(len(tokens), device=tokens.device).repeat(len(patches))
        return sum_over_rows(loss, means, captions, columns=self.head.out_features) / len(means)

    def count(self, tokens: Int[Tensor, "B T"], words: Bool[Tensor, "B T"]) -> None:
        """Add the captions of all ranks to the counts; every rank must pass equally many."""
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
    """Return where each word of a caption (`is_word`) occurs for the first time."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    words = is_word(tokens)
    same = (tokens[:, :, None] == tokens[:, None, :]) & words[:, None, :]
    return words & ~(same & (position[:, None] > position)).any(dim=2)
