"""Iterable data sets: every rank and worker reads the stream from its start and keeps its share.

A stream is cut into the same global batches for every split. The promises are weaker than those of
a map-style data set: each reader pays for the whole stream, starting later replays it, and the
stream must be the same for every reader (`set_epoch(epoch)` is called where the data set has it). A
data set with a state of its own (`state_dict`, `load_state_dict`, plain data) is not replayed: a
checkpoint holds its state on each rank, for the same number of ranks.
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
from ddp_kit.data.odd_samples import collated
from ddp_kit.data.own_stream import OwnStreams
from ddp_kit.data.reader import MicroBatch, Request
from ddp_kit.data.seeding import Draws, Purpose, generators_aside, key, seed_generators
from ddp_kit.data.stream_length import LengthWatch, length_of
from ddp_kit.errors import DataError


@dataclass(frozen=True)
class StreamPosition:
    """Where a stream stands: its next sample, and the data set's own state (None: its start)."""

    epoch: int = 0
    position: int = 0
    state: Any = None


class StreamProgress:
    """The places of a stream after the last few global batches, for a checkpoint of any of them.

    Several are kept because a loader may have read ahead of training.
    """

    def __init__(self) -> None:
        # From which a resumed run reads on.
        self.begin: StreamPosition | None = None
        # By the number of steps done.
        self.after: dict[int, StreamPosition] = {}

    def note(self, steps: int, place: StreamPosition) -> None:
        """Notes where the stream stands once the batches of `steps` steps are read."""
        self.after[steps] = place
        self.after.pop(steps - 8, None)


def is_stateful(dataset: Any) -> bool:
    """Whether an iterable data set keeps its own state."""
    return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")


class Keyed:
    """Default generators seeded for a piece of a stream's code; the caller's are put back."""

    def __init__(self, seed: int):
        """Hides from the data set that it is read in a loader worker.

        A stream that shares itself out by `get_worker_info()`, as torch's documentation shows,
        would be shared out twice. The worker is this stream's alone.
        """
        self.seed = seed
        self._is_worker = get_worker_info() is not None
        self._numpy = np.random.MT19937(0)
        torch_worker._worker_info = None

    @contextmanager
    def by(self, purpose: Purpose, epoch: int, position: int) -> Iterator[None]:
        """Seeds the generators while it lasts."""
        value = key(self.seed, purpose, epoch, position)
        if self._is_worker:
            # Nobody else draws in it.
            seed_generators(value)
            yield
            return
        with generators_aside(self._numpy):
            seed_generators(value)
            yield


