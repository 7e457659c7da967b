"""Sums over ranks along the fixed tree, in place of an all-reduce, whose order depends on the number of ranks.

Owns: a process group of its own, and the one thread that communicates on it while backward goes on.
Refuses: waiting where it is called, which is inside DDP's hook: that would hold up backward.

Each rank owns 1/W of a buffer, gets that slice from all, folds it and sends it back: the bytes of an all-reduce. Small buffers travel
whole, in one round. A CUDA rank does the same on a stream of its own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
import torch.distributed as dist

from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.tree_sum import fold

WHOLE = (
    1 << 21
)  # bytes over all ranks up to which a buffer travels whole; measured on gloo, where a round costs 0.15 to 0.5 ms
Future = torch.futures.Future[torch.Tensor]
Job = tuple[Callable[[], None], torch.Tensor, Future, "torch.cuda.Event | None"]


@final
class Exchange:
    """Sums buffers over ranks, one at a time, in the order in which they come; that order must be the same on all ranks."""

    def __init__(self, group: Group):
        """Every rank calls it. The thread ends, and the process group is let go of, as the group closes."""
        self._group: dist.ProcessGroup | None = group.join_another()
        self._rank, self._world_size, self._device = group.rank, group.world_size, group.device
        self._stream = torch.cuda.Stream(group.device) if group.device.type == "cuda" else None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        self._thread = threading.Thread(
            target=self._work, name="ddp_kit exchange", daemon=True
        )  # a peer may keep it waiting for ever
        self._thread.start()
        group.closing.callback(self._close)

    def sum(self, buffer: torch.Tensor, *, before: Callable[[], None]) -> Future:
        """Returns a future of `buffer` holding the sum over ranks. `before` is called first, on the other thread."""
        future = torch.futures.Future[torch.Tensor](
            devices=None if self._stream is None else [self._device]
        )
        event = None if self._stream is None else torch.cuda.current_stream().record_event()
        self._jobs.put((before, buffer, future, event))
        return future

    def check(self) -> None:
        """Raises: the error of an exchange that failed. DDP would turn it into one that says nothing of a lost peer."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            before, buffer, future, event = job
            with self._on_stream(event):
                try:
                    if self._error is None:
                        before()
                        self._sum(buffer)
                except (
                    Exception
                ) as error:  # raised again by `check`, on the thread that waits for the future
                    self._error = error
                future.set_result(buffer)

    def _on_stream(self, event: torch.cuda.Event | None) -> AbstractContextManager[object]:
        if self._stream is None or event is None:
            return nullcontext()
        self._stream.wait_event(event)
        return torch.cuda.stream(self._stream)

    def _sum(self, buffer: torch.Tensor) -> None:
        if buffer.nbytes * self._world_size <= WHOLE:
            self._fold([buffer] * self._world_size)
            return
        slices = buffer.tensor_split(self._world_size)
        self._fold(slices)
        self._trade(send=[slices[self._rank]] * self._world_size, receive=slices)

    def _fold(self, slices: Sequence[torch.Tensor]) -> None:
        """Sends each rank its slice, and folds what all have of this rank's own into it."""
        own = slices[self._rank]
        scratch = self._room(own, count=self._world_size - 1)
        parts = [*scratch[: self._rank], own, *scratch[self._rank :]]
        self._trade(send=slices, receive=parts)
        total = fold(parts)
        if total is not own:
            own.copy_(total)

    def _trade(self, *, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor]) -> None:
        peers = [rank for rank in range(self._world_size) if rank != self._rank]
        if self._stream is None:
            works: list[dist.Work | None] = [
                dist.irecv(receive[peer], peer, group=self._group) for peer in peers
            ]
            works += [dist.isend(send[peer], peer, group=self._group) for peer in peers]
        else:  # NCCL would wait for ever unless it gets them all at once
            operations = [
                dist.P2POp(dist.irecv, receive[peer], peer, self._group) for peer in peers
            ]
            operations += [dist.P2POp(dist.isend, send[peer], peer, self._group) for peer in peers]
            works = [*dist.batch_isend_irecv(operations)]
        for work in works:
            assert work is not None  # every rank is in the group
            work.wait()

    def _room(self, like: torch.Tensor, *, count: int) -> list[torch.Tensor]:
        """Returns `count` tensors of the size of one, in memory that is kept."""
        size = like.numel()
        kept = self._scratch.get(like.dtype)
        if kept is None or kept.numel() < size * count:
            kept = self._scratch[like.dtype] = like.new_empty(size * count)
        return list(kept[: size * count].view(count, size))

    def _close(self) -> None:
        self._jobs.put(None)
        self._thread.join(timeout=1)
        self._group = None
