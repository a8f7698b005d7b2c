"""CLIP's tokenizer as Hugging Face's libraries read it, written from the vocabulary that open_clip bundles.

open_clip cleans a text before it looks words up: ftfy repairs it (wrong encodings, curly quotes, ligatures, full-width
letters, control characters), HTML entities are resolved twice, white space is collapsed, letters become lower case.
What of this can be said in `tokenizer.json` is said there, in `CLEANING`; what cannot is listed in docs/interop.md.
"""

import json
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
SOT, EOT = 49406, 49407
"""Ids of the start and the end of a text."""

# html.unescape is applied twice, so that &amp;lt; ends as <
_ENTITIES = {"nbsp": " ", "quot": '"', "apos": "'", "#39": "'", "#039": "'", "#x27": "'", "#34": '"', "lt": "<",
             "gt": ">", "hellip": "…", "ndash": "–", "mdash": "—", "eacute": "é"}  # noqa: RUF001
_LIGATURES = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl"}
_AMPERSAND = "&amp;|&#38;|&#0?38;"
_CONTROL = "[\\x00-\\x08\\x0B\\x0E-\\x1F\\x7F\\u200E\\u200F\\uFEFF]"  # as far as ftfy removes them


def _replace(pattern: str, by: str, *, regex: bool = True) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex" if regex else "String": pattern}, "content": by}


CLEANING: tuple[dict[str, Any], ...] = (
    _replace(_AMPERSAND, "&"),
    _replace(_AMPERSAND, "&"),
    *(_replace(f"&{name};", by, regex=False) for name, by in _ENTITIES.items()),
    _replace("[ʼ‘-‛]", "'"),  # noqa: RUF001
    _replace("[“-‟]", '"'),
    *(_replace(letter, letters, regex=False) for letter, letters in _LIGATURES.items()),
    _replace(_CONTROL, ""),
    {"type": "NFC"},
    _replace("\\s+", " "),
    {"type": "Lowercase"},
)
"""Normalizers of `tokenizer.json`, in order."""

PATTERN = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
"""How CLIP's tokenizer splits a cleaned text into words (openai/CLIP, `simple_tokenizer.py`)."""


def write_tokenizer(folder: Path, context_length: int) -> None:
    """Write `tokenizer.json`, `vocab.json`, `merges.txt` and `tokenizer_config.json`.

    Args:
        folder: exists.
        context_length: T, to which texts are cut when truncation is asked for.
    """
    bundled = SimpleTokenizer()
    vocabulary = {token: number for token, number in bundled.encoder.items()
                  if number not in bundled.all_special_ids}
    vocabulary |= {START: SOT, END: EOT}
    merges = [" ".join(pair) for pair in bundled.bpe_ranks]
    special = [{"id": vocabulary[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for token in (START, END)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": list(CLEANING)},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": {"type": "RobertaProcessing", "sep": [END, EOT],
                           "cls": [START, SOT], "trim_offsets": False, "add_prefix_space": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": END, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocabulary, "merges": merges},
    }, ensure_ascii=False), encoding="utf-8")
    # The general class reads tokenizer.json as it stands; from transformers 5 on, CLIPTokenizer puts its own,
    # shorter cleaning in place of this one.
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, "bos_token": START,
        "eos_token": END, "pad_token": END, "unk_token": END,
        "model_input_names": ["input_ids", "attention_mask"]}, indent=2) + "\n", encoding="utf-8")


def is_bundled(tokenizer: Any) -> bool:
    """Whether a tokenizer is the one that is written here: open_clip's own, with its usual cleaning."""
    inner = _innermost(tokenizer)
    return (isinstance(inner, SimpleTokenizer) and len(inner.all_special_ids) == 2 and inner.reduction_fn is None
            and inner.clean_fn.__name__ == "_clean_lower")


def write_foreign(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer of Hugging Face's as it is; open_clip's own needs no files for open_clip."""
    inner = _innermost(tokenizer)
    if isinstance(inner, HFTokenizer):
        inner.save_pretrained(folder)


def _innermost(tokenizer: Any) -> Any:
    """Return open_clip's tokenizer, which `aclip.data.CaptionTokenizer` may be around."""
    return getattr(tokenizer, "_tokenizer", tokenizer)
