"""Iterable data sets: every rank and worker reads the stream from its start and keeps its share.

Owns: cutting a stream into the same global batches for every split.
Refuses: promises it cannot keep. Weaker than a map-style data set: each reader pays for the whole stream, starting later replays it,
and the stream must be the same for every reader (`set_epoch(epoch)` is called where the data set has it). A data set with a state of its
own (`state_dict`, `load_state_dict`, plain data) is not replayed: a checkpoint holds its state on each rank, for the same number of ranks.
"""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from ddp_kit.data.batch_plan import BatchPlan
from ddp_kit.data.dataset import Data
from ddp_kit.data.reader import MicroBatch, Request
from ddp_kit.data.seeding import Draws, Purpose, generators_aside, key, seed_generators
from ddp_kit.errors import DataError

EVALUATION_RUN = 64  # samples of an evaluation that are read under one seed, at any micro-batch and number of ranks


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


class Keyed:
    """Default generators seeded for a piece of a stream's code; the training process has its own back afterwards."""

    def __init__(self, seed: int):
        """Hides from the data set that it is read in a loader worker: a stream that shares itself out by `get_worker_info()`, as
        torch's documentation shows, would be shared out twice. The worker is this stream's alone."""
        self.seed = seed
        self._is_worker = get_worker_info() is not None
        self._numpy = np.random.MT19937(0)
        torch_worker._worker_info = None

    @contextmanager
    def by(self, purpose: Purpose, epoch: int, position: int) -> Iterator[None]:
        """Seeds the generators while it lasts."""
        value = key(self.seed, purpose, epoch, position)
        if self._is_worker:  # nobody else draws in it
            seed_generators(value)
            yield
            return
        with generators_aside(self._numpy):
            seed_generators(value)
            yield


class Samples:
    """The samples of one epoch of a stream from a place on, read a run of them at a time.

    A stream cannot be read again, so its generators are seeded once a run, by the position of the first sample: runs must begin at the
    same positions for every reader.
    """

    def __init__(self, data: Data, *, keyed: Keyed, epoch: int, begin: Place = Place()):
        self._dataset, self._keyed, self._epoch, self._begin = data.dataset, keyed, epoch, begin
        self._samples: Iterator[Any] | None = None
        self.position = begin.position  # of the next sample

    @contextmanager
    def run(self, size: int) -> Iterator[Iterator[Any]]:
        """Yields the next `size` samples, fewer at the stream's end."""
        with self._keyed.by(Purpose.STREAM, self._epoch, self.position):
            if self._samples is None:
                self._samples = self._started()
            yield self._counted(itertools.islice(self._samples, size))

    def _started(self) -> Iterator[Any]:
        set_epoch = getattr(self._dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self._epoch)
        if self._begin.state is not None:
            self._dataset.load_state_dict(self._begin.state)
        return iter(self._dataset)

    def _counted(self, samples: Iterator[Any]) -> Iterator[Any]:
        for sample in samples:
            self.position += 1
            yield sample


class TrainingStream(IterableDataset[MicroBatch]):
    """This rank's micro-batches of a run over an iterable data set; in a loader worker, every n-th of them."""

    def __init__(
        self,
        data: Data,
        *,
        plan: BatchPlan,
        rank: int,
        seed: int,
        start: int,
        end: int,
        course: Course | None = None,
    ):
        """Args: `course` of a data set with a state of its own."""
        super().__init__()
        self._course = course
        self._data, self._plan, self._seed, self._start, self._end = data, plan, seed, start, end
        self._runs = plan.of_rank(rank)
        self._collate = data.collate or default_collate
        self._may_draw = data.collate is not None or data.augment is not None

    def __iter__(self) -> Iterator[MicroBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        keyed = Keyed(self._seed)
        taken = 0
        for step, epoch, first, samples in self._global_batches(keyed):
            for index, start, stop in self._runs:
                if taken % workers == worker and step >= self._start:
                    own = samples[start - self._runs[0][1] : stop - self._runs[0][1]]
                    yield self._micro_batch(
                        Request(step, epoch, index, np.arange(first + start, first + stop)),
                        own,
                        keyed,
                    )
                taken += step >= self._start

    def _global_batches(self, keyed: Keyed) -> Iterator[tuple[int, int, int, list[Any]]]:
        """Yields (step, epoch, position of the global batch in the stream, this rank's samples); a ragged tail is dropped."""
        place = (
            self._course.begin
            if self._course is not None and self._course.begin is not None
            else Place()
        )
        step = 0 if place == Place() else self._start
        epoch = place.epoch
        while step < self._end:
            samples, before = Samples(self._data, keyed=keyed, epoch=epoch, begin=place), step
            while step < self._end:
                first = samples.position
                kept = self._own_of(samples)
                if samples.position - first < self._plan.global_batch:
                    break
                if self._course is not None:
                    state = copy.deepcopy(self._data.dataset.state_dict())
                    self._course.note(step + 1, Place(epoch, samples.position, state))
                yield step, epoch, first, kept
                step += 1
            if step == before and not place.position:
                raise DataError(
                    f"the training stream ended after {samples.position} samples, less than one global batch of "
                    f"{self._plan.global_batch}. Type a smaller --global-batch, or give the stream more samples."
                )
            epoch, place = epoch + 1, Place()

    def _own_of(self, samples: Samples) -> list[Any]:
        """Reads a global batch and returns this rank's samples of it."""
        begin = self._runs[0][1]
        end = self._runs[-1][2]
        kept = []
        with samples.run(self._plan.global_batch) as run:
            for number, sample in enumerate(run):
                if begin <= number < end:
                    kept.append(sample)
        return kept

    def _micro_batch(self, request: Request, samples: list[Any], keyed: Keyed) -> MicroBatch:
        if not self._may_draw:
            return MicroBatch(request, self._collate(samples))
        with keyed.by(Purpose.BATCH, request.epoch, int(request.indices[0])):
            batch = self._collate(samples)
            if self._data.augment is not None:
                batch = self._data.augment(batch, Draws(self._seed, request.epoch, request.indices))
        return MicroBatch(request, batch)


class EvaluationStream(IterableDataset[MicroBatch]):
    """A rank's micro-batches of an evaluation over an iterable data set: every world_size-th, each sample once.

    All ranks have the same number: those without one more repeat the stream's first sample, marked as padding.
    """

    def __init__(self, data: Data, *, micro_batch: int, rank: int, world_size: int):
        super().__init__()
        self._data, self._size, self._rank, self._world_size = data, micro_batch, rank, world_size
        self._collate = data.collate or default_collate

    def __iter__(self) -> Iterator[MicroBatch]:
        keyed = Keyed(0)
        spare: list[Any] = []
        block: list[Any] = []
        blocks = 0
        for sample in self._samples(keyed):
            if not spare:
                spare = [sample]
            block.append(sample)
            if len(block) == self._size:
                if blocks % self._world_size == self._rank:
                    yield self._answer(block, blocks, keyed)
                block = []
                blocks += 1
        if block:
            if blocks % self._world_size == self._rank:
                yield self._answer(block, blocks, keyed)
            blocks += 1
        left = blocks % self._world_size
        if left and self._rank >= left:
            request = Request(0, 0, blocks, np.zeros(1, dtype=np.int64), is_padding=True)
            yield MicroBatch(request, self._answer(spare, blocks, keyed).batch)

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
            return MicroBatch(request, self._collate(samples))
        with keyed.by(Purpose.BATCH, 0, first):
            return MicroBatch(request, self._collate(samples))
