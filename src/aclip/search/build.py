"""Build an index of images: encode what is new or changed, keep the rest, forget what is gone.

The features of finished batches go to pieces, `.piece-*.npy`, every `PIECE_SECONDS`. A build takes whatever it needs
from the earlier index and from the pieces that a killed build left, by the identity of an image under a model, so that
an update and a continued build are the same thing. `index.json` is replaced last and names the other files.
"""

import errno
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aclip.data import Source, absolute, clean_captions, decode_image, open_source, parse_spec, suitable_workers
from aclip.data.evaluation_set import limit_aspect
from aclip.data.progress import progress
from aclip.data.sources.base import digest_of, printable
from aclip.data.workers import read_ahead
from aclip.devices import choose_device
from aclip.errors import BadSampleError, ConfigError, DataError, MissingDependencyError
from aclip.evaluation.features import check_finite, encode_batch, evaluating
from aclip.evaluation.sets import name_skipped
from aclip.files import atomic_file, write_atomically
from aclip.models import LoadedModel, load
from aclip.models.loading import WeightsOf
from aclip.search import approximate
from aclip.search.store import DESCRIPTION, SKIPPED, Index, weights_digest

BATCH_SIZE = 64

PIECE_SECONDS = 20.0
"""What a kill may cost at most."""

_PIECES = ".piece-*.npy"
_ROW_GROUP = 2**15  # rows of the table that are held in memory

_log = logging.getLogger(__name__)


def build(
    model: str | Path | LoadedModel, source: str | Path | Sequence[str], folder: Path, weights: WeightsOf, device: str,
    workers: int | None,
) -> Index:
    """See `aclip.index`."""
    if find_spec("pyarrow") is None:
        raise MissingDependencyError("an index needs pyarrow: pip install 'attentive-clip[parquet]'")
    if folder.is_file() or (folder.is_dir() and not (folder / DESCRIPTION).exists() and not any(folder.glob(_PIECES))
                            and any(not path.name.endswith(".part") for path in folder.iterdir())):
        raise ConfigError(f"{folder} holds something else than an index: name a new folder with --output")
    specs = [absolute(str(spec)) for spec in ([source] if isinstance(source, str | Path) else source)]
    if not specs:
        raise ConfigError("name the images: `aclip index MODEL SOURCE --output INDEX`")
    sources = [open_source(spec) for spec in specs]
    chosen = choose_device(device)
    loaded = (model if isinstance(model, LoadedModel) else load(model, weights=weights)).to(chosen)
    name = None if isinstance(model, LoadedModel) else os.path.abspath(model) if os.path.exists(model) else str(model)
    description = {"model": name, "weights": weights, "digest": weights_digest(loaded), "sources": specs}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _Build(folder, description, loaded, sources, suitable_workers(chosen, workers)).run()
        index = _with_graph(Index(folder, model=loaded))
    except OSError as error:
        full = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror or error)
        raise DataError(f"cannot write to {folder}: {full}; the same command continues where it stopped") from error
    if index.graph is not None:
        approximate.log_recall(index)
    return index


def _with_graph(index: Index) -> Index:
    name = f"graph-{index.description['generation']}.usearch"
    if (index.graph is not None or len(index) < approximate.APPROXIMATE_FROM
            or not approximate.build_graph(index.features, index.folder / name)):
        return index
    write_atomically(index.folder / DESCRIPTION, json.dumps(index.description | {"graph": name}, indent=1) + "\n")
    return Index(index.folder, model=index.model)


@dataclass(frozen=True)
class _Row:
    """A good image: where it is, and which of the known features are its own (-1 for none)."""

    identity: str
    known: int
    name: str
    path: str | None
    captions: tuple[str, ...]
    source: int
    index: int


