"""Streams that are each rank's own (`Data(stream, sharded=True)`), and what ranks agree on of them.

Nothing makes such streams equally long: an epoch is as long as the shortest of them on all ranks,
and an evaluation as the longest. All ranks call each function.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ddp_kit.data.batch_plan import BatchPlan
from ddp_kit.data.dataset import Data
from ddp_kit.data.reader import MicroBatch
from ddp_kit.data.stream_length import length_of
from ddp_kit.distributed.collectives import max_over_ranks
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DataError


@dataclass(frozen=True)
class OwnStreams:
    """What is known of all ranks' training streams: the samples of the shortest, and the steps of
    an epoch, which is the same on all ranks. Both are 0 where a stream does not know its length.
    """

    shortest: int
    steps_per_epoch: int


def agreed_streams(data: Data, *, plan: BatchPlan, group: Group) -> OwnStreams:
    """Returns what ranks agree on."""
    length = length_of(data.dataset)
    own = plan.of_rank(group.rank)
    share = own[-1][2] - own[0][1]
    negatives = max_over_ranks(group, [-length, -(length // share)])
    return OwnStreams(shortest=-negatives[0], steps_per_epoch=-negatives[1])


def in_lockstep(answers: Iterator[MicroBatch], *, group: Group, what: str) -> Iterator[MicroBatch]:
    """Yields a rank's micro-batches of an evaluation, as many as the rank with most has.

    A rank that has no more repeats its first one, marked as padding. Micro-batches and samples are
    numbered anew, so that no two ranks have one number.

    Raises: DataError on a rank without any.
    """
    first: MicroBatch | None = None
    for number in itertools.count():
        answer = next(answers, None)
        if not max_over_ranks(group, [int(answer is not None)])[0]:
            return
        padding = answer is None
        answer = answer or first
        if answer is None:
            raise DataError(f"the {what} of rank {group.rank} has no samples.")
        first = first or answer
        request = answer.request._replace(
            micro_batch=number * group.world_size + group.rank,
            indices=answer.request.indices * group.world_size + group.rank,
            is_padding=padding,
        )
        yield MicroBatch(request, answer.batch)
