"""Batches on the device, on CUDA one ahead of the step."""

from collections.abc import Iterable, Iterator

import torch

from ddp_kit.data.reader import MicroBatch
from ddp_kit.data.transfer import Placement, has_cuda_tensors, map_tensors


def placed(micro_batches: Iterable[MicroBatch], placement: Placement) -> Iterator[MicroBatch]:
    """Yields micro-batches on the device; on CUDA through pinned memory and a stream of its own, one ahead.

    What a data set has put on the device itself stays in the stream that made it.
    """
    if placement.device.type != "cuda":
        for micro_batch in micro_batches:
            yield (
                MicroBatch(micro_batch.request, placement(micro_batch.batch))
                if placement.is_needed
                else micro_batch
            )
        return
    stream = torch.cuda.Stream(placement.device)
    ahead: tuple[MicroBatch, torch.cuda.Event] | None = None
    for micro_batch in micro_batches:
        if has_cuda_tensors(micro_batch.batch):
            yield MicroBatch(micro_batch.request, placement(micro_batch.batch))
            continue
        with torch.cuda.stream(stream):
            copied = placement(map_tensors(micro_batch.batch, torch.Tensor.pin_memory))
            done = stream.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = MicroBatch(micro_batch.request, copied), done
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(micro_batch: MicroBatch, done: "torch.cuda.Event") -> MicroBatch:
    """Makes the device's main stream wait for the copy (no host wait), and keeps the memory until that stream has used it."""
    current = torch.cuda.current_stream()
    current.wait_event(done)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(current)
        return tensor

    return MicroBatch(micro_batch.request, map_tensors(micro_batch.batch, keep))
