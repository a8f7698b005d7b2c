"""Measure indexing beside bare `encode_image`, and search beside faiss on the same vectors.

    python benchmarks/search.py index runs/first emoji:val_vendor
    python benchmarks/search.py kills runs/first emoji:val_both
    python benchmarks/search.py without emoji.index
    python benchmarks/search.py duplicates emoji.index
    python benchmarks/search.py search --count 1000000 --dim 512 --methods exact faiss-flat

Vectors are drawn: 64 directions with falling variance in `dim` dimensions, a little noise, and a mean, as the features
of images have; queries have the same directions and another mean, as those of texts. `graph` is usearch as an index of
`aclip` builds it, `faiss-hnsw` has the same degree and width of search. `without` finds the weight of
a subtracted text: for words A and B of the captions of an index, the average precision of "A" without "B" at finding
the images whose captions have A and not B, among those with A. Latencies are medians over single queries;
memory is what the process gains.
"""

import argparse
import io
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.metrics import average_precision_score

import aclip
from aclip.data import EvaluationSet, open_source
from aclip.evaluation.features import encode_batch
from aclip.search import approximate, build
from aclip.search.store import Index

TOP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("index")
    one.add_argument("model")
    one.add_argument("source")
    one.add_argument("--workers", type=int, default=1)
    two = verbs.add_parser("search")
    two.add_argument("--count", type=int, default=10_000)
    two.add_argument("--dim", type=int, default=512)
    two.add_argument("--queries", type=int, default=50)
    two.add_argument("--methods", nargs="+", default=["exact", "faiss-flat"],
                     choices=["exact", "graph", "faiss-flat", "faiss-hnsw"])
    four = verbs.add_parser("kills")
    four.add_argument("model")
    four.add_argument("source")
    four.add_argument("--moments", type=int, default=10)
    for name in ("without", "duplicates"):
        verbs.add_parser(name).add_argument("index")
    given = parser.parse_args()
    if given.verb == "index":
        measure_indexing(given.model, given.source, given.workers)
    elif given.verb == "kills":
        measure_kills(given.model, given.source, given.moments)
    elif given.verb == "without":
        measure_without(given.index)
    elif given.verb == "duplicates":
        measure_duplicates(given.index)
    else:
        measure_search(given.count, given.dim, given.queries, given.methods)


def measure_indexing(name: str, spec: str, workers: int) -> None:
    model, source = aclip.load(name), open_source(spec)
    batches = [batch.pixels for batch in EvaluationSet(source, model.preprocess, target="either")]
    count = sum(map(len, batches))
    with torch.inference_mode():
        encode_batch(model, batches[0], model.device)
        bare = timed(lambda: [encode_batch(model, pixels, model.device) for pixels in batches])
    with tempfile.TemporaryDirectory() as folder:
        first = timed(lambda: aclip.index(model, spec, output=folder, workers=workers))
        again = timed(lambda: aclip.index(model, spec, output=folder, workers=workers))
    for what, seconds in (("bare encode_image", bare), (f"index, {workers} workers", first), ("index again", again)):
        report(f"{what}: {count / seconds:,.0f} images/s ({seconds:.1f} s)")


def measure_kills(name: str, source: str, moments: int) -> None:
    """Kill a build at random moments, finish it, and compare its files with those of an undisturbed one."""
    build.PIECE_SECONDS = 0.5
    model = aclip.load(name)

    def contents(folder: Path) -> list[bytes]:
        named = Index(folder).description
        return [(folder / file).read_bytes() for file in (named["features"], named["items"], "skipped.jsonl")]

    with tempfile.TemporaryDirectory() as parent:
        undisturbed = Path(parent) / "undisturbed"
        whole = timed(lambda: aclip.index(model, source, output=undisturbed, workers=0))
        expected, draw, equal, pieces = contents(undisturbed), np.random.default_rng(0), 0, 0
        for number, moment in enumerate(draw.uniform(0, whole, moments).tolist()):
            folder = Path(parent) / str(number)
            process = os.fork()
            if process == 0:
                aclip.index(model, source, output=folder, workers=0)
                os._exit(0)
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            pieces += len(list(folder.glob(".piece-*")))
            aclip.index(model, source, output=folder, workers=0)
            equal += contents(folder) == expected
    report(f"{equal} of {moments} builds killed within {whole:.1f} s end as the undisturbed one; they left "
           f"{pieces} pieces")


def measure_without(folder: str) -> None:
    index = Index(folder)
    captions = [set(" ".join(hit.captions[:1]).lower().replace(":", "").split())
                for hit in index.hits(range(len(index)), [0.0] * len(index))]
    counts = Counter(word for words in captions for word in words if len(word) > 2)
    common = [word for word, count in counts.most_common(60) if count >= 15]
    has = {word: np.array([word in words for words in captions]) for word in common}
    pairs = [(a, b) for a in common for b in common
             if a != b and (has[a] & has[b]).sum() >= 5 and (has[a] & ~has[b]).sum() >= 5]
    texts = dict(zip(common, index.model.encode_texts(common).numpy(), strict=True))
    features = index.features.astype(np.float32)
    report(f"{len(pairs)} pairs of words")
    for weight in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5):
        among, over_all = [], []
        for a, b in pairs:
            scores, right = features @ (texts[a] - weight * texts[b]), has[a] & ~has[b]
            among.append(average_precision_score(right[has[a]], scores[has[a]]))
            over_all.append(average_precision_score(right, scores))
        report(f"weight {weight}: average precision {np.mean(among):.3f} among the images with A, "
               f"{np.mean(over_all):.3f} among all")


