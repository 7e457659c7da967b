"""Orders of an epoch for `Data.order`: sampling by weight, batches of similar length, mixtures.

Each is a pure function of (seed, epoch, size), so that every rank and every attempt of a run has
the same one. An order that depends on what was seen before could not be resumed or split.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddp_kit.data.seeding import Purpose, key, keys, permutation
from ddp_kit.errors import DataError

if TYPE_CHECKING:
    from ddp_kit.data.dataset import Order


def _uniform(seed: int, epoch: int, size: int, *, stream: int) -> NDArray[np.float64]:
    """Returns `size` numbers in [0, 1)."""
    bits = keys(key(seed, Purpose.ORDER, epoch, stream), np.arange(size))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _Shares:
    """Chooses indices in proportion to weights (n,), of which one at least is positive."""

    def __init__(self, weights: NDArray[np.float64]):
        self._edges = np.cumsum(weights) / weights.sum()
        # Rounding must not choose an index of weight zero at the end.
        self._last = int(np.flatnonzero(weights)[-1])

    def chosen(self, numbers: NDArray[np.float64]) -> NDArray[np.int64]:
        """Returns an index for each of some numbers in [0, 1)."""
        return np.minimum(np.searchsorted(self._edges, numbers, side="right"), self._last)


def weighted(weights: Sequence[float] | NDArray[np.float64], *, samples: int = 0) -> "Order":
    """Returns an order that draws with replacement in proportion to `weights` (n,).

    Args: `samples` an epoch, default n.
    Raises: DataError if the weights are negative, all zero, or not as many as samples.
    """
    given = np.asarray(weights, dtype=np.float64)
    is_list = given.ndim == 1 and len(given) > 0
    if not is_list or (given < 0).any() or not np.isfinite(given).all() or given.sum() <= 0:
        raise DataError(
            "orders.weighted expects one weight a sample, none negative and not all zero."
        )
    shares = _Shares(given)

    def order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
        if size != len(given):
            raise DataError(f"orders.weighted has {len(given)} weights for {size} samples.")
        return shares.chosen(_uniform(seed, epoch, samples or size, stream=1))

    return order


def by_length(lengths: Sequence[int] | NDArray[np.int64], *, group: int) -> "Order":
    """Returns an order in which runs of samples have similar lengths, the runs in random order.

    Args: `lengths` (n,) of the samples; `group` samples in a run: take the global batch.
    Raises: DataError, once it is used, if the lengths are not as many as samples.
    """
    sizes = np.asarray(lengths)

    def order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
        if size != len(sizes):
            raise DataError(f"orders.by_length has {len(sizes)} lengths for {size} samples.")
        # Ties in length fall differently each epoch, and so does the ragged tail.
        shuffled = permutation(seed, epoch, size)
        kept = np.sort(shuffled[: size // group * group])
        mixed = kept[np.argsort(keys(key(seed, Purpose.ORDER, epoch, 2), kept), kind="stable")]
        runs = mixed[np.argsort(sizes[mixed], kind="stable")].reshape(-1, group)
        return runs[permutation(key(seed, Purpose.ORDER, 3), epoch, len(runs))].reshape(-1)

    return order


def mixture(sizes: Sequence[int], *, weights: Sequence[float], samples: int = 0) -> "Order":
    """Returns an order over a ConcatDataset, taking from each part in proportion to `weights`.

    Within a part no sample comes again before all of the part were seen.

    Args: `sizes` samples in each part; `weights` one a part; `samples` an epoch, default all parts'
    sum.
    Raises: DataError if the weights do not fit the parts, or a part is empty.
    """
    given = np.asarray(weights, dtype=np.float64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    is_wrong = len(given) != len(sizes) or (given < 0).any() or given.sum() <= 0
    if is_wrong or min(sizes, default=0) < 1:
        raise DataError(
            "orders.mixture expects a weight for each part, none negative and not all zero, "
            "and no empty part."
        )
    shares = _Shares(given)

    def order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
        if size != starts[-1]:
            raise DataError(
                f"orders.mixture has parts of {starts[-1]} samples in all for a data set of {size}."
            )
        total = samples or size
        parts = shares.chosen(_uniform(seed, epoch, total, stream=4))
        result = np.empty(total, dtype=np.int64)
        for part, count in enumerate(sizes):
            places = np.flatnonzero(parts == part)
            own = _turns(seed, epoch, part, count, samples=len(places))
            result[places] = starts[part] + own
        return result

    return order


def _turns(seed: int, epoch: int, part: int, count: int, *, samples: int) -> NDArray[np.int64]:
    """Returns `samples` indices into a part of `count` samples: one permutation after another."""
    bases = [key(seed, Purpose.ORDER, 5, part, turn) for turn in range(-(-samples // count))]
    turns = [permutation(base, epoch, count) for base in bases]
    return np.concatenate([np.empty(0, dtype=np.int64), *turns])[:samples]
