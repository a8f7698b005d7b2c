"""From files to batches: sources, decoding, captions, views, order, loader."""

from aclip.data.captions import CaptionTokenizer, caption_id, clean_captions, draw_caption
from aclip.data.dataset import Item, PairDataset
from aclip.data.decode import decode_image
from aclip.data.evaluation_set import EvaluationBatch, EvaluationSet, Target
from aclip.data.frequencies import token_frequencies
from aclip.data.loader import BatchLoader, build_loader
from aclip.data.order import BatchSampler, Request, epoch_order
from aclip.data.sources import READERS, RawSample, Source, open_source, split_query, split_slice
from aclip.data.sources.mixture import Mixture, open_mixture, weights_of
from aclip.data.workers import suitable_workers

__all__ = [
    "READERS",
    "BatchLoader",
    "BatchSampler",
    "CaptionTokenizer",
    "EvaluationBatch",
    "EvaluationSet",
    "Item",
    "Mixture",
    "PairDataset",
    "RawSample",
    "Request",
    "Source",
    "Target",
    "build_loader",
    "caption_id",
    "clean_captions",
    "decode_image",
    "draw_caption",
    "epoch_order",
    "open_mixture",
    "open_source",
    "split_query",
    "split_slice",
    "suitable_workers",
    "token_frequencies",
    "weights_of",
]
