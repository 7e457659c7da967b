"""A loader of one's own in place of a feed."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ddp_kit.data.rank_batch import RankBatch
from ddp_kit.data.reader import MicroBatch, Request
from ddp_kit.distributed.process_group import Group


def batches_of(loader: Iterable[Any], *, group: Group, size: int) -> Iterator[RankBatch]:
    """Yields what a loader of one's own has read as this rank's part of global batches.

    That is one micro-batch of `size` samples a step. The loader answers for order, shares and
    placement; samples are named by their place in the batch.
    """
    indices = np.arange(size)
    group.pulse.begin_step(1)
    begin = time.perf_counter()
    for step, batch in enumerate(loader):
        request = Request(step, 0, group.rank, indices)
        yield RankBatch(step, 0, [MicroBatch(request, batch)], time.perf_counter() - begin)
        group.pulse.begin_step(step + 2)
        begin = time.perf_counter()
