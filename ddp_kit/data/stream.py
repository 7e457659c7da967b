"""Iterable data sets: every rank and worker reads the stream from its start and keeps its share.

Owns: cutting a stream into the same global batches for every split.
Refuses: promises it cannot keep. Weaker than a map-style data set: each reader pays for the whole stream, starting later replays it,
and the stream must be the same for every reader (`set_epoch(epoch)` is called where the data set has it). A data set with a state of its
own (`state_dict`, `load_state_dict`, plain data) is not replayed: a checkpoint holds its state on each rank, for the same number of ranks.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from ddp_kit.batching import BatchPlan
from ddp_kit.data.data import Data
from ddp_kit.data.reader import MicroBatch, Request
from ddp_kit.errors import DataError
from ddp_kit.seeding import Draws, Purpose, generators_put_back, key, seed_generators


@dataclass(frozen=True)
class Place:
    """Where a stream stands: its epoch, the position of the next sample in it, and the data set's own state (None: its start)."""

    epoch: int = 0
    position: int = 0
    state: Any = None


class Course:
    """The places of a stream after the last few global batches: a loader may have read ahead of training."""

    def __init__(self) -> None:
        self.begin: Place | None = None  # from which a resumed life reads on
        self.after: dict[int, Place] = {}  # steps done -> place

    def note(self, steps: int, place: Place) -> None:
        """Notes where the stream stands once the batches of `steps` steps are read."""
        self.after[steps] = place
        self.after.pop(steps - 8, None)


def is_stateful(dataset: Any) -> bool:
    """Whether an iterable data set keeps its own state."""
    return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")


def _samples(data: Data, *, seed: int, epoch: int, begin: Place = Place()) -> Iterator[Any]:
    """Yields the samples of an epoch from a place on, each read under generators keyed by its position."""
    set_epoch = getattr(data.dataset, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    if begin.state is not None:
        data.dataset.load_state_dict(begin.state)
    samples = iter(data.dataset)
    position = begin.position
    while True:
        with generators_put_back():
            seed_generators(key(seed, Purpose.STREAM, epoch, position))
            try:
                sample = next(samples)
            except StopIteration:
                return
        yield sample
        position += 1


class TrainingStream(IterableDataset[MicroBatch]):
    """This rank's micro-batches of a run over an iterable data set; in a loader worker, every n-th of them."""

    def __init__(self, data: Data, *, plan: BatchPlan, rank: int, seed: int, start: int, end: int, course: Course | None = None):
        """Args: `course` of a data set with a state of its own."""
        super().__init__()
        self._course = course
        self._data, self._plan, self._seed, self._start, self._end = data, plan, seed, start, end
        self._runs = plan.of_rank(rank)
        self._collate = data.collate or default_collate

    def __iter__(self) -> Iterator[MicroBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        taken = 0
        for step, epoch, first, samples in self._global_batches():
            for index, start, stop in self._runs:
                if taken % workers == worker and step >= self._start:
                    own = samples[start - self._runs[0][1] : stop - self._runs[0][1]]
                    yield self._micro_batch(Request(step, epoch, index, np.arange(first + start, first + stop)), own)
                taken += step >= self._start

    def _global_batches(self) -> Iterator[tuple[int, int, int, list[Any]]]:
        """Yields (step, epoch, position of the global batch in the stream, this rank's samples); a ragged tail is dropped."""
        begin, finish = self._runs[0][1], self._runs[-1][2]
        place = self._course.begin if self._course is not None and self._course.begin is not None else Place()
        step = 0 if place == Place() else self._start
        epoch = place.epoch
        while step < self._end:
            size, kept, before = 0, [], step
            for position, sample in enumerate(_samples(self._data, seed=self._seed, epoch=epoch, begin=place), place.position):
                if begin <= size < finish:
                    kept.append(sample)
                size += 1
                if size == self._plan.global_batch:
                    if self._course is not None:
                        self._course.note(step + 1, Place(epoch, position + 1, copy.deepcopy(self._data.dataset.state_dict())))
                    yield step, epoch, position + 1 - size, kept
                    step, size, kept = step + 1, 0, []
                    if step >= self._end:
                        return
            if step == before and not place.position:
                raise DataError(
                    f"the training stream ended after {size} samples, less than one global batch of {self._plan.global_batch}. "
                    "Type a smaller --global-batch, or give the stream more samples."
                )
            epoch, place = epoch + 1, Place()

    def _micro_batch(self, request: Request, samples: list[Any]) -> MicroBatch:
        with generators_put_back():
            seed_generators(key(self._seed, Purpose.BATCH, request.epoch, int(request.indices[0])))
            batch = self._collate(samples)
            if self._data.augment is not None:
                batch = self._data.augment(batch, Draws(self._seed, request.epoch, request.indices))
        return MicroBatch(request, batch)


def evaluation_stream(data: Data, *, micro_batch: int, rank: int, world_size: int) -> Iterator[MicroBatch]:
    """Yields a rank's micro-batches of an evaluation over an iterable data set: every world_size-th, each sample once.

    All ranks yield the same number: those without one more repeat the stream's first sample, marked as padding.
    """
    collate = data.collate or default_collate
    spare: list[Any] = []
    block: list[Any] = []
    blocks = 0

    def answer(samples: list[Any], first: int) -> MicroBatch:
        return MicroBatch(Request(0, 0, blocks, np.arange(first, first + len(samples))), collate(samples))

    position = -1
    for position, sample in enumerate(_samples(data, seed=0, epoch=0)):
        if not spare:
            spare = [sample]
        block.append(sample)
        if len(block) == micro_batch:
            if blocks % world_size == rank:
                yield answer(block, position + 1 - len(block))
            block, blocks = [], blocks + 1
    if block:
        if blocks % world_size == rank:
            yield answer(block, position + 1 - len(block))
        blocks += 1
    if blocks % world_size and rank >= blocks % world_size:
        yield MicroBatch(Request(0, 0, blocks, np.zeros(1, dtype=np.int64), is_padding=True), collate(spare))
