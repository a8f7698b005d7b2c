"""Clusters of the samples of a source by the features of an index: the hard negatives of `aclip train`."""

import logging
import math
from pathlib import Path

import numpy as np

from aclip import rng
from aclip.data import Source
from aclip.errors import ConfigError
from aclip.search.store import Index

_BLOCK = 2**14  # rows whose float32 copy is in memory
_ROWS_PER_CLUSTER = 64  # that the centres are fitted to

_log = logging.getLogger(__name__)


def cluster_samples(folder: str | Path, source: Source, seed: int) -> np.ndarray:
    """Return the cluster of every sample of a source, by mini-batch k-means of its features in an index.

    (N,) int32, -1 for samples that the index has no features of; of one seed the same on every machine up to rounding.
    There are as many clusters as samples in each on average. B3 (arXiv 2505.11293) cuts a graph of neighbours instead,
    without the nearest, and makes each batch of whole clusters.

    Raises:
        ConfigError: no index, one of other data, or a mixture of sources that are read by groups.
        DataError: a damaged index.
    """
    from sklearn.cluster import MiniBatchKMeans

    source.spans(seed, 0)  # refuses what it cannot do
    index = Index(folder)
    rows = index.rows_of(source)
    samples = np.flatnonzero(rows >= 0)
    if 2 * len(samples) < len(rows):
        model = index.description["model"] or "MODEL"
        raise ConfigError(f"the index {folder} has features of {len(samples):,} of the {len(rows):,} images of "
                          f"{source.spec}: build one of the same data with `aclip index {model} {source.spec} --output "
                          "INDEX`")
    rows = rows[samples]
    draw = rng.generator(seed, "clusters")
    count = round(math.sqrt(len(samples)))
    fitted = np.sort(draw.permutation(rows)[: _ROWS_PER_CLUSTER * count])
    means = MiniBatchKMeans(count, random_state=int(draw.integers(2**31)), n_init=1)
    means.fit(index.features[fitted].astype(np.float32))
    clusters = np.full(len(source), -1, dtype=np.int32)
    for first in range(0, len(samples), _BLOCK):
        some = slice(first, first + _BLOCK)
        clusters[samples[some]] = means.predict(index.features[rows[some]].astype(np.float32))
    missing = len(source) - len(samples)
    _log.info("hard negatives: %s clusters of the features in %s; %s of %s samples have none and are drawn at random",
              f"{count:,}", folder, f"{missing:,}", f"{len(source):,}")
    return clusters
