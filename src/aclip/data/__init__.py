"""From files to batches: sources, decoding, captions, views, order, loader."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aclip.data.batches import BatchLoader, Item, PairDataset, build_loader
    from aclip.data.captions import CaptionTokenizer, caption_id, clean_captions, draw_caption
    from aclip.data.decode import decode_image
    from aclip.data.evaluation_set import EvaluationBatch, EvaluationSet, Target
    from aclip.data.frequencies import token_frequencies
    from aclip.data.order import BatchSampler, Request
    from aclip.data.packing import pack
    from aclip.data.sets import SETS, fetch, list_sets
    from aclip.data.sources import SOURCES, open_source, open_training, weights_of
    from aclip.data.sources.base import RawSample, Source, epoch_order
    from aclip.data.spec import Spec, absolute, parse_spec, split_name
    from aclip.data.workers import suitable_workers

# Imported on first use: the command line's help needs none of torch, pillow and pyarrow.
_MODULES = {
    "batches": ("BatchLoader", "Item", "PairDataset", "build_loader"),
    "captions": ("CaptionTokenizer", "caption_id", "clean_captions", "draw_caption"),
    "decode": ("decode_image",),
    "evaluation_set": ("EvaluationBatch", "EvaluationSet", "Target"),
    "frequencies": ("token_frequencies",),
    "order": ("BatchSampler", "Request"),
    "packing": ("pack",),
    "sets": ("SETS", "fetch", "list_sets"),
    "sources": ("SOURCES", "open_source", "open_training", "weights_of"),
    "sources.base": ("RawSample", "Source", "epoch_order"),
    "spec": ("Spec", "absolute", "parse_spec", "split_name"),
    "workers": ("suitable_workers",),
}
_PLACE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "SETS",
    "SOURCES",
    "BatchLoader",
    "BatchSampler",
    "CaptionTokenizer",
    "EvaluationBatch",
    "EvaluationSet",
    "Item",
    "PairDataset",
    "RawSample",
    "Request",
    "Source",
    "Spec",
    "Target",
    "absolute",
    "build_loader",
    "caption_id",
    "clean_captions",
    "decode_image",
    "draw_caption",
    "epoch_order",
    "fetch",
    "list_sets",
    "open_source",
    "open_training",
    "pack",
    "parse_spec",
    "split_name",
    "suitable_workers",
    "token_frequencies",
    "weights_of",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACE[name]}"), name)
    globals()[name] = value
    return value
