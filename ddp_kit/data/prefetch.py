"""Micro-batches on the device; on CUDA the copy of one runs while the one before it is used."""

from collections.abc import Iterable, Iterator

import torch

from ddp_kit.data.reader import MicroBatch
from ddp_kit.data.transfer import Placement, map_tensors, stays_in_stream


def on_device(micro_batches: Iterable[MicroBatch], placement: Placement) -> Iterator[MicroBatch]:
    """Yields micro-batches on the device, one ahead on CUDA."""
    if placement.device.type == "cuda":
        yield from _one_ahead(micro_batches, placement)
    elif placement.is_needed:
        for micro_batch in micro_batches:
            yield MicroBatch(micro_batch.request, placement(micro_batch.batch))
    else:
        yield from micro_batches


def _one_ahead(micro_batches: Iterable[MicroBatch], placement: Placement) -> Iterator[MicroBatch]:
    """Copies through pinned memory and a CUDA stream of its own.

    What a data set has put on the device itself stays in the stream that made it, and what moves
    itself moves in the stream that uses it.
    """
    stream = torch.cuda.Stream(placement.device)
    ahead: tuple[MicroBatch, torch.cuda.Event] | None = None
    for micro_batch in micro_batches:
        if stays_in_stream(micro_batch.batch):
            if ahead is not None:
                yield _arrived(*ahead)
                ahead = None
            yield MicroBatch(micro_batch.request, placement(micro_batch.batch))
            continue
        with torch.cuda.stream(stream):
            copied = placement(map_tensors(micro_batch.batch, torch.Tensor.pin_memory))
            done = stream.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = (MicroBatch(micro_batch.request, copied), done)
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(micro_batch: MicroBatch, done: "torch.cuda.Event") -> MicroBatch:
    """Makes the device's main stream wait for the copy, and keeps the memory until it is used."""
    current = torch.cuda.current_stream()
    current.wait_event(done)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(current)
        return tensor

    return MicroBatch(micro_batch.request, map_tensors(micro_batch.batch, keep))