@dataclass(frozen=True)
class _ReadNew:
    """What a worker does for some samples of a source: tell the known from the new, and decode these.

    It returns the rows, the pixels of those without known features, and (name, reason) of bad samples.
    """

    sources: Sequence[Source]
    stretched: Sequence[str | None]  # the option of each source, which makes other pixels of the same file
    digest: str
    known: np.ndarray  # (n,) S32, sorted identities
    numbers: np.ndarray  # (n,) int64, of their features
    preprocess: Callable[[Any], Tensor]

    def __call__(self, request: tuple[int, range]) -> tuple[list[_Row], Tensor | None, list[tuple[str, str]]]:
        number, indices = request
        source = self.sources[number]
        rows, pixels, skipped = [], [], []
        for index in indices:
            try:
                row, new = self._read(source, number, index)
            except BadSampleError as error:
                skipped.append((source.name(index), error.reason))
                continue
            rows.append(row)
            pixels += [] if new is None else [new]
        return rows, torch.stack(pixels) if pixels else None, skipped

    def _read(self, source: Source, number: int, index: int) -> tuple[_Row, Tensor | None]:
        path, raw = source.path(index), None
        path = None if path is None else path.absolute()
        try:
            status = None if path is None else os.stat(path)
        except (OSError, ValueError):
            status = None  # `read` says why
        if path is not None and status is not None:
            identity = digest_of(self.digest, self.stretched[number], os.fsencode(path), status.st_size,
                                 status.st_mtime_ns)
        else:
            raw = source.read(index)
            identity = digest_of(self.digest, raw.image)
        known = self._find(identity)
        if raw is None and known < 0:
            raw = source.read(index)
        captions: tuple[str, ...] = ()
        with suppress(BadSampleError):  # an image needs no caption to be found
            captions = clean_captions(source.captions(index) if raw is None else raw.captions)
        readable = str(path) if path is not None and printable(str(path)) == str(path) else None
        row = _Row(identity, known, source.name(index), readable, captions, number, index)
        if known >= 0 or raw is None:
            return row, None
        return row, self.preprocess(limit_aspect(decode_image(raw.image)))

    def _find(self, identity: str) -> int:
        key = np.bytes_(identity)
        at = int(np.searchsorted(self.known, key))
        return int(self.numbers[at]) if at < len(self.known) and self.known[at] == key else -1