def measure_duplicates(folder: str) -> None:
    """Print how many altered copies, and how many images of other captions, are near-duplicates at some thresholds."""
    index, thresholds = Index(folder), (0.9, 0.95, 0.97, 0.99)
    rows = range(0, len(index), -(-len(index) // 200))
    images = [index.image(row) for row in rows]
    own = index.features[list(rows)].astype(np.float32)
    for name, alter in COPIES.items():
        copies = index.model.encode_images([alter(image) for image in images]).numpy()
        cosines = (copies * own).sum(axis=1)
        report(f"{name}: " + ", ".join(f"{(cosines >= one).mean():.0%} at {one}" for one in thresholds))
    for one in thresholds:
        groups = index.duplicates(one)
        alike = [group for group in groups if len({hit.captions[:1] for hit in group}) == 1]
        report(f"{one}: {len(groups)} groups, {len(alike)} of one caption each")


def as_jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 30": as_jpeg,
    "half the size": lambda image: image.reduce(2),
    "15 % brighter": lambda image: image.point(lambda value: min(255, int(value * 1.15))),
    "5 % cut off each side": lambda image: ImageOps.crop(image, image.width // 20),
    "mirrored": ImageOps.mirror,
}


def measure_search(count: int, dim: int, queries: int, methods: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asked = write_index(Path(folder), count, dim, queries)
        before = resident()
        index = Index(folder)
        exact = timed_queries(lambda query: index.nearest(query, TOP), asked)
        truth = [rows.tolist()[0] for _, rows in exact[1]]
        report(f"{count:,} x {dim}, {queries} queries, top {TOP}, {torch.get_num_threads()} threads")
        if "exact" in methods:
            report(f"exact: {1e3 * exact[0]:.1f} ms, {resident() - before:,.0f} MB (mapped pages included)")
        if "graph" in methods:
            measure_graph(index, asked, truth)
        for method in (one for one in methods if one.startswith("faiss")):
            measure_faiss(method, index.features, asked, truth)


def measure_graph(index: Index, asked: torch.Tensor, truth: list[list[int]]) -> None:
    before = resident()
    path = index.folder / "graph.usearch"
    seconds = timed(lambda: approximate.build_graph(index.features, path))
    built, size = resident() - before, path.stat().st_size / 1e6
    for width in (64, 128, 256, 512):
        approximate.EXPANSION = width
        index.graph = approximate.open_graph(path)
        latency, found = timed_queries(lambda query: index.nearest(query, TOP), asked)
        report(f"graph, width {width}: {1e3 * latency:.2f} ms, recall {recall(truth, found):.3f}; built in "
               f"{seconds:.0f} s with {built:,.0f} MB, {size:,.0f} MB on disk")


def measure_faiss(method: str, features: np.ndarray, asked: torch.Tensor, truth: list[list[int]]) -> None:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    before, dim = resident(), features.shape[1]
    index: Any
    if method == "faiss-flat":
        index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        widths = [0]
    else:
        index = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_fp16, 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, widths = 128, [64, 128, 256, 512]

    def build() -> None:
        index.train(features[:1000].astype(np.float32))
        for first in range(0, len(features), 10_000):
            index.add(features[first : first + 10_000].astype(np.float32))

    seconds = timed(build)
    built = resident() - before
    for width in widths:
        if width:
            index.hnsw.efSearch = width
        latency, found = timed_queries(lambda query: index.search(query.numpy(), TOP), asked)
        report(f"{method}{f', width {width}' * bool(width)}: {1e3 * latency:.2f} ms, recall "
               f"{recall(truth, found):.3f}; built in {seconds:.0f} s with {built:,.0f} MB")


def write_index(folder: Path, count: int, dim: int, queries: int) -> torch.Tensor:
    """Write an index without images, and return queries, (Q, D) float32, L2-normalised."""
    import json

    import pyarrow.parquet

    draw = np.random.default_rng(0)
    directions = draw.standard_normal((64, dim), dtype=np.float32) * (np.arange(1, 65) ** -0.5)[:, None]
    means = draw.standard_normal((2, dim), dtype=np.float32)

    def vectors(number: int, mean: np.ndarray) -> np.ndarray:
        drawn: np.ndarray = draw.standard_normal((number, 64), dtype=np.float32) @ directions.astype(np.float32)
        drawn += mean + 0.3 * draw.standard_normal((number, dim), dtype=np.float32)
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        return drawn

    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (count, dim))
    for first in range(0, count, 50_000):
        features[first : first + 50_000] = vectors(min(50_000, count - first), means[0])
    features.flush()
    pyarrow.parquet.write_table(pyarrow.table({"name": pyarrow.nulls(count, pyarrow.string())}), folder / "items")
    (folder / "index.json").write_text(json.dumps({"features": "features.npy", "items": "items"}))
    return torch.from_numpy(vectors(queries, means[1])).float()


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def timed_queries(search: Callable[[torch.Tensor], Any], asked: torch.Tensor) -> tuple[float, list[Any]]:
    """Return the median seconds of single queries, and what each found."""
    search(asked[:1])
    seconds, found = [], []
    for query in asked:
        start = time.perf_counter()
        found.append(search(query[None]))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), found


def recall(truth: list[list[int]], found: list[Any]) -> float:
    rows = [np.asarray(one[1])[0].tolist() for one in found]
    return sum(len(set(a) & set(b)) for a, b in zip(truth, rows, strict=True)) / (len(truth) * TOP)


def resident() -> float:
    """Return the memory of this process in MB, mapped files included."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1e3


def report(words: str) -> None:
    print(words, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
