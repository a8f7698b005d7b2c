"""Tensors in safetensors files, each rank its share in a file of its own, readable by any number of ranks.

The layout is that of torch.distributed.checkpoint's safetensors storage (`HuggingFaceStorageReader` reads it): the
header of every file says where in its tensor each piece begins. Files are written here because torch's writer holds the
interpreter's lock and twice the memory meanwhile, and marks no file with a checksum (docs/decisions.md).
"""

import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from aclip import dist
from aclip.errors import CheckpointError

FILE_NAME = re.compile(r"state(-\d{5}-of-\d{5})?\.safetensors")
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names
_BLOCK = 2**24


@dataclass(frozen=True)
class Piece:
    """A block of a tensor, or all of it.

    Attributes:
        name: of the tensor.
        start: where in the tensor the block begins, one number a dimension.
        tensor: the block.
    """

    name: str
    start: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class FileMark:
    """What a file must be like, or it is damaged: its name, its bytes, and their CRC-32 (against accidents)."""

    name: str
    size: int
    crc32: int


def file_name(rank: int, world_size: int) -> str:
    """Return what the file of one rank is called."""
    return "state.safetensors" if world_size == 1 else f"state-{rank:05}-of-{world_size:05}.safetensors"


def own_pieces(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Return what this rank writes: its own part of what is sharded, and a fair share of what all ranks hold alike.

    Together the ranks write everything once. No communication: every rank comes to the same division.
    """
    mine: list[Piece] = []
    load = [0] * dist.world_size()
    for name, tensor in tensors.items():
        part = region(tensor)
        if part is not None:
            if part.tensor.numel():
                mine.append(Piece(name, part.start, part.tensor))
            continue
        whole = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        writer = load.index(min(load))
        load[writer] += whole.nbytes
        if writer == dist.rank():
            mine.append(Piece(name, (0,) * whole.ndim, whole.detach()))
    return mine


def region(tensor: Tensor) -> Piece | None:
    """Return what this rank holds of a sharded tensor, and None for a tensor that it holds whole."""
    if not isinstance(tensor, DTensor) or all(placement.is_replicate() for placement in tensor.placements):
        return None
    (chunk,) = tensor.__create_chunk_list__()
    return Piece("", tuple(chunk.offsets), tensor.to_local().detach())


def write_shard(path: Path, pieces: Sequence[Piece]) -> FileMark:
    """Write pieces, in the CPU's memory, to a safetensors file that is on the disk when this returns.

    Writing and summing release the interpreter's lock, and nothing is copied.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    contents: dict[str, Any] = {"__metadata__": {
        "format": "pt", _SHARDING: json.dumps({piece.name: {_OFFSETS: piece.start} for piece in pieces})}}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.tensor.nbytes
        contents[piece.name] = {"dtype": _CODES[piece.tensor.dtype], "shape": list(piece.tensor.shape),
                                "data_offsets": [begin, end]}
    header = json.dumps(contents).encode()
    header += b" " * (-len(header) % 8)
    blocks: list[Any] = [len(header).to_bytes(8, "little"), header, *(_bytes(piece.tensor) for piece in pieces)]
    crc, size = 0, 0
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            crc = zlib.crc32(block, crc)
            size += len(block)
            _write_all(file, block)
        os.fsync(file.fileno())
    return FileMark(path.name, size, crc)


def mark_of(path: Path) -> FileMark:
    """Return what a file is like now.

    Raises:
        OSError: it is not there.
    """
    crc, size = 0, 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return FileMark(path.name, size, crc)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint's files, read when they are asked for; nothing in the files can run code.

    Args:
        paths: all files of the checkpoint.

    Raises:
        OSError, SafetensorError, ValueError, KeyError: damaged files.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._pieces: dict[str, list[tuple[Any, tuple[int, ...], tuple[int, ...]]]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for path in paths:
            file: Any = safe_open(path, framework="pt")
            starts = _starts((file.metadata() or {}).get(_SHARDING, "{}"))
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                block = file.get_slice(name)
                shape = tuple(block.get_shape())
                start = starts.get(name, (0,) * len(shape))
                if len(start) != len(shape) or any(begin < 0 for begin in start):
                    raise ValueError(f"the place of {name} makes no sense")
                self._pieces.setdefault(name, []).append((file, start, shape))
                dtype = _DTYPES[block.get_dtype()]
                if self._dtypes.setdefault(name, dtype) != dtype:
                    raise ValueError(f"the pieces of {name} differ in type")

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """Open all files of a checkpoint's folder.

        Raises:
            OSError: there is none. As the constructor.
        """
        paths = sorted(path for path in folder.iterdir() if FILE_NAME.fullmatch(path.name))
        if not paths:
            raise FileNotFoundError(f"no tensors are in {folder}")
        return cls(paths)

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""
        ends = [[begin + size for begin, size in zip(start, shape, strict=True)]
                for _, start, shape in self._pieces[name]]
        return tuple(map(max, zip(*ends, strict=True)))

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.read(name, (0,) * len(shape), shape)

    def read(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Return a block of a tensor, from whichever pieces hold it; only the block is read.

        Raises:
            ValueError: the pieces do not cover it.
        """
        pieces = self._pieces[name]
        if sum(math.prod(size) for _, _, size in pieces) < math.prod(shape):  # before memory is taken for it
            raise ValueError(f"parts of {name} are missing")
        target = torch.empty(shape, dtype=self._dtypes[name])
        filled = 0
        for file, begin, size in pieces:
            first = [max(s, b) for s, b in zip(start, begin, strict=True)]
            last = [min(s + n, b + m) for s, n, b, m in zip(start, shape, begin, size, strict=True)]
            if any(f >= e for f, e in zip(first, last, strict=True)):
                continue
            source = tuple(slice(f - b, e - b) for f, e, b in zip(first, last, begin, strict=True))
            place = tuple(slice(f - s, e - s) for f, e, s in zip(first, last, start, strict=True))
            target[place] = file.get_slice(name)[source] if source else file.get_tensor(name)
            filled += math.prod(e - f for f, e in zip(first, last, strict=True))
        if filled != target.numel():
            raise ValueError(f"parts of {name} are missing")
        return target

    @torch.no_grad()
    def fill(self, name: str, target: Tensor) -> None:
        """Write a stored tensor into `target`; a sharded target takes its own part alone.

        Raises:
            CheckpointError: no such tensor here, of this shape, or its pieces are damaged.
        """
        if name not in self._pieces:
            raise CheckpointError(f"there is no '{name}' in it")
        if self.shape(name) != tuple(target.shape):
            raise CheckpointError(f"'{name}' is {list(self.shape(name))} in it and {list(target.shape)} here")
        part = region(target)
        try:
            if part is not None:
                part.tensor.copy_(self.read(name, part.start, tuple(part.tensor.shape)))
            else:
                whole = target.to_local() if isinstance(target, DTensor) else target
                whole.copy_(self[name])
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"'{name}' cannot be read: {error}") from error


def _starts(text: str) -> dict[str, tuple[int, ...]]:
    """Return where in its tensor each piece of a file begins.

    Raises:
        ValueError: whatever else stands there.
    """
    try:
        return {name: tuple(map(int, place[_OFFSETS])) for name, place in json.loads(text).items()}
    except (TypeError, AttributeError, KeyError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"the places of its tensors make no sense: {error}") from error


def _bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's memory; of bf16 too, which numpy has not."""
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _write_all(file: Any, block: bytes | memoryview) -> None:
    """Write a block whole: the system may take less at a time."""
    left = memoryview(block)
    while left:
        left = left[file.write(left[:_BLOCK]):]
