"""Search in an index: by text, by image, by both; exactly, or by a graph of neighbours."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from aclip.data import Source, decode_image, open_source
from aclip.data.decode import IMAGE_EXTENSIONS
from aclip.data.progress import progress
from aclip.data.sources import Mixture
from aclip.data.sources.image_files import read_image
from aclip.devices import choose_device
from aclip.errors import BadSampleError, CheckpointError, ConfigError, DataError
from aclip.examination.measure import join_groups
from aclip.models import LoadedModel, load
from aclip.models.loaded import ImageLike
from aclip.models.loading import preprocess_config
from aclip.search.approximate import open_graph, search_graph

DESCRIPTION, SKIPPED = "index.json", "skipped.jsonl"

WITHOUT = 0.5
"""Weight of a text that is subtracted: a larger one ranks by what is absent more than by what is there."""

_BLOCK = 4096  # rows that are searched at a time: their float32 copy stays in the processor's cache


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        row: its number in the index, of `Index.features` and for `Index.image`.
        similarity: cosine with the query (less that of what was subtracted).
        path: its file; None in shards and tables.
    """

    row: int
    name: str
    similarity: float
    captions: tuple[str, ...]
    path: str | None


class Index:
    """Features of images, memory-mapped, with their names and captions; see `aclip.index`.

    Example:
        >>> index = aclip.Index("photos.index")
        >>> for hit in index.search("two red cars", not_="a person", top=5):
        ...     print(f"{hit.similarity:.2f} {hit.name}")
        >>> groups = index.duplicates(threshold=0.97)

    Attributes:
        folder: where it lies. description: what its `index.json` says.
        features: (N, D) float16, L2-normalised, memory-mapped.
    """

    def __init__(
        self, folder: str | Path, *, model: str | Path | LoadedModel | None = None, device: str = "auto"
    ) -> None:
        """Open an index.

        Args:
            folder: that `aclip.index` wrote.
            model: where the model lies if it has been moved, or the loaded model; default: the place it was built from.
            device: of a model that is loaded by name: auto, cpu, cuda, ...

        Raises:
            ConfigError: the folder is no index.
            DataError: a damaged index.
        """
        import pyarrow
        import pyarrow.parquet

        self.folder, self.description = Path(folder), self.describe(Path(folder))
        self._model, self._device = model, device
        try:
            self.features: np.ndarray = np.load(self.folder / self.description["features"], mmap_mode="c")
            self._items = pyarrow.parquet.read_table(self.folder / self.description["items"])
        except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
            raise DataError(f"the index {folder} is damaged ({error}): remove it and build it again") from error
        graph = self.description.get("graph")
        self.graph = open_graph(self.folder / graph) if graph else None
        self._sources: dict[int, Source] = {}

    @staticmethod
    def describe(folder: Path) -> dict[str, Any]:
        """Return what `index.json` says of an index."""
        try:
            return dict(json.loads((folder / DESCRIPTION).read_bytes()))
        except FileNotFoundError as error:
            below = sorted(one.parent for one in folder.glob(f"*/{DESCRIPTION}"))
            output = folder / "index" if (folder / "config.json").exists() else folder  # a run holds other files
            advice = f"did you mean {below[0]}?" if below else (
                f"build one with `aclip index MODEL SOURCE --output {output}`")
            raise ConfigError(f"{folder} is no index: {advice}") from error
        except ValueError as error:
            raise DataError(f"{folder / DESCRIPTION} is damaged: remove the folder and build it again") from error

    def __len__(self) -> int:
        return len(self.features)

    def to_json(self) -> dict[str, Any]:
        return {"folder": self.folder, **self.description}

    @cached_property
    def model(self) -> LoadedModel:
        """The model that the images were encoded by, loaded on first use.

        Raises:
            CheckpointError: its weights are other ones now.
            ConfigError: it is not where it was.
        """
        loaded = self._model or self.description["model"]
        if loaded is None:
            raise ConfigError(f"{self.folder} was built by a model in memory: name it with --model")
        if not isinstance(loaded, LoadedModel):
            loaded = load(loaded, weights=self.description["weights"]).to(choose_device(self._device))
        if weights_digest(loaded) != self.description["digest"]:
            raise CheckpointError(f"{loaded.name} has other weights than those that {self.folder} was built by: run "
                                  "`aclip index` again, or name the earlier model with --model")
        return loaded

    def search(self, *queries: ImageLike, not_: str | Sequence[str] = (), top: int = 20) -> list[Hit]:
        """Return the images most similar to the sum of some texts and images.

        Args:
            queries: texts, paths of images, Pillow images or uint8 arrays; a text that is the path of a file is that
                image.
            not_: texts to subtract, each with the weight `WITHOUT`.
            top: number of images.

        Returns:
            The most similar first.

        Raises:
            ConfigError: nothing to search for.
            DataError: an image that cannot be read.
            UnsupportedModelError: a text, and a model without a text tower.
        """
        texts = [query for query in queries if isinstance(query, str) and not _is_image(query)]
        images = [query for query in queries if not isinstance(query, str) or _is_image(query)]
        vector = self.encode_query(images, texts, [not_] if isinstance(not_, str) else not_)
        similarity, rows = self.nearest(vector[None], top)
        return self.hits(rows[0].tolist(), similarity[0].tolist())

    def encode_query(
        self, images: Sequence[ImageLike], texts: Sequence[str], without: Sequence[str] = ()
    ) -> Float[Tensor, "D"]:
        """Return the vector whose product with features ranks them; for errors see `search`."""
        if not (images or texts) or any(not text.strip() for text in (*texts, *without)):
            raise ConfigError("nothing to search for: give a text or an image")
        parts = [self.model.encode_texts(texts)] if texts else []
        parts += [self.model.encode_images(images)] if images else []
        vector = F.normalize(torch.cat(parts).sum(dim=0), dim=0)
        return vector - WITHOUT * self.model.encode_texts(without).sum(dim=0) if without else vector

    def nearest(
        self, queries: Float[Tensor, "Q D"], top: int, *, exact: bool = False
    ) -> tuple[Float[Tensor, "Q K"], Int[Tensor, "Q K"]]:
        """Return the K = min(top, N) largest products with the features, and their rows; (Q, K) each, largest first.

        Every row is compared, `_BLOCK` at a time, unless the index has a graph of neighbours and `exact` is False.
        """
        if top < 1:
            raise ConfigError(f"--top is at least 1, not {top}")
        top = min(top, len(self))
        if self.graph is not None and not exact:
            return search_graph(self.graph, self.features, queries, top)
        products = torch.empty(len(queries), len(self))
        block = torch.empty(_BLOCK, self.features.shape[1])
        for first in range(0, len(self), _BLOCK):
            some = torch.from_numpy(self.features[first : first + _BLOCK])
            products[:, first : first + len(some)] = queries.float() @ block[: len(some)].copy_(some).T
        rows = products.topk(top).indices.sort().values  # of equal products the lower row comes first
        similarity, order = products.gather(1, rows).sort(descending=True, stable=True)
        return similarity, rows.gather(1, order)

    def duplicates(self, threshold: float = 0.97) -> list[list[Hit]]:
        """Return groups of images that look nearly the same to the model, the largest group first.

        Two images belong together if the cosine of their features is at least `threshold`, or if others link them. All
        pairs are compared, in time that grows as N squared; with a graph of neighbours each with its nearest 16.

        Returns:
            Groups of at least two; a hit's similarity is that to the first of its group.
        """
        if not 0.0 < threshold <= 1.0:
            raise ConfigError(f"--threshold is a cosine in (0, 1], not {threshold:g}")
        groups = join_groups(np.arange(len(self)), *self._pairs(threshold))
        order = np.argsort(groups, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(groups[order]) > 0])
        found = [rows for rows in np.split(order, starts[1:]) if len(rows) > 1]
        listed = []
        for rows in sorted(found, key=lambda rows: -len(rows)):
            own = torch.from_numpy(self.features[rows]).float()
            listed.append(self.hits(rows.tolist(), (own @ own[0]).tolist()))
        return listed

    def hits(self, rows: Sequence[int], similarity: Sequence[float]) -> list[Hit]:
        records = self._items.take(list(rows)).to_pylist()
        return [Hit(row, record["name"], value, tuple(record["captions"]), record["path"])
                for row, value, record in zip(rows, similarity, records, strict=True)]

    def rows_of(self, source: Source) -> np.ndarray:
        """Return the row of every sample of a source, (n,) int64, -1 where there is none.

        Samples are known by their files, in shards and tables by their names. What several rows are called names none
        of them.
        """
        known: dict[str, int] = {}
        for row, keys in enumerate(zip(*(self._items[key].to_pylist() for key in ("path", "name")), strict=True)):
            key = keys[0] or keys[1]
            known[key] = -1 if key in known else row
        parts = source.parts if isinstance(source, Mixture) else (source,)
        return np.fromiter((known.get(_key(part, index), -1) for part in parts for index in range(len(part))), np.int64)

    def read(self, row: int) -> bytes:
        """Return the file of an image.

        Raises:
            BadSampleError: it is gone, or the source holds another sample in its place.
        """
        record = self._items.slice(row, 1).to_pylist()[0]
        if record["path"] is not None:
            return read_image(Path(record["path"]))
        number, index = record["source"], record["index"]
        if number not in self._sources:
            self._sources[number] = open_source(self.description["sources"][number])
        source = self._sources[number]
        if index >= len(source) or source.name(index) != record["name"]:
            raise BadSampleError(f"the source has changed, run `aclip index` again: {record['name']}")
        return source.read(index).image

    def image(self, row: int, *, min_side: int | None = None) -> Image.Image:
        """Return an image, upright and in RGB; for `min_side` see `aclip.data.decode_image`, for errors `read`."""
        return decode_image(self.read(row), min_side=min_side)

    def thumbnail(self, row: int, side: int) -> Image.Image:
        """Return an image at most `side` pixels wide and high; a grey one if it cannot be read now."""
        try:
            image = self.image(row, min_side=side)
        except BadSampleError:
            return Image.new("RGB", (side, side), "#ddd")
        image.thumbnail((side, side))
        return image

    def _pairs(self, threshold: float) -> Int[np.ndarray, "2 P"]:
        pairs = [torch.empty(2, 0, dtype=torch.int64)]
        with progress("comparing images", len(self), "images") as advance:
            for start in range(0, len(self), _BLOCK):
                own = torch.from_numpy(self.features[start : start + _BLOCK]).float()
                if self.graph is not None:
                    similarity, rows = search_graph(self.graph, self.features, own, min(16, len(self)))
                    at, place = torch.nonzero(similarity >= threshold, as_tuple=True)
                    pairs.append(torch.stack([at + start, rows[at, place]]))
                for other in range(start, len(self), _BLOCK) if self.graph is None else ():
                    some = torch.from_numpy(self.features[other : other + _BLOCK]).float()
                    one, two = torch.nonzero(own @ some.T >= threshold, as_tuple=True)
                    pairs.append(torch.stack([one + start, two + other]))
                advance(len(own))
        return torch.cat(pairs, dim=1).numpy()


def _key(source: Source, index: int) -> str:
    path = source.path(index)
    return source.name(index) if path is None else str(path.absolute())


def weights_digest(model: LoadedModel) -> str:
    """Return a hash of the weights of a model and of how it preprocesses images."""
    state = hashlib.blake2b(str(preprocess_config(model.model)).encode(), digest_size=16)
    for name, value in sorted(model.model.state_dict().items()):
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()


def _is_image(query: str) -> bool:
    """Return whether a query names an image file; one that does not exist is an error, not a text."""
    if os.path.isfile(query):
        return True
    if query.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and " " not in query.strip():
        raise DataError(f"the image {query} does not exist")
    return False
