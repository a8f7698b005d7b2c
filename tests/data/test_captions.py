"""Captions: cleaning, drawing, identity, and caps that do not change tokens."""

import hashlib
import pickle
from collections import Counter

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aclip.data.captions import (
    MAX_CHARACTERS,
    CaptionTokenizer,
    caption_id,
    caption_lines,
    clean_captions,
    decode_text,
    draw_caption,
)
from aclip.errors import BadSampleError
from made_pictures import WordTokenizer


@pytest.fixture(scope="module")
def clip_tokenizer() -> open_clip.tokenizer.SimpleTokenizer:
    return open_clip.get_tokenizer("ViT-B-32")


def test_cleaning_collapses_white_space_and_drops_empty_captions() -> None:
    assert clean_captions([" a \t red\n heart ", "", " \u3000"]) == ("a red heart",)


def test_missing_and_empty_captions_are_told_apart() -> None:
    with pytest.raises(BadSampleError, match="missing caption"):
        clean_captions([])
    with pytest.raises(BadSampleError, match="empty caption"):
        clean_captions(["", " \n"])


def test_lines_of_a_caption_file() -> None:
    assert caption_lines("one\r\n\n  \ntwo\n") == ("one", "two")
    assert caption_lines(" \n") == ("",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_text_encodings(encoding: str) -> None:
    assert decode_text("Żółw 漢字".encode(encoding) if encoding != "cp1252" else "café".encode(encoding)) in (
        "Żółw 漢字",
        "café",
    )


def test_caption_id_is_the_documented_hash() -> None:
    expected = int.from_bytes(hashlib.blake2b(b"red heart", digest_size=8).digest(), "big") // 2
    assert caption_id("  Red \n HEART ") == expected
    assert 0 <= caption_id("红心") < 2**63
    assert caption_id("red hearts") != expected


def test_without_tags_each_caption_is_as_likely() -> None:
    drawn = Counter(draw_caption(("a", "b", "c"), (), seed=0, epoch=0, sample=i).text for i in range(3000))
    assert set(drawn) == {"a", "b", "c"}
    assert all(900 < count < 1100 for count in drawn.values())


def test_tags_follow_half_of_the_time_up_to_three_without_repeats() -> None:
    tags = ("love", "emotion", "Red Heart", "valentine", "card")
    drawn = [draw_caption(("red heart",), tags, seed=1, epoch=0, sample=i) for i in range(2000)]
    words = [caption.text.split(", ") for caption in drawn]
    assert {caption.caption_id for caption in drawn} == {caption_id("red heart")}
    assert all(w[0] == "red heart" and len(set(w)) == len(w) <= 4 for w in words)
    assert 900 < sum(len(w) > 1 for w in words) < 1100
    assert {tag for w in words for tag in w[1:]} == {"love", "emotion", "valentine", "card"}
    assert {len(w) for w in words} == {1, 2, 3, 4}


def test_a_draw_depends_on_seed_epoch_and_sample_alone() -> None:
    captions = tuple(map(str, range(1000)))

    def draw(seed: int, epoch: int, sample: int) -> str:
        return draw_caption(captions, (), seed=seed, epoch=epoch, sample=sample).text

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4)}) == 4


@pytest.mark.parametrize(
    "text",
    ["a photo of a dog", "", "word " * 10_000, "pneumonoultramicroscopicsilicovolcanoconiosis " * 50,
     "一只在雪地里奔跑的狗" * 60, "https://example.org/a/b?c=d&e=f " * 40, "!?" * 900, "a" * 1999],
)  # fmt: skip
def test_capping_changes_no_token(clip_tokenizer: open_clip.tokenizer.SimpleTokenizer, text: str) -> None:
    tokenizer = CaptionTokenizer(clip_tokenizer)
    tokens = tokenizer([text])
    assert torch.equal(tokens, clip_tokenizer([text]))
    assert tokens.dtype == torch.int64
    assert tokens.max() == clip_tokenizer.eot_token_id


@given(st.text(max_size=400))
def test_capping_any_text_keeps_the_end_token(text: str) -> None:
    tokens = CaptionTokenizer(WordTokenizer(5))([text])
    assert torch.equal(tokens, WordTokenizer(5)([text]))
    assert (tokens == 999).sum() == 1


def test_a_huge_word_is_cut() -> None:
    assert len(CaptionTokenizer(WordTokenizer()).cap("x" * 10**6)) == MAX_CHARACTERS


def test_context_length_and_truncation(clip_tokenizer: open_clip.tokenizer.SimpleTokenizer) -> None:
    tokenizer = CaptionTokenizer(clip_tokenizer)
    assert tokenizer.context_length == 77
    assert tokenizer.count_truncated(tokenizer(["dog " * n for n in (0, 74, 75, 76, 500)])) == 3


def test_tokenizer_is_picklable(clip_tokenizer: open_clip.tokenizer.SimpleTokenizer) -> None:
    tokenizer = CaptionTokenizer(clip_tokenizer)
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(["a cat"]), tokenizer(["a cat"]))
