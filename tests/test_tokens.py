"""Which tokens of a row are words of the caption."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from aclip.tokens import is_word

SOT, EOT = 49406, 49407


@given(st.lists(st.lists(st.integers(0, SOT - 1), max_size=6), min_size=1, max_size=5), st.integers(0, 3))
def test_words_lie_between_start_and_end(captions: list[list[int]], padding: int) -> None:
    """Id 0 is both a word and padding; its position tells which."""
    length = max(map(len, captions)) + 2 + padding
    rows = [[SOT, *words, EOT] for words in captions]
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    expected = [[0 < i <= len(words) for i in range(length)] for words in captions]
    assert is_word(tokens).tolist() == expected
