"""The copy of a rank's own shard: all that training waits for.

One buffer is reused, page-aligned and touched beforehand, laid out as the file will be. Call
`reserve` once the optimizer has its state: then it need not grow while training waits.
"""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ddp_kit.checkpoint.format.shard import shard_header
from ddp_kit.checkpoint.format.sharding import Piece, Shape, cut
from ddp_kit.distributed.local_shard import Held

NONE: Mapping[str, Held] = {}


@dataclass
class Copied:
    """A shard in host memory. On CUDA the bytes are there only once `ready` has happened."""

    content: memoryview
    ready: "torch.cuda.Event | None" = None


class Staging:
    """A rank's buffer for its shard."""

    def __init__(self, *, rank: int, world_size: int, device: torch.device):
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._kinds: list[tuple[object, ...]] = []  # of the tensors that the buffer is laid out for
        self._places: list[tuple[Piece, torch.Tensor]] = []
        self._size = 0

    def reserve(self, tensors: Mapping[str, torch.Tensor], own: Mapping[str, Held] = NONE) -> None:
        """Lays the buffer out for this rank's part of `tensors` and what it has of its `own`,
        unless it is, and touches it: fresh memory is six times slower to write.

        The header takes longer than the copy where tensors are many and small: training waits for
        neither if this was called before.
        """
        kinds = _kinds_of(tensors, own)
        if kinds == self._kinds:
            return
        # Until the new layout is whole there is none.
        self._kinds = []
        shapes = {}
        dtypes = {}
        for name, tensor in tensors.items():
            shapes[name] = Shape(tuple(tensor.shape), tensor.dtype.itemsize)
            dtypes[name] = tensor.dtype
        pieces = cut(shapes, rank=self._rank, world_size=self._world_size)
        for name, part in own.items():
            shapes[name] = Shape(part.shape, part.rows.dtype.itemsize)
            dtypes[name] = part.rows.dtype
            if part.writes and part.start < part.stop:
                pieces.append(Piece(name, part.start, part.stop))
        header, stored = shard_header(pieces, shapes, dtypes)
        self._size = len(header) + sum(item.nbytes for item in stored)
        self._make_room(self._size)
        self._buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        places = []
        for item in stored:
            content = self._buffer[item.offset : item.offset + item.nbytes]
            places.append((item.piece, content.view(item.dtype).view(item.shape)))
        self._kinds = kinds
        self._places = places

    def _make_room(self, size: int) -> None:
        if self._buffer.numel() >= size:
            return
        # The old one goes first: there is room for one.
        self._places = []
        self._buffer = torch.empty(0, dtype=torch.uint8)
        if self._stream is not None:
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            return
        memory = mmap.mmap(-1, size)  # begins on a page boundary, as O_DIRECT wants it
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._buffer = torch.frombuffer(memory, dtype=torch.uint8)
        self._buffer.zero_()

    @torch.no_grad()
    def copy(
        self,
        tensors: Mapping[str, torch.Tensor],
        own: Mapping[str, Held] = NONE,
        *,
        first: Mapping[str, torch.Tensor],
    ) -> Copied:
        """Copies this rank's part of `tensors`, and its `own`. On CUDA it only starts the copies,
        after what the current stream has still to do, and makes that stream wait for those of
        `first` (buffers, which the next forward pass changes).
        """
        self.reserve(tensors, own)
        # NumPy's stubs lack the buffer protocol before Python 3.12.
        whole = memoryview(self._buffer.numpy())  # type: ignore[arg-type]
        content = whole[: self._size]
        early = [place for place in self._places if place[0].name in first]
        late = [place for place in self._places if place[0].name not in first]
        if self._stream is None:
            _copy_all([*early, *late], tensors, own)
            return Copied(content)
        training = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            _copy_all(early, tensors, own)
            training.wait_event(self._stream.record_event())
            _copy_all(late, tensors, own)
            return Copied(content, self._stream.record_event())


def _kinds_of(
    tensors: Mapping[str, torch.Tensor], own: Mapping[str, Held]
) -> list[tuple[object, ...]]:
    """Returns what the layout of a buffer depends on."""
    kinds: list[tuple[object, ...]] = []
    for name, tensor in tensors.items():
        kinds.append((name, tensor.shape, tensor.dtype))
    for name, item in own.items():
        rows = len(item.rows) if item.shape else 1
        kinds.append((name, item.shape, item.rows.dtype, item.start, rows))
    return kinds


def _copy_all(
    places: Sequence[tuple[Piece, torch.Tensor]],
    tensors: Mapping[str, torch.Tensor],
    own: Mapping[str, Held],
) -> None:
    for piece, place in places:
        if piece.name in own:
            place.copy_(own[piece.name].rows, non_blocking=True)
            continue
        rows = tensors[piece.name]
        if rows.dim():
            rows = rows[piece.start : piece.stop]
        place.copy_(rows, non_blocking=True)
