"""What a stream must be able to do, tried before training: begin again, and go on from its state.

A stream is iterated anew for the dry run, for each epoch and evaluation, and where a run goes on.
"""

import contextlib
import copy
from collections.abc import Generator
from dataclasses import replace
from typing import Any

from torch.utils.data import IterableDataset

from ddp_kit.data.agreement import are_same
from ddp_kit.data.batch_plan import BatchPlan
from ddp_kit.data.dataset import Data
from ddp_kit.data.iterable import Keyed, Samples, StreamPosition, TrainingStream, is_stateful
from ddp_kit.data.reader import MicroBatch
from ddp_kit.data.workers import with_workers
from ddp_kit.errors import DataError

# Samples at the seam that are compared: one alone may be the right one by chance.
SEAM = 8


def start_of_stream(data: Data, *, plan: BatchPlan, seed: int, num_workers: int) -> MicroBatch:
    """Returns the first samples of a training stream, as many as the largest micro-batch has.

    With workers one of them reads. The stream is read twice; one with a state of its own, which is
    put back, once.

    Raises: DataError if it does not begin again when it is iterated anew.
    """
    size = plan.largest
    whole = replace(plan, global_batch=size, bounds=(0, size), firsts=(0, 1))
    stream = TrainingStream(data, plan=whole, rank=0, seed=seed, start=0, end=1)
    if is_stateful(data.dataset):
        state = copy.deepcopy(data.dataset.state_dict())
        answer = next(iter(stream))
        data.dataset.load_state_dict(state)
        return answer
    twice = _Twice(stream)
    answers = iter(twice)
    if num_workers:
        answers = with_workers(twice, None, num_workers=1)
    with contextlib.closing(answers):
        answer = next(answers)
        again = next(answers)
    require_beginning_again(answer.batch, again.batch, what="training data")
    return answer


class _Twice(IterableDataset[MicroBatch]):
    """The first micro-batch of a stream, and that of the same stream, iterated anew."""

    def __init__(self, stream: TrainingStream):
        super().__init__()
        self._stream = stream

    def __iter__(self) -> Generator[MicroBatch, None, None]:
        yield next(iter(self._stream))
        yield next(iter(self._stream))


def require_beginning_again(first: Any, again: Any, *, what: str) -> None:
    """Compares the first batch of a stream with that of the same stream, iterated anew.

    Raises: DataError if they differ: what was read once would never be trained on or measured.
    """
    if are_same(first, again):
        return
    raise DataError(
        f"the {what} does not begin again when it is iterated anew: its first samples were others "
        "the second time. Let __iter__ start at the first sample, and draw from the default "
        "generators, which are keyed, or from one that __iter__ seeds."
    )


def require_resumable(data: Data, *, seed: int, after: int) -> None:
    """Reads a stream with a state of its own, and once more from its state after `after` samples.

    Its state is put back.

    Raises: DataError if that goes on with other samples: a resumed run would see some of them
        twice and others never.
    """
    before = copy.deepcopy(data.dataset.state_dict())
    keyed = Keyed(seed)
    whole = Samples(data, keyed=keyed, epoch=0)
    _taken(whole, after)
    place = StreamPosition(0, whole.position, copy.deepcopy(data.dataset.state_dict()))
    expected = _taken(whole, SEAM)
    found = _taken(Samples(data, keyed=keyed, epoch=0, begin=place), SEAM)
    data.dataset.load_state_dict(before)
    if are_same(expected, found):
        return
    raise DataError(
        "the training data does not go on from its state_dict with the samples that come next: "
        "what its __iter__ draws, or a shuffling buffer, is not in the state. Keep it there, draw "
        "from a generator that __iter__ seeds by the epoch, or leave state_dict out: the stream is "
        "then replayed. Or type --resume-data restart: a run that goes on reads it from its start."
    )


def _taken(samples: Samples, size: int) -> list[Any]:
    with samples.run(size) as run:
        return list(run)
