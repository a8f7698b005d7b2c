"""A graph of neighbours (HNSW, arXiv 1603.09320, by usearch) for indexes that are too large to compare all of."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from aclip.data.progress import progress

if TYPE_CHECKING:
    from aclip.search.store import Index

APPROXIMATE_FROM = 2_000_000
"""Images from which a graph is built: at 512 dimensions one core compares them in about half a second."""

EXPANSION = 512
"""Candidates that a search keeps; more find more of the true neighbours and take longer. Of a million drawn vectors 256
find 96.4 %, 512 find 99.6 % (docs/benchmarks.md)."""

CANDIDATES = 4
"""Candidates compared by their features, for each image wanted: the graph's own are rounded to 8 bits, which halves its
size and more than halves the time to build it."""

_CHUNK = 10_000  # features added at a time
_SAMPLE, _TOP = 100, 10  # queries whose recall is measured, and neighbours of each

_log = logging.getLogger(__name__)


def build_graph(features: np.ndarray, path: Path) -> bool:
    """Write the graph of (N, D) features to a file; return False, and log what helps, if usearch is not installed."""
    try:
        from usearch.index import Index as Graph
    except ImportError:
        _log.info("%s images: pip install 'attentive-clip[search]' and the same command build a graph of neighbours, "
                  "which answers in milliseconds", f"{len(features):,}")
        return False
    graph = Graph(ndim=features.shape[1], metric="ip", dtype="i8")
    with progress("linking neighbours", len(features), "images") as advance:
        for first in range(0, len(features), _CHUNK):
            some = np.ascontiguousarray(features[first : first + _CHUNK])
            graph.add(np.arange(first, first + len(some)), some, log=False)
            advance(len(some))
    part = path.with_name(f".{path.name}.part")
    graph.save(str(part))
    part.replace(path)
    return True


def open_graph(path: Path) -> Any:
    """Return the graph in a file, memory-mapped; None if usearch is not installed."""
    try:
        from usearch.index import Index as Graph
    except ImportError:
        return None
    return Graph.restore(str(path), view=True, expansion_search=EXPANSION)


def search_graph(
    graph: Any, features: np.ndarray, queries: Float[Tensor, "Q D"], top: int
) -> tuple[Float[Tensor, "Q K"], Int[Tensor, "Q K"]]:
    """Return the `top` largest products that the graph leads to, and their rows, (Q, K) each; see `Index.nearest`."""
    matches = graph.search(queries.float().numpy(), min(CANDIDATES * top, len(features)))
    rows = torch.from_numpy(np.asarray(matches.keys).reshape(len(queries), -1).astype(np.int64))
    found = torch.from_numpy(features[rows.numpy()]).float()
    products = torch.einsum("qd,qkd->qk", queries.float(), found)
    order = products.argsort(dim=1, descending=True, stable=True)[:, :top]
    return products.gather(1, order), rows.gather(1, order)


def log_recall(index: "Index") -> None:
    """Log the fraction of the true nearest images that the graph finds.

    Queries are captions if there are any and the model reads text: the features of texts lie apart from those of
    images, which is harder for a graph.
    """
    rows = np.linspace(0, len(index) - 1, min(_SAMPLE, len(index)), dtype=np.int64)
    captions = [hit.captions[0] for hit in index.hits(rows.tolist(), [0.0] * len(rows)) if hit.captions]
    if captions and index.model.has_text:
        kind, queries = f"{len(captions)} captions", index.model.encode_texts(captions)
    else:
        kind, queries = f"{len(rows)} images", torch.from_numpy(index.features[rows]).float()
    exact, found = (index.nearest(queries, _TOP, exact=exact)[1].tolist() for exact in (True, False))
    hits = sum(len(set(a) & set(b)) for a, b in zip(exact, found, strict=True))
    _log.info("the graph finds %.1f %% of the %d nearest images of %s", 100 * hits / sum(map(len, exact)), _TOP, kind)
