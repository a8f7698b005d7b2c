"""From files to batches: sources, decoding, captions, views, order, loader.

Imported on first use: the help of the command line needs none of torch, pillow and pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aclip.data.batches import Item, PairDataset, build_loader
    from aclip.data.captions import CaptionTokenizer, caption_id, clean_captions, draw_caption
    from aclip.data.decode import decode_image
    from aclip.data.evaluation_set import EvaluationSet, Target
    from aclip.data.frequencies import token_frequencies
    from aclip.data.order import BatchSampler, Groups, Request
    from aclip.data.packing import pack
    from aclip.data.sets import SETS, fetch, list_sets
    from aclip.data.sources import SOURCES, open_source, open_training, weights_of
    from aclip.data.sources.base import RawSample, Source
    from aclip.data.spec import absolute, parse_spec, split_name
    from aclip.data.stored import StoredFeatures
    from aclip.data.workers import suitable_workers

__all__ = ["SETS", "SOURCES", "BatchSampler", "CaptionTokenizer", "EvaluationSet", "Groups", "Item", "PairDataset",
           "RawSample", "Request", "Source", "StoredFeatures", "Target", "absolute", "build_loader", "caption_id",
           "clean_captions", "decode_image", "draw_caption", "fetch", "list_sets", "open_source", "open_training",
           "pack", "parse_spec", "split_name", "suitable_workers", "token_frequencies", "weights_of"]

_HOMES = {
    "batches": ("Item", "PairDataset", "build_loader"),
    "captions": ("CaptionTokenizer", "caption_id", "clean_captions", "draw_caption"),
    "decode": ("decode_image",), "evaluation_set": ("EvaluationSet", "Target"), "frequencies": ("token_frequencies",),
    "order": ("BatchSampler", "Groups", "Request"), "packing": ("pack",), "sets": ("SETS", "fetch", "list_sets"),
    "sources": ("SOURCES", "open_source", "open_training", "weights_of"), "sources.base": ("RawSample", "Source"),
    "spec": ("absolute", "parse_spec", "split_name"), "stored": ("StoredFeatures",), "workers": ("suitable_workers",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"aclip.data.{module}"), name)
    raise AttributeError(f"module 'aclip.data' has no attribute '{name}'")
