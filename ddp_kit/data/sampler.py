"""Which samples, in which order, and whose: the only place that knows.

Global batch k is a slice of its epoch's order, and a rank's micro-batches are pieces of that slice.
There is no state beside one counter: a step number gives its epoch and its samples at once, at any
world size.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from ddp_kit.data.batch_plan import BatchPlan
from ddp_kit.data.dataset import Order
from ddp_kit.data.reader import Request
from ddp_kit.data.seeding import occurrences_in, permutation
from ddp_kit.errors import DataError


class GlobalBatchSampler(DistributedSampler[Any]):
    """Global batch k of an epoch is `order[k x global_batch : (k + 1) x global_batch]`.

    That holds for every split; the ragged tail is dropped. Iterating gives this rank's
    micro-batches of one epoch as lists of indices (a batch sampler for torch's DataLoader) and
    moves on to the next epoch by itself; `requests` gives those of the whole run.
    """

    def __init__(
        self, dataset: Any, *, plan: BatchPlan, rank: int, seed: int = 0, order: Order | None = None
    ):
        """Raises: DataError if an epoch holds less than one global batch."""
        super().__init__(
            dataset,
            num_replicas=len(plan.firsts) - 1,
            rank=rank,
            shuffle=True,
            seed=seed,
            drop_last=True,
        )
        self._plan = plan
        self._order = order or permutation
        self._size = len(dataset)
        self._own = plan.of_rank(rank)
        self._known_epoch = -1
        self._known_order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        # In the known epoch's order.
        self._occurrences: NDArray[np.int64] | None = None
        self._length = len(self.epoch_order(0))
        if self._length < plan.global_batch:
            given = f"has {self._length} samples an epoch" if self._size else "is empty"
            advice = "Give it samples."
            if self._length:
                advice = f"Type --global-batch {self._length} or less."
            raise DataError(
                f"the training data {given}, less than one global batch of {plan.global_batch}. "
                f"{advice}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, the same at any world size."""
        return self._length // self._plan.global_batch

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """Returns the order of an epoch.

        Raises: DataError if a user's order leaves the data set or changes its length.
        """
        if self._known_epoch != epoch:
            order = np.asarray(self._order(self.seed, epoch, self._size), dtype=np.int64)
            self._check_order(order, epoch)
            self._known_epoch = epoch
            self._known_order = order
            self._occurrences = None
            if self._order is not permutation:
                self._occurrences = occurrences_in(order)
        return self._known_order

    def _check_order(self, order: NDArray[np.int64], epoch: int) -> None:
        is_list = order.ndim == 1
        if is_list and len(order):
            is_list = bool(order.min() >= 0 and order.max() < self._size)
        if not is_list:
            raise DataError(
                f"the order of epoch {epoch} is not a list of indices from 0 to {self._size - 1}."
            )
        if self._known_epoch >= 0 and len(order) != self._length:
            raise DataError(
                f"the order of epoch {epoch} has {len(order)} samples, "
                f"that of epoch 0 has {self._length}; expected the same."
            )

    def requests(self, *, start: int, end: int) -> Iterator[Request]:
        """Yields this rank's micro-batches of steps start to end - 1; any start costs the same."""
        for step in range(start, end):
            epoch, k = divmod(step, self.steps_per_epoch)
            begin = k * self._plan.global_batch
            for index, first, stop in self._own:
                places = slice(begin + first, begin + stop)
                yield self.request(epoch, places, step=step, micro_batch=index)

    def request(self, epoch: int, places: slice, *, step: int, micro_batch: int) -> Request:
        """Returns the request for the samples at some places of an epoch's order."""
        indices = self.epoch_order(epoch)[places]
        occurrences = None if self._occurrences is None else self._occurrences[places]
        return Request(step, epoch, micro_batch, indices, occurrences=occurrences)

    def __iter__(self) -> Iterator[Any]:
        first = self.epoch * self.steps_per_epoch
        self.set_epoch(self.epoch + 1)
        for request in self.requests(start=first, end=first + self.steps_per_epoch):
            yield request.indices.tolist()

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch."""
        return self.steps_per_epoch * len(self._own)


def evaluation_requests(
    size: int, *, micro_batch: int, rank: int, world_size: int
) -> list[Request]:
    """Returns a rank's micro-batches of an evaluation of `size` samples, in order.

    Each sample comes once over all ranks. All ranks get the same number of micro-batches: where
    they do not come out even, a request marked as padding reads sample 0 and counts nothing.
    """
    blocks = [
        np.arange(first, min(first + micro_batch, size)) for first in range(0, size, micro_batch)
    ]
    small, larger = divmod(len(blocks), world_size)
    first = rank * small + min(rank, larger)
    own = range(first, first + small + (rank < larger))
    requests = [Request(0, 0, i, blocks[i]) for i in own]
    if larger and rank >= larger:
        requests.append(Request(0, 0, len(blocks), np.zeros(1, dtype=np.int64), is_padding=True))
    return requests
