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
from ddp_kit.data.indices import as_indices
from ddp_kit.data.reader import Request
from ddp_kit.data.seeding import (
    Purpose,
    generators_put_back,
    key,
    occurrences_in,
    permutation,
    seed_generators,
)
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
    def length(self) -> int:
        """Samples in an epoch, with its ragged tail."""
        return self._length

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, the same at any world size."""
        return self._length // self._plan.global_batch

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """Returns the order of an epoch.

        Raises: DataError if a user's order gives no indices into the data set, another number of
            them than before, or others when it is asked again.
        """
        if self._known_epoch != epoch:
            order = self._new_order(epoch)
            if self._known_epoch < 0:
                self._require_pure(order, epoch)
            elif len(order) != self._length:
                raise DataError(
                    f"the order of epoch {epoch} has {len(order)} samples, "
                    f"that of epoch 0 has {self._length}; expected the same."
                )
            self._known_epoch = epoch
            self._known_order = order
            self._occurrences = None
            if self._order is not permutation:
                self._occurrences = occurrences_in(order)
        return self._known_order

    def _new_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order is permutation or not self._size:
            return permutation(self.seed, epoch, self._size)
        # One that draws from the default generators is then a function of seed and epoch too.
        with generators_put_back():
            seed_generators(key(self.seed, Purpose.ORDER, epoch))
            given = self._order(self.seed, epoch, self._size)
        return as_indices(given, what=f"Data.order for epoch {epoch}", below=self._size)

    def _require_pure(self, order: NDArray[np.int64], epoch: int) -> None:
        if self._order is permutation or np.array_equal(order, self._new_order(epoch)):
            return
        raise DataError(
            f"Data.order gave another list for epoch {epoch} the second time. It must be a "
            "function of its arguments, or neither ranks nor a resumed run could have the same "
            "one: let it draw from the default generators, which are keyed, or from one that it "
            "seeds by its arguments."
        )

    def requests(self, *, start: int, end: int, ahead: int = 0) -> Iterator[Request]:
        """Yields this rank's micro-batches of steps start to end - 1; any start costs the same.

        Args: `ahead` as `Cursor` has it.
        """
        for step in range(start, end):
            epoch, k = divmod(step - ahead, self.steps_per_epoch)
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
