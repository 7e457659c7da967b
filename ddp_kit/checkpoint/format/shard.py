"""A rank's shard: its header, written, and read without trust.

A shard is a safetensors file (source: the format's description in the safetensors repository): 8
bytes with the header's length, little end first, the header as JSON padded with spaces, then the
bytes of the tensors without gaps. Its `__metadata__` says at which row of the whole tensor each
piece begins.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import torch

from ddp_kit.checkpoint.format.layout import DTYPES, NAMES, DamagedError, parse_json, read_exactly
from ddp_kit.checkpoint.format.sharding import Piece, Shape
from ddp_kit.checkpoint.format.storage import PAGE
from ddp_kit.errors import ConfigError

HEADER_LIMIT = 64 << 20  # bytes that are read before anything is known about a file
MOST_DIMENSIONS = 64
# Safetensors does not have it: a shard holds F64, with the real and the imaginary part in a last
# dimension.
PAIRED = "C128"


@dataclass(frozen=True)
class Stored:
    """A piece in a shard: where its bytes begin in the file, its dtype and shape (of the piece)."""

    piece: Piece
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def unpaired(self) -> "Stored":
        """Returns the piece as the complex numbers whose parts it holds; itself if it cannot be
        that.
        """
        if self.dtype != torch.float64 or self.shape[-1:] != (2,):
            return self
        shape = self.shape[:-1]
        stop = self.piece.stop if shape else self.piece.start + 1
        piece = replace(self.piece, stop=stop)
        return replace(self, dtype=torch.complex128, shape=shape, piece=piece)


def shard_header(
    pieces: Sequence[Piece], shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]
) -> tuple[bytes, list[Stored]]:
    """Returns the bytes before the tensors, a whole number of pages, and where each piece goes;
    larger elements first: all are aligned.

    Raises: ConfigError for more tensors than a header may tell of.
    """
    entries: dict[str, Any] = {"__metadata__": {piece.name: str(piece.start) for piece in pieces}}
    stored = []  # with offsets behind the header, whose size is not known yet
    at = 0
    for piece in sorted(pieces, key=lambda piece: -shapes[piece.name].itemsize):
        whole = shapes[piece.name]
        dtype = dtypes[piece.name]
        shape: tuple[int, ...] = ()
        if whole.shape:
            shape = (piece.stop - piece.start, *whole.shape[1:])
        nbytes = Shape(shape, whole.itemsize).nbytes
        entry = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + nbytes],
        }
        if NAMES[dtype] == PAIRED:
            entry["dtype"] = "F64"
            entry["shape"] = [*shape, 2]
        entries[piece.name] = entry
        stored.append(Stored(piece, at, nbytes, dtype, shape))
        at += nbytes
    text = json.dumps(entries).encode()
    if len(text) > HEADER_LIMIT:
        raise ConfigError(
            f"the header of a shard would have {len(text)} bytes for {len(pieces)} tensors, and "
            f"{HEADER_LIMIT} are read at most. Save with more ranks, or keep many small tensors as "
            "one."
        )
    pages = -(-(8 + len(text)) // PAGE)
    size = pages * PAGE
    header = (size - 8).to_bytes(8, "little") + text.ljust(size - 8)
    return header, [replace(item, offset=size + item.offset) for item in stored]


def read_header(file: BinaryIO, *, size: int, name: str) -> list[Stored]:
    """Returns what a safetensors file of `size` bytes holds; a plain one, without row numbers,
    holds whole tensors.

    Raises: DamagedError if the header does not describe exactly this file.
    """
    length = int.from_bytes(read_exactly(file, 8, name=name), "little")
    if length > min(size - 8, HEADER_LIMIT):
        raise DamagedError(f"{name}: its header claims {length} bytes")
    entries = parse_json(read_exactly(file, length, name=name), name)
    starts = entries.pop("__metadata__", {})
    data = 8 + length
    stored = [_entry(key, entry, starts, data=data, name=name) for key, entry in entries.items()]
    at = data
    for item in sorted(stored, key=lambda item: (item.offset, item.nbytes)):
        if item.offset != at:
            raise DamagedError(
                f"{name}: its tensors overlap or leave gaps at {item.piece.name[:80]}"
            )
        at += item.nbytes
    if at != size:
        raise DamagedError(f"{name}: its tensors end at {at}, the file at {size}")
    return stored


def _entry(key: str, entry: Any, starts: Any, *, data: int, name: str) -> Stored:
    """Returns what a header says of a tensor; `data` is where the tensors begin in the file.

    Raises: DamagedError if that cannot be, in whichever way.
    """
    try:
        dtype = DTYPES[entry["dtype"]]
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        start = _first_row(key, starts)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{name}: bad entry for {key[:80]}") from error
    sizes = (*shape, begin, end, start)
    if (
        not all(map(_is_size, sizes))
        or len(shape) > MOST_DIMENSIONS
        or end - begin != Shape(shape, dtype.itemsize).nbytes
    ):
        raise DamagedError(f"{name}: shape and size of {key[:80]} disagree")
    rows = shape[0] if shape else 1
    return Stored(Piece(key, start, start + rows), data + begin, end - begin, dtype, shape)


def _first_row(key: str, starts: Any) -> int:
    """Returns the row of the whole tensor at which a piece begins; 0 if the file does not say so,
    as a plain one does not. Raises: ValueError if it is no number after all.
    """
    if isinstance(starts, dict) and str(starts.get(key, "")).isdecimal():
        return int(starts[key])
    return 0


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62
