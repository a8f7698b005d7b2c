"""The caching tokenizer gives open_clip's tokens, and its caches are bounded."""

import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from aclip.models import tokenizer_of
from aclip.models.loaded import CachingTokenizer

OURS, THEIRS = CachingTokenizer(), SimpleTokenizer()
PRINTABLE = st.characters(min_codepoint=32, max_codepoint=126)


@settings(max_examples=300, deadline=None)
@given(st.text(PRINTABLE, max_size=120) | st.text(max_size=60) | st.text("&amplt;#38 \x1b\x1c\x85'<>_n", max_size=40))
@example("A photo of TWO dogs' 1st <start_of_text> don't &amp;amp;lt;")
@example("l\u2019e\u0301te\u00a0\u3000x\u200bz \ufb01re \xc3\xa9")
def test_tokens_are_those_of_open_clip(text: str) -> None:
    for _ in range(2):  # looked up the second time
        assert torch.equal(OURS([text]), THEIRS([text]))


@pytest.mark.parametrize("clean", ["canonicalize", "whitespace"])
def test_other_cleaning_functions_are_kept(clean: str) -> None:
    texts = ["A  Photo, of_a Dog.", "x &lt; y"]
    assert torch.equal(CachingTokenizer(clean=clean)(texts), SimpleTokenizer(clean=clean)(texts))


def test_caches_are_bounded_and_left_behind_when_pickled() -> None:
    ours = tokenizer_of("vit-micro")
    texts = [f"word{chr(97 + i)} number{chr(97 + i)} x{'y' * 100}{i}" for i in range(26)]
    assert torch.equal(ours(texts), THEIRS(texts))
    assert CachingTokenizer._encode_word.cache_info().maxsize == 10_000
    assert len(ours.cache) <= 10
    assert len(pickle.dumps(ours)) < len(pickle.dumps(THEIRS)) + 1000
    assert torch.equal(pickle.loads(pickle.dumps(ours))(texts), ours(texts))