class Samples:
    """The samples of one epoch of a stream from a place on, read a run of them at a time.

    A stream cannot be read again, so its generators are seeded once a run, by the position of the
    first sample: runs must begin at the same positions for every reader.
    """

    def __init__(
        self, data: Data, *, keyed: Keyed, epoch: int, begin: StreamPosition = StreamPosition()
    ):
        self._dataset = data.dataset
        self._keyed = keyed
        self._epoch = epoch
        self._begin = begin
        self._samples: Iterator[Any] | None = None
        # Of the next sample.
        self.position = begin.position

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
    """This rank's micro-batches of an iterable data set; in a loader worker, every n-th of them."""

    def __init__(
        self,
        data: Data,
        *,
        plan: BatchPlan,
        rank: int,
        seed: int,
        start: int,
        end: int,
        ahead: int = 0,
        progress: StreamProgress | None = None,
        streams: OwnStreams | None = None,
    ):
        """Args: `start`, `end` the steps; `ahead` as `Cursor` has it; `progress` of a data set with
        a state of its own; `streams` if this one is the rank's own."""
        super().__init__()
        self._data = data
        self._plan = plan
        self._seed = seed
        self._start = start
        self._end = end
        self._ahead = ahead
        self._progress = progress
        self._rank = rank
        self._own = plan.of_rank(rank)
        self._share = self._own[-1][2] - self._own[0][1]
        # What is read for a step, and where this rank's share of it begins.
        self._size = plan.global_batch
        self._begin = self._own[0][1]
        self._streams = streams
        if streams is not None:
            self._size = self._share
            self._begin = 0
            if rank:
                # Else ranks would draw the same for other samples.
                self._seed = key(seed, Purpose.STREAM, rank)
        self._collate = data.collate or default_collate
        self._may_draw = data.collate is not None or data.augment is not None

    def __iter__(self) -> Iterator[MicroBatch]:
        worker = 0
        workers = 1
        info = get_worker_info()
        if info is not None:
            worker = info.id
            workers = info.num_workers
        keyed = Keyed(self._seed)
        watch = LengthWatch(
            self._data.dataset,
            global_batch=self._plan.global_batch,
            is_told=self._rank == 0 and worker == 0 and self._streams is None,
        )
        own_first = self._own[0][1]
        taken = 0
        for step, epoch, position, samples in self._global_batches(keyed, watch):
            if step < self._start:
                continue
            for index, start, stop in self._own:
                if taken % workers == worker:
                    part = samples[start - own_first : stop - own_first]
                    first = position + self._begin + start - own_first
                    indices = np.arange(first, first + len(part))
                    request = Request(step, epoch, index, indices)
                    yield self._micro_batch(request, part, keyed)
                taken += 1

    def _global_batches(
        self, keyed: Keyed, watch: LengthWatch
    ) -> Iterator[tuple[int, int, int, list[Any]]]:
        """Yields (step, epoch, position of the global batch in the stream, this rank's samples).

        A ragged tail is dropped.
        """
        place = StreamPosition()
        if self._progress is not None and self._progress.begin is not None:
            place = self._progress.begin
        # From its start a stream is replayed.
        step = self._ahead if place == StreamPosition() else self._start
        epoch = place.epoch
        anew = self._place_of_pass()
        while step < self._end:
            samples = Samples(self._data, keyed=keyed, epoch=epoch, begin=place)
            before = step
            while step < self._end and not self._is_over(samples.position):
                position = samples.position
                kept = self._own_of(samples)
                if samples.position - position < self._size:
                    self._require_all(samples.position)
                    watch.ended(samples.position)
                    break
                watch.read(samples.position)
                if self._progress is not None:
                    state = copy.deepcopy(self._data.dataset.state_dict())
                    self._progress.note(step + 1, StreamPosition(epoch, samples.position, state))
                yield step, epoch, position, kept
                step += 1
            if step == before and not place.position:
                raise DataError(
                    f"the training stream ended after {samples.position} samples, less than one "
                    f"global batch of {self._plan.global_batch}. Type a smaller --global-batch, or "
                    "give the stream more samples."
                )
            epoch += 1
            place = anew

    def _place_of_pass(self) -> StreamPosition:
        """Returns where a new pass begins: a stream that is not read to its end must be told."""
        if self._streams is None or self._progress is None:
            return StreamPosition()
        return StreamPosition(state=copy.deepcopy(self._data.dataset.state_dict()))

    def _is_over(self, position: int) -> bool:
        """Whether the epoch of all ranks' own streams is over."""
        if self._streams is None or not self._streams.steps_per_epoch:
            return False
        return position >= self._streams.steps_per_epoch * self._share

    def _require_all(self, position: int) -> None:
        """Raises: DataError if a rank's own stream ended before the epoch of all ranks."""
        if self._streams is not None and self._streams.steps_per_epoch:
            raise DataError(
                f"the training stream of rank {self._rank} ended after {position} samples, where "
                f"its __len__ says {length_of(self._data.dataset)}: the ranks would no longer take "
                "the same steps. Mend __len__, or leave it out and type --epochs 0 --max-steps N."
            )

    def _own_of(self, samples: Samples) -> list[Any]:
        """Reads what a step takes and returns this rank's samples of it."""
        kept = []
        with samples.run(self._size) as run:
            for number, sample in enumerate(run):
                if self._begin <= number < self._begin + self._share:
                    kept.append(sample)
        return kept

    def _micro_batch(self, request: Request, samples: list[Any], keyed: Keyed) -> MicroBatch:
        if not self._may_draw:
            return MicroBatch(request, self._batch(request, samples))
        with keyed.by(Purpose.BATCH, request.epoch, int(request.indices[0])):
            batch = self._batch(request, samples)
            if self._data.augment is not None:
                draws = Draws(self._seed, request.epoch, request.indices)
                batch = self._data.augment(batch, draws)
        return MicroBatch(request, batch)

    def _batch(self, request: Request, samples: list[Any]) -> Any:
        return collated(samples, self._collate, indices=request.indices, what="training data")
