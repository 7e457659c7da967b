"""A rank's share of an evaluation over an iterable data set."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, default_collate

from ddp_kit.data.dataset import Data
from ddp_kit.data.iterable import Keyed, Samples
from ddp_kit.data.odd_samples import collated
from ddp_kit.data.reader import MicroBatch, Request
from ddp_kit.data.seeding import Purpose

# Samples that are read under one seed, at any micro-batch and number of ranks.
EVALUATION_RUN = 64


class EvaluationStream(IterableDataset[MicroBatch]):
    """A rank's micro-batches of an evaluation over an iterable data set: every world_size-th.

    Each sample is read once over all ranks. All ranks have the same number of micro-batches: those
    without one more repeat the stream's first sample, marked as padding.
    """

    def __init__(
        self,
        data: Data,
        *,
        micro_batch: int,
        rank: int,
        world_size: int,
        what: str = "evaluation data",
    ):
        """Args: `what` data it is, in words, for errors."""
        super().__init__()
        self._data = data
        self._what = what
        self._size = micro_batch
        self._rank = rank
        self._world_size = world_size
        self._collate = data.collate or default_collate

    def __iter__(self) -> Iterator[MicroBatch]:
        keyed = Keyed(0)
        spare: list[Any] = []
        blocks = 0
        for block in self._blocks(keyed):
            spare = spare or block[:1]
            if blocks % self._world_size == self._rank:
                yield self._answer(block, blocks, keyed)
            blocks += 1
        ranks_with_one_more = blocks % self._world_size
        if ranks_with_one_more and self._rank >= ranks_with_one_more:
            request = Request(0, 0, blocks, np.zeros(1, dtype=np.int64), is_padding=True)
            yield MicroBatch(request, self._answer(spare, blocks, keyed).batch)

    def _blocks(self, keyed: Keyed) -> Iterator[list[Any]]:
        """Yields the samples of each micro-batch of all ranks, in order."""
        block: list[Any] = []
        for sample in self._samples(keyed):
            block.append(sample)
            if len(block) == self._size:
                yield block
                block = []
        if block:
            yield block

    def _samples(self, keyed: Keyed) -> Iterator[Any]:
        samples = Samples(self._data, keyed=keyed, epoch=0)
        while True:
            with samples.run(EVALUATION_RUN) as run:
                found = list(run)
            yield from found
            if len(found) < EVALUATION_RUN:
                return

    def _answer(self, samples: list[Any], block: int, keyed: Keyed) -> MicroBatch:
        first = block * self._size
        request = Request(0, 0, block, np.arange(first, first + len(samples)))
        if self._data.collate is None:
            return MicroBatch(request, self._batch(request, samples))
        with keyed.by(Purpose.BATCH, 0, first):
            return MicroBatch(request, self._batch(request, samples))

    def _batch(self, request: Request, samples: list[Any]) -> Any:
        return collated(samples, self._collate, indices=request.indices, what=self._what)
