"""open_clip's byte-pair tokenizer with a cache of words: the same tokens in a fraction of the time."""

from typing import Any

from open_clip.tokenizer import SimpleTokenizer

_CACHED_WORDS = 10_000  # some 3 MB
_LONGEST_CACHED = 64  # letters
_CACHED_PIECES = 1_000  # in open_clip's own cache, which has no limit


class CachingTokenizer(SimpleTokenizer):  # type: ignore[misc]  # open_clip has no annotations
    """`SimpleTokenizer` with a cache of words, which it never merges across a space.

    Captions repeat their words, so most of the work becomes a look-up. Printable ASCII without `&` needs no ftfy and
    no unescaping. Both caches are cleared when full, so that loader workers stay small.
    """

    cache: dict[str, str]

    def __init__(self, *, clean: str = "lower", **options: Any) -> None:
        """Take the options of `SimpleTokenizer`."""
        super().__init__(clean=clean, **options)
        self._lower = clean == "lower"
        self._special = dict(self.cache)
        self._words: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start and end tokens."""
        if self._lower and text.isascii() and text.isprintable() and "&" not in text:
            text = text.lower()
        else:
            text = self.clean_fn(text)
        tokens: list[int] = []
        for word in text.split():
            known = self._words.get(word)
            tokens.extend(self._encode_word(word) if known is None else known)
        return tokens

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if len(self.cache) > _CACHED_PIECES:
            self.cache = dict(self._special)
        pieces = ("".join(self.byte_encoder[byte] for byte in piece.encode()) for piece in self.pat.findall(word))
        tokens = tuple(self.encoder[part] for piece in pieces for part in self.bpe(piece).split(" "))
        if len(word) <= _LONGEST_CACHED:
            if len(self._words) >= _CACHED_WORDS:
                self._words.clear()
            self._words[word] = tokens
        return tokens
