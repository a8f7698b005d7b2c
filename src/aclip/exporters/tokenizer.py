"""CLIP's tokenizer in the files of Hugging Face's libraries, from the vocabulary that open_clip bundles.

open_clip cleans a text before it looks words up: ftfy repairs it (mojibake, curly quotes, ligatures, full-width
letters, control characters), HTML entities are unescaped twice, white space is collapsed, letters are lowercased.
`CLEANING` holds what `tokenizer.json` can express of this; docs/interop.md lists the rest.
"""

import json
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from aclip.exporters.base import missing_package

START, END = "<|startoftext|>", "<|endoftext|>"
SOT, EOT = 49406, 49407
"""Token ids of the start and the end of a text."""

_AMPERSAND = ("&amp;|&#38;|&#0?38;", "&")
_ENTITIES = {"nbsp": " ", "quot": '"', "apos": "'", "#39": "'", "#039": "'", "#x27": "'", "#34": '"', "lt": "<",
             "gt": ">", "hellip": "…", "ndash": "–", "mdash": "—", "eacute": "é"}  # noqa: RUF001
CLEANING = (
    _AMPERSAND, _AMPERSAND,  # twice, so that &amp;lt; becomes <
    *((f"&{name};", character) for name, character in _ENTITIES.items()),
    ("[ʼ‘-‛]", "'"), ("[“-‟]", '"'),  # noqa: RUF001
    ("ﬀ", "ff"), ("ﬁ", "fi"), ("ﬂ", "fl"), ("ﬃ", "ffi"), ("ﬄ", "ffl"),
    ("[\\x00-\\x08\\x0B\\x0E-\\x1F\\x7F\\u200E\\u200F\\uFEFF]", ""),  # control characters that ftfy removes
)
"""Regular expressions and their replacements, in order; then NFC, collapsed white space and lower case."""

PATTERN = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
"""Splits a cleaned text into words (openai/CLIP, `simple_tokenizer.py`)."""


def write_tokenizer(folder: Path, context_length: int) -> None:
    """Write `tokenizer.json`, `vocab.json`, `merges.txt` and `tokenizer_config.json`.

    Args:
        folder: an existing folder.
        context_length: T, to which transformers truncates.

    Raises:
        MissingDependencyError: the package tokenizers is not installed.
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    except ImportError as error:
        raise missing_package("tokenizers", "transformers") from error
    bundled = SimpleTokenizer()
    vocabulary = {token: number for token, number in bundled.encoder.items() if number < SOT}
    vocabulary |= {START: SOT, END: EOT}  # under other names in open_clip
    bpe = models.BPE(vocabulary, list(bundled.bpe_ranks), unk_token=END, end_of_word_suffix="</w>",
                     continuing_subword_prefix="")
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([
        *(normalizers.Replace(Regex(pattern), by) for pattern, by in CLEANING),
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.RobertaProcessing((END, EOT), (START, SOT), False, False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    bpe.save(str(folder))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    # Not CLIPTokenizer: from transformers 5 on that class replaces this cleaning with its own, shorter one.
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, "bos_token": START,
        "eos_token": END, "pad_token": END, "unk_token": END,
        "model_input_names": ["input_ids", "attention_mask"]}, indent=2) + "\n", encoding="utf-8")


def is_clip_tokenizer(tokenizer: Any) -> bool:
    """Return whether a tokenizer is the one that `write_tokenizer` writes: open_clip's own, with default cleaning."""
    inner = _innermost(tokenizer)
    return (isinstance(inner, SimpleTokenizer) and len(inner.all_special_ids) == 2 and inner.reduction_fn is None
            and inner.clean_fn.__name__ == "_clean_lower")


def save_pretrained(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer of Hugging Face's as it is; open_clip's own needs no files."""
    inner = _innermost(tokenizer)
    if isinstance(inner, HFTokenizer):
        inner.save_pretrained(folder)


def _innermost(tokenizer: Any) -> Any:
    """Return open_clip's tokenizer, unwrapped from `aclip.data.CaptionTokenizer`."""
    return getattr(tokenizer, "_tokenizer", tokenizer)
