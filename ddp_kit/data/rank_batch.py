"""One rank's part of one global batch, put together from micro-batches as they come."""

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ddp_kit.data.reader import MicroBatch
from ddp_kit.distributed.pulse import Pulse


class RankBatch(NamedTuple):
    """One rank's part of one global batch: what one optimizer step consumes.

    `step` counts the steps before this one; `wait_s` is the time the training process waited for
    it.
    """

    step: int
    epoch: int
    micro_batches: list[MicroBatch]
    wait_s: float = 0.0


def grouped(
    micro_batches: Iterable[MicroBatch], *, per_step: int, pulse: Pulse, start: int
) -> Iterator[RankBatch]:
    """Yields each step's micro-batches together, from step `start` on, with the time waited."""
    of_step: list[MicroBatch] = []
    pulse.begin_step(start + 1)
    begin = time.perf_counter()
    for micro_batch in micro_batches:
        of_step.append(micro_batch)
        if len(of_step) == per_step:
            request = of_step[0].request
            yield RankBatch(request.step, request.epoch, of_step, time.perf_counter() - begin)
            of_step = []
            pulse.begin_step(request.step + 2)
            begin = time.perf_counter()
