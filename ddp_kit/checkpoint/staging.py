"""The copy of a rank's own shard: all that training waits for.

Owns: one buffer that is reused, page-aligned and touched beforehand, laid out as the file will be.
Refuses: growing while training waits where that can be foreseen: call `reserve` once the optimizer has its state.
"""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ddp_kit.checkpoint.layout import Stored, shard_header
from ddp_kit.checkpoint.sharding import Shape, cut


@dataclass
class Copied:
    """A shard in host memory. On CUDA the bytes are there only once `ready` has happened."""

    content: memoryview
    ready: "torch.cuda.Event | None" = None


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    """Returns shapes and element sizes by name."""
    return {name: Shape(tuple(tensor.shape), tensor.element_size()) for name, tensor in tensors.items()}


class Staging:
    """A rank's buffer for its shard."""

    def __init__(self, *, rank: int, world_size: int, device: torch.device):
        self._rank, self._world_size, self._device = rank, world_size, device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def reserve(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Makes room for this rank's part of `tensors` and touches it: fresh memory is six times slower to write."""
        shapes = shapes_of(tensors)
        pieces = cut(shapes, rank=self._rank, world_size=self._world_size)
        header, stored = shard_header(pieces, shapes, {name: tensor.dtype for name, tensor in tensors.items()})
        self._make_room(len(header) + sum(item.nbytes for item in stored))

    def _make_room(self, size: int) -> None:
        if self._buffer.numel() >= size:
            return
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
    def copy(self, tensors: Mapping[str, torch.Tensor], *, first: Mapping[str, torch.Tensor]) -> Copied:
        """Copies this rank's part of `tensors`. On CUDA it only starts the copies, after what the current stream has still to do, and
        makes that stream wait for those of `first` (buffers, which the next forward pass changes).
        """
        shapes = shapes_of(tensors)
        pieces = cut(shapes, rank=self._rank, world_size=self._world_size)
        header, stored = shard_header(pieces, shapes, {name: tensor.dtype for name, tensor in tensors.items()})
        size = len(header) + sum(item.nbytes for item in stored)
        self._make_room(size)
        self._buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        early = [item for item in stored if item.piece.name in first]
        late = [item for item in stored if item.piece.name not in first]
        content = memoryview(self._buffer.numpy())[:size]  # type: ignore[arg-type]  # NumPy's stubs lack the buffer protocol before Python 3.12
        if self._stream is None:
            self._copy_all([*early, *late], tensors)
            return Copied(content)
        training = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            self._copy_all(early, tensors)
            training.wait_event(self._stream.record_event())
            self._copy_all(late, tensors)
            return Copied(content, self._stream.record_event())

    def _copy_all(self, items: Sequence[Stored], tensors: Mapping[str, torch.Tensor]) -> None:
        for item in items:
            tensor = tensors[item.piece.name]
            rows = tensor[item.piece.start : item.piece.stop] if tensor.dim() else tensor
            place = self._buffer[item.offset : item.offset + item.nbytes]
            place.view(item.dtype).view(item.shape).copy_(rows, non_blocking=True)
