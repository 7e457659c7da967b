"""The feed: global batches as this rank sees them, for training and for evaluation.

With `num_workers=0` a user's code runs on the main thread and no other; with more it runs in
torch's loader workers. Order and randomness are not decided here: `sampler` and `reader` do.
"""

import contextlib
import itertools
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

from ddp_kit.data.batch_plan import BatchPlan, plan_batches
from ddp_kit.data.cursor import Cursor
from ddp_kit.data.dataset import Data, as_data, as_evaluation_data
from ddp_kit.data.evaluation_stream import EvaluationStream
from ddp_kit.data.iterable import StreamProgress, TrainingStream, is_stateful
from ddp_kit.data.own_stream import OwnStreams, agreed_streams, in_lockstep
from ddp_kit.data.prefetch import on_device
from ddp_kit.data.rank_batch import RankBatch, grouped
from ddp_kit.data.reader import MicroBatch, Reader
from ddp_kit.data.sampler import GlobalBatchSampler, evaluation_requests
from ddp_kit.data.stream_checks import start_of_stream
from ddp_kit.data.stream_length import length_of
from ddp_kit.data.transfer import Placement
from ddp_kit.data.workers import by_one_worker, with_workers
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.pulse import Pulse
from ddp_kit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Feed:
    """A rank's training batches, from any step on: it has no state of its own.

    `sampler` is None for an iterable data set; `progress` is that of an iterable data set with a
    state of its own; `streams` are there if each rank has its own; `cursor` says where in the data
    a step is.
    """

    data: Data
    plan: BatchPlan
    rank: int
    seed: int
    placement: Placement
    num_workers: int = 0
    sampler: GlobalBatchSampler | None = None
    progress: StreamProgress | None = None
    streams: OwnStreams | None = None
    cursor: Cursor = field(default_factory=Cursor)
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def length(self) -> int:
        """Samples of an epoch with its ragged tail; 0 if an iterable one does not know."""
        if self.sampler is not None:
            return self.sampler.length
        if self.streams is not None:
            return self.streams.steps_per_epoch * self.plan.global_batch
        return length_of(self.data.dataset)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; 0 if an iterable data set does not know its length."""
        return self.length // self.plan.global_batch

    def batches(self, *, start: int, end: int) -> Generator[RankBatch, None, None]:
        """Yields the batches of steps start to end - 1.

        Raises: DataError if a stream or a user's order gives other samples than it should.
        """
        per_step = len(self.plan.of_rank(self.rank))
        with contextlib.closing(self._read(start=start, end=end)) as micro_batches:
            placed = on_device(micro_batches, self.placement)
            yield from grouped(placed, per_step=per_step, pulse=self.pulse, start=start)

    def _read(self, *, start: int, end: int) -> Generator[MicroBatch, None, None]:
        if self.sampler is None:
            yield from self._read_stream(start=start, end=end)
            return
        reader = Reader(self.data, seed=self.seed, training=True)
        requests = self.sampler.requests(start=start, end=end, ahead=self.cursor.ahead)
        if self.num_workers:
            workers = self.num_workers
            yield from with_workers(reader, requests, num_workers=workers, pulse=self.pulse)
            return
        per_step = len(self.plan.of_rank(self.rank))
        while own := list(itertools.islice(requests, per_step)):
            yield from reader.read(own)

    def _read_stream(self, *, start: int, end: int) -> Generator[MicroBatch, None, None]:
        stream = TrainingStream(
            self.data,
            plan=self.plan,
            rank=self.rank,
            seed=self.seed,
            start=start,
            end=end,
            ahead=self.cursor.ahead,
            progress=self.progress,
            streams=self.streams,
        )
        if self.num_workers:
            workers = self.num_workers
            yield from with_workers(stream, None, num_workers=workers, pulse=self.pulse)
        else:
            yield from stream

    def dry_run_batch(self) -> MicroBatch:
        """Returns the fixed micro-batch of the dry run, the same on all ranks.

        With workers it is read by one, so that theirs is a data set that nobody has touched: what
        it opens at its first sample each of them opens for itself.
        """
        size = self.plan.largest
        if self.sampler is None:
            answer = start_of_stream(
                self.data, plan=self.plan, seed=self.seed, num_workers=self.num_workers
            )
        else:
            request = self.sampler.request(0, slice(0, size), step=0, micro_batch=0)
            reader = Reader(self.data, seed=self.seed, training=True)
            if self.num_workers:
                answer = by_one_worker(reader, [request])
            else:
                answer = reader.read([request])[0]
        return MicroBatch(answer.request, self.placement(answer.batch))


def build_loader(
    data: Any,
    *,
    group: Group,
    global_batch: int,
    micro_batch: int = 0,
    seed: int = 0,
    num_workers: int = 0,
    placement: Placement | None = None,
) -> Feed:
    """Returns this rank's loader of training batches from a `Data` or a bare data set.

    Every rank calls it.

    Args: `global_batch` samples per optimizer step over all ranks; `micro_batch` the most samples
        of one forward pass, 0 for a rank's whole share; `num_workers` loader workers of this rank.
    Raises: ConfigError for sizes that cannot be; DataError if an epoch holds less than one global
        batch.
    """
    plan = plan_batches(global_batch, micro_batch=micro_batch, world_size=group.world_size)
    given = as_data(data, what="training data")
    streams = None
    if given.sharded:
        streams = agreed_streams(given, plan=plan, group=group)
    feed = feed_of(
        given,
        streams=streams,
        plan=plan,
        rank=group.rank,
        seed=seed,
        placement=placement or Placement(group.device),
        num_workers=num_workers,
    )
    return replace(feed, pulse=group.pulse)


def feed_of(
    data: Data,
    *,
    plan: BatchPlan,
    rank: int,
    seed: int,
    placement: Placement,
    num_workers: int = 0,
    streams: OwnStreams | None = None,
) -> Feed:
    """Returns a rank's loader by a plan that is made already.

    Raises: ConfigError for an order of an iterable data set, or workers for one that keeps its own
        state; DataError if an epoch holds less than one global batch.
    """
    sampler = None
    progress = None
    if not data.is_iterable:
        sampler = GlobalBatchSampler(data, plan=plan, rank=rank, seed=seed, order=data.order)
    elif data.order is not None:
        raise ConfigError(
            "Data(order=...) has no effect on an iterable data set, which comes in its own order: "
            "leave it out."
        )
    elif is_stateful(data.dataset):
        progress = StreamProgress()
        if num_workers:
            raise ConfigError(
                "the training data keeps its own state, which only the training process can save: "
                "type --num-workers 0."
            )
    return Feed(
        data=data,
        plan=plan,
        rank=rank,
        seed=seed,
        placement=placement,
        num_workers=num_workers,
        sampler=sampler,
        progress=progress,
        streams=streams,
    )


def evaluation_batches(
    data: Any,
    *,
    group: Group,
    micro_batch: int,
    placement: Placement | None = None,
    num_workers: int = 0,
    what: str = "evaluation data",
) -> Generator[MicroBatch, None, None]:
    """Yields this rank's micro-batches of an evaluation, the same number on every rank.

    Each sample is read once over all ranks.

    Args: `what` data it is, in words, for errors.
    """
    given = as_evaluation_data(data, what=what)
    answers = _evaluation(
        given,
        micro_batch=micro_batch,
        rank=0 if given.sharded else group.rank,
        world_size=1 if given.sharded else group.world_size,
        num_workers=num_workers,
        what=what,
        pulse=group.pulse,
    )
    placed = on_device(answers, placement or Placement(group.device))
    if given.sharded:
        placed = in_lockstep(placed, group=group, what=what)
    yield from placed


def first_of_evaluation(
    data: Data, *, micro_batch: int, num_workers: int = 0, what: str = "evaluation data"
) -> MicroBatch | None:
    """Returns the first micro-batch of a whole evaluation set, on the CPU; None of an empty one."""
    batches = _evaluation(
        data, micro_batch=micro_batch, rank=0, world_size=1, num_workers=num_workers, what=what
    )
    with contextlib.closing(batches) as answers:
        return next(answers, None)


def _evaluation(
    data: Data,
    *,
    micro_batch: int,
    rank: int,
    world_size: int,
    num_workers: int,
    what: str,
    pulse: Pulse | None = None,
) -> Generator[MicroBatch, None, None]:
    if data.is_iterable:
        stream = EvaluationStream(
            data, micro_batch=micro_batch, rank=rank, world_size=world_size, what=what
        )
        if num_workers:
            # One worker: each would read the whole stream for its part of it.
            yield from with_workers(stream, None, num_workers=1, pulse=pulse)
        else:
            yield from stream
        return
    requests = evaluation_requests(
        len(data), micro_batch=micro_batch, rank=rank, world_size=world_size
    )
    reader = Reader(data, seed=0, training=False, what=what)
    if num_workers:
        yield from with_workers(reader, requests, num_workers=num_workers, pulse=pulse)
        return
    for request in requests:
        yield from reader.read([request])
