"""How often each token occurs in the captions of a source."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from aclip import rng
from aclip.data.captions import CaptionTokenizer, clean_captions, draw_caption
from aclip.data.sources.base import WINDOW, Source
from aclip.errors import BadSampleError, ConfigError, DataError
from aclip.tokens import is_word

_CAPTIONS_AT_ONCE = 1024


def token_frequencies(
    source: Source, tokenizer: CaptionTokenizer, vocab_size: int, *, seed: int, limit: int = 100_000
) -> Float32[Tensor, " V"]:
    """Return the fraction of each token id in the captions that training draws, for frequency masking.

    Counted are the captions of the first epoch of a run with this seed, tags included, of all samples or of `limit`
    drawn at random. No image is decoded. Of sources read by groups (remote shards, row groups) only the first groups of
    the epoch are read, which training needs anyway, and captions without tags.

    Args:
        tokenizer: as in training; its rows hold the start, the caption, the end (the row's highest id), padding.
        vocab_size: V, ids that the text tower knows.
        seed: the run's; the result is the same on every rank.

    Returns:
        (V,) float32, non-negative, sum 1.

    Raises:
        DataError: not one token in all of these captions.
        ConfigError: a token id that is not below `vocab_size`.
    """
    chosen = np.arange(len(source))
    grouped = _group_limit(source)
    if grouped is not None:
        chosen = np.sort(source.order(seed, 0)[0][: min(limit, grouped)])
    elif len(source) > limit:
        chosen = np.sort(rng.generator(seed, "frequencies").choice(len(source), size=limit, replace=False))
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for first in range(0, len(chosen), _CAPTIONS_AT_ONCE):
        indices = chosen[first : first + _CAPTIONS_AT_ONCE].tolist()
        captions = list(_drawn_captions(source, indices, seed, with_tags=grouped is None))
        if captions:
            tokens = tokenizer(captions)
            counted = torch.bincount(tokens[is_word(tokens)], minlength=vocab_size)
            if len(counted) > vocab_size:
                raise ConfigError(f"token id {len(counted) - 1} does not fit a vocabulary of {vocab_size}: count with "
                                  "the tokenizer of the model")
            counts += counted
    if not counts.any():
        raise DataError(f"no caption with a token among {len(chosen)} samples of {source.spec}: token frequencies "
                        "cannot be counted")
    return (counts.double() / counts.sum()).float()


def _group_limit(source: Source) -> int | None:
    """Return how many samples of an epoch come from the first groups that training reads; None without groups."""
    if source.parts:
        return min((limit for part in source.parts if (limit := _group_limit(part)) is not None), default=None)
    return WINDOW * len(source) // len(source.groups) if source.groups else None


def _drawn_captions(source: Source, indices: list[int], seed: int, with_tags: bool) -> Iterator[str]:
    for index in indices:
        try:
            raw = source.read(index) if with_tags else None
            captions = clean_captions(source.captions(index) if raw is None else raw.captions)
        except BadSampleError:
            continue
        yield draw_caption(captions, () if raw is None else raw.tags, seed=seed, epoch=0, sample=index).text
