"""Token frequencies against counting by hand."""

from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch

from aclip.data import CaptionTokenizer, RawSample, Source, draw_caption, open_source, token_frequencies
from aclip.errors import BadSampleError, ConfigError, DataError


class Letters:
    """One token a letter, a = 1; start 28, end 29, zeros after it."""

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = torch.zeros(len(texts), 16, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            letters = [ord(letter) - 96 for letter in text if letter.isalpha()]
            ids = [28, *letters[:14], 29]
            row[: len(ids)] = torch.tensor(ids)
        return rows


class Listed(Source):
    """A source of captions alone; None is a bad sample. Says what was read."""

    spec = "a list"

    def __init__(self, *captions: tuple[str, ...] | None, tags: tuple[str, ...] = ()) -> None:
        self._captions = captions
        self._tags = tags
        self.read_indices: list[int] = []

    def __len__(self) -> int:
        return len(self._captions)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> RawSample:
        self.read_indices.append(index)
        captions = self._captions[index]
        if captions is None:
            raise BadSampleError("bad")
        return RawSample(str(index), b"not a picture", captions, self._tags)


def test_counts_words_by_place_and_skips_bad_samples() -> None:
    source = Listed(("aab",), None, ("ca",), ("",), ())
    ours = token_frequencies(source, CaptionTokenizer(Letters()), 30, seed=0)
    expected = torch.zeros(30)
    expected[1], expected[2], expected[3] = 3 / 5, 1 / 5, 1 / 5
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7)
    assert ours.dtype == torch.float32
    assert source.read_indices == [0, 1, 2, 3, 4]


def test_counts_what_training_draws() -> None:
    captions, tags = [("aa", "bb"), ("cc", "dd", "ee")] * 30, ("x", "yy")
    drawn = Counter(
        letter
        for index, choice in enumerate(captions)
        for letter in draw_caption(choice, tags, seed=3, epoch=0, sample=index).text
        if letter.isalpha()
    )
    ours = token_frequencies(Listed(*captions, tags=tags), CaptionTokenizer(Letters()), 30, seed=3)
    assert set(drawn) == set("abcdexy")
    for letter, count in drawn.items():
        assert ours[ord(letter) - 96].item() == pytest.approx(count / drawn.total())


def test_a_limit_takes_a_seeded_sample() -> None:
    captions = [(chr(97 + index % 26) * 3,) for index in range(5000)]

    def sampled(seed: int) -> tuple[list[int], torch.Tensor]:
        source = Listed(*captions)
        ours = token_frequencies(source, CaptionTokenizer(Letters()), 30, seed=seed, limit=2600)
        return source.read_indices, ours

    read, ours = sampled(0)
    assert len(set(read)) == len(read) == 2600
    assert read == sorted(read)  # shards and disks are read forwards
    again, other = sampled(0), sampled(1)
    assert again[0] == read
    assert torch.equal(again[1], ours)
    assert other[0] != read
    assert ours.sum().item() == pytest.approx(1)
    counts = ours[1:27] * 2600
    assert ((counts - 100) ** 2 / 100).sum() < 62  # 25 degrees of freedom: 1 in 10^4; the draws are fixed


def test_a_source_of_files_with_the_tokenizer_of_clip(pair_folder: Path) -> None:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    (pair_folder / "000.txt").write_text("wow !~ picture")  # this "!" has the id of the padding
    ours = token_frequencies(open_source(str(pair_folder)), CaptionTokenizer(tokenizer), 49408, seed=0)
    texts = ["wow !~ picture", *(f"picture {number}" for number in range(1, 40))]
    counts = Counter(token for text in texts for token in tokenizer.encode(text))
    expected = torch.zeros(49408)
    for token, count in counts.items():
        expected[token] = count / counts.total()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert ours[0] > 0


def test_refuses_what_cannot_be_counted() -> None:
    with pytest.raises(DataError, match="no caption with a token among 2 samples of a list"):
        token_frequencies(Listed(None, ("!",)), CaptionTokenizer(Letters()), 30, seed=0)
    with pytest.raises(ConfigError, match="token id 26 does not fit a vocabulary of 20"):
        token_frequencies(Listed(("az",)), CaptionTokenizer(Letters()), 20, seed=0)