class _Build:
    def __init__(self, folder: Path, description: dict[str, Any], model: LoadedModel, sources: Sequence[Source],
                 workers: int) -> None:
        self.folder, self.description, self.model, self.sources = folder, description, model, sources
        self.workers = workers
        for part in folder.glob(".*.part"):
            part.unlink()
        self.earlier = Index.describe(folder) if (folder / DESCRIPTION).exists() else {}
        if self.earlier and self.earlier["digest"] != description["digest"]:
            _log.info("%s was built by other weights (%s): all images are encoded again", folder, self.earlier["model"])
        self.parts: list[np.ndarray] = []  # known features: the earlier index's, then those of each piece
        self.known, self.numbers = self._find_known()
        self.waiting: list[tuple[list[str], Tensor]] = []  # features of the next piece
        self.last_piece = time.monotonic()
        self.origins: list[np.ndarray] = []  # of each row of the new index, the number of its features
        self.skipped: list[tuple[str, str]] = []
        self.encoded = 0

    def run(self) -> None:
        requests = [(number, range(len(source))[first : first + BATCH_SIZE])
                    for number, source in enumerate(self.sources) for first in range(0, len(source), BATCH_SIZE)]
        stretched = [parse_spec(spec).get("stretch") for spec in self.description["sources"]]
        read = _ReadNew(self.sources, stretched, self.description["digest"], self.known, self.numbers,
                        self.model.preprocess)
        generation = int(self.earlier.get("generation", 0)) + 1
        items = f"items-{generation}.parquet"
        try:
            with (atomic_file(self.folder / items) as file, _table_writer(file) as write,
                  progress(f"indexing {self.folder}", sum(map(len, self.sources)), "images") as advance,
                  evaluating(self.model), torch.inference_mode()):
                for rows, pixels, skipped in read_ahead(read, requests, workers=self.workers):
                    self._add(rows, pixels)
                    self.skipped += skipped
                    write(rows)
                    advance(len(rows) + len(skipped))
        finally:
            self._write_piece()
        origins = np.concatenate([*self.origins, np.empty(0, dtype=np.int64)])
        if not len(origins):
            (self.folder / items).unlink()
            raise DataError(f"no usable image in {' '.join(self.description['sources'])}"
                            + (f": {name_skipped(self.skipped)}" if self.skipped else ""))
        self._finish(generation, items, origins)

    def _find_known(self) -> tuple[np.ndarray, np.ndarray]:
        """Open the known features; return their sorted identities and their numbers."""
        identities = [np.empty(0, dtype="S32")]
        if self.earlier:
            self.parts.append(np.load(self.folder / self.earlier["features"], mmap_mode="r"))
            column = _identities(self.folder / self.earlier["items"])
            identities.append(column.to_numpy(zero_copy_only=False).astype("S32"))
        for path in sorted(self.folder.glob(_PIECES)):
            piece = np.load(path, mmap_mode="r")
            self.parts.append(piece["features"])
            identities.append(piece["identity"])
        found = np.concatenate(identities)
        order = np.argsort(found, kind="stable")
        return found[order], order

    def _add(self, rows: list[_Row], pixels: Tensor | None) -> None:
        numbers = np.array([row.known for row in rows], dtype=np.int64)
        new = numbers < 0
        if pixels is not None:
            features = encode_batch(self.model, pixels, self.model.device)
            check_finite(features, "images")
            self.waiting.append(([row.identity for row in rows if row.known < 0], features.half().cpu()))
            start = len(self.known) + self.encoded
            numbers[new] = np.arange(start, start + len(features))
            self.encoded += len(features)
        self.origins.append(numbers)
        if time.monotonic() > self.last_piece + PIECE_SECONDS:
            self._write_piece()

    def _write_piece(self) -> None:
        if self.waiting:
            features = torch.cat([part for _, part in self.waiting]).numpy()
            piece = np.empty(len(features), dtype=[("identity", "S32"), ("features", "<f2", features.shape[1:])])
            piece["identity"] = [identity for identities, _ in self.waiting for identity in identities]
            piece["features"] = features
            path = self.folder / f".piece-{time.time_ns():020}-{secrets.token_hex(4)}.npy"
            with atomic_file(path) as file:
                np.save(file, piece)
            self.parts.append(np.load(path, mmap_mode="r")["features"])
            self.waiting = []
        self.last_piece = time.monotonic()

    def _finish(self, generation: int, items: str, origins: np.ndarray) -> None:
        """Write the features in the order of the sources, then what names them, then remove what came before."""
        old = int(self.earlier.get("images", 0))
        kept = int(np.count_nonzero(origins < old))
        unchanged = bool(self.earlier) and _identities(self.folder / items).equals(
            _identities(self.folder / self.earlier["items"]))
        features = str(self.earlier["features"]) if unchanged else f"features-{generation}.npy"
        if not unchanged:
            _write_rows(self.folder / features, self.parts, origins)
        write_atomically(self.folder / SKIPPED, "".join(
            json.dumps({"name": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in self.skipped))
        self.description |= {
            "generation": generation, "images": len(origins), "skipped": len(self.skipped), "features": features,
            "items": items, "graph": self.earlier.get("graph") if unchanged else None}
        write_atomically(self.folder / DESCRIPTION, json.dumps(self.description, indent=1) + "\n")
        self.parts.clear()  # Windows removes no file that is mapped
        used = {str(value) for value in self.description.values()}
        for pattern in (_PIECES, "items-*.parquet", "features-*.npy", "graph-*.usearch"):
            for path in self.folder.glob(pattern):
                if path.name not in used:
                    path.unlink()
        _log.info("%s: %s images, %s encoded, %s as before, %s forgotten", self.folder, f"{len(origins):,}",
                  f"{self.encoded:,}", f"{len(origins) - self.encoded:,}", f"{old - kept:,}")
        if self.skipped:
            _log.info("%s (all in %s)", name_skipped(self.skipped), self.folder / SKIPPED)


def _write_rows(path: Path, parts: Sequence[np.ndarray], numbers: np.ndarray) -> None:
    """Write rows of some arrays, numbered through, as one (n, D) float16 .npy file."""
    starts = np.cumsum([0, *map(len, parts)])
    dim = parts[int(np.searchsorted(starts, numbers[0], side="right")) - 1].shape[1]
    header = {"descr": "<f2", "fortran_order": False, "shape": (len(numbers), dim)}
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, len(numbers), 2**14):
            some = numbers[first : first + 2**14]
            owners = np.searchsorted(starts, some, side="right") - 1
            block = np.empty((len(some), dim), dtype="<f2")
            for owner in np.unique(owners):
                own = owners == owner
                block[own] = parts[owner][some[own] - starts[owner]]
            file.write(block.data)


@contextmanager
def _table_writer(file: Any) -> Iterator[Callable[[list[_Row]], None]]:
    """Yield a function that adds rows to a Parquet file."""
    import pyarrow.parquet

    schema = pyarrow.schema([
        ("name", pyarrow.string()), ("captions", pyarrow.list_(pyarrow.string())), ("path", pyarrow.string()),
        ("source", pyarrow.int32()), ("index", pyarrow.int64()), ("identity", pyarrow.string())])
    rows: list[_Row] = []
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist([vars(row) for row in rows], schema=schema))
            rows.clear()

        def write(more: list[_Row]) -> None:
            rows.extend(more)
            if len(rows) >= _ROW_GROUP:
                flush()

        yield write
        flush()


def _identities(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, columns=["identity"])["identity"].combine_chunks()
