"""open_clip's byte-pair tokenizer, remembering words: the same tokens in a fraction of the time."""

from typing import Any

from open_clip.tokenizer import SimpleTokenizer

_REMEMBERED = 10_000  # words, some 3 MB
_LONGEST = 64  # letters of a word that is remembered
_PIECES = 1_000  # pieces of words that open_clip remembers, in its own table without an end


class RememberingTokenizer(SimpleTokenizer):  # type: ignore[misc]  # open_clip has no annotations
    """`SimpleTokenizer`, which never joins letters across a space: what a word becomes can be looked up.

    Captions repeat their words, so a look-up takes the place of most of the work. Text of plain ASCII is not
    searched for encoding mistakes and character references, of which it can have none. Both memories are emptied
    when they are full: a loader worker that reads a billion captions stays small.
    """

    cache: dict[str, str]

    def __init__(self, *, clean: str = "lower", **options: Any) -> None:
        """Take the options of `SimpleTokenizer`."""
        super().__init__(clean=clean, **options)
        self._lower = clean == "lower"
        self._special = dict(self.cache)
        self._words: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without those of its start and end."""
        if self._lower and text.isascii() and text.isprintable() and "&" not in text:
            text = text.lower()
        else:
            text = self.clean_fn(text)
        tokens: list[int] = []
        for word in text.split():
            known = self._words.get(word)
            if known is None:
                known = self._encode_word(word)
            tokens.extend(known)
        return tokens

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if len(self.cache) > _PIECES:
            self.cache = dict(self._special)
        pieces = ("".join(self.byte_encoder[byte] for byte in piece.encode()) for piece in self.pat.findall(word))
        tokens = tuple(self.encoder[part] for piece in pieces for part in self.bpe(piece).split(" "))
        if len(word) <= _LONGEST:
            if len(self._words) >= _REMEMBERED:
                self._words.clear()
            self._words[word] = tokens
        return tokens
