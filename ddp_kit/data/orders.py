"""Orders of an epoch for `Data.order`: pure functions of (seed, epoch, size), so that every rank and life has the same one.

Owns: sampling by weight, batches of similar length, and mixtures of data sets.
Refuses: state. An order that depends on what was seen before could not be resumed or split.
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
    return (keys(key(seed, Purpose.ORDER, epoch, stream), np.arange(size)) >> np.uint64(11)).astype(
        np.float64
    ) * 2.0**-53


def weighted(weights: Sequence[float] | NDArray[np.float64], *, samples: int = 0) -> "Order":
    """Returns an order that draws with replacement in proportion to `weights` (n,); `samples` an epoch, default n.

    Raises: DataError if the weights are negative, all zero, or not as many as samples.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if (
        shares.ndim != 1
        or not len(shares)
        or (shares < 0).any()
        or not np.isfinite(shares).all()
        or shares.sum() <= 0
    ):
        raise DataError(
            "orders.weighted expects one weight a sample, none negative and not all zero."
        )
    edges = np.cumsum(shares) / shares.sum()
    last = int(
        np.flatnonzero(shares)[-1]
    )  # rounding must not choose a sample of weight zero at the end

    def order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
        if size != len(edges):
            raise DataError(f"orders.weighted has {len(edges)} weights for {size} samples.")
        return np.minimum(
            np.searchsorted(edges, _uniform(seed, epoch, samples or size, stream=1), side="right"),
            last,
        )

    return order


def by_length(lengths: Sequence[int] | NDArray[np.int64], *, group: int) -> "Order":
    """Returns an order in which runs of `group` samples (take the global batch) have similar lengths, the runs in random order."""
    sizes = np.asarray(lengths)

    def order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
        if size != len(sizes):
            raise DataError(f"orders.by_length has {len(sizes)} lengths for {size} samples.")
        shuffled = permutation(
            seed, epoch, size
        )  # ties in length fall differently each epoch, and so does the ragged tail
        kept = np.sort(shuffled[: size // group * group])
        mixed = kept[np.argsort(keys(key(seed, Purpose.ORDER, epoch, 2), kept), kind="stable")]
        runs = mixed[np.argsort(sizes[mixed], kind="stable")].reshape(-1, group)
        return runs[permutation(key(seed, Purpose.ORDER, 3), epoch, len(runs))].reshape(-1)

    return order


def mixture(sizes: Sequence[int], *, weights: Sequence[float], samples: int = 0) -> "Order":
    """Returns an order over a ConcatDataset of parts of `sizes`, taking from each in proportion to `weights`.

    Within a part no sample comes again before all of the part were seen; `samples` an epoch, default all parts' sum.
    """
    shares, starts = np.asarray(weights, dtype=np.float64), np.concatenate([[0], np.cumsum(sizes)])
    if (
        len(shares) != len(sizes)
        or (shares < 0).any()
        or shares.sum() <= 0
        or min(sizes, default=0) < 1
    ):
        raise DataError(
            "orders.mixture expects a weight for each part, none negative and not all zero, and no empty part."
        )
    edges = np.cumsum(shares) / shares.sum()
    last = int(np.flatnonzero(shares)[-1])

    def order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
        if size != starts[-1]:
            raise DataError(
                f"orders.mixture has parts of {starts[-1]} samples in all for a data set of {size}."
            )
        total = samples or size
        part = np.minimum(
            np.searchsorted(edges, _uniform(seed, epoch, total, stream=4), side="right"), last
        )
        result = np.empty(total, dtype=np.int64)
        for i, count in enumerate(sizes):
            places = np.flatnonzero(part == i)
            rounds = -(-len(places) // count)
            own = [
                permutation(key(seed, Purpose.ORDER, 5, i, turn), epoch, count)
                for turn in range(rounds)
            ]
            result[places] = (
                starts[i] + np.concatenate([*own, np.empty(0, dtype=np.int64)])[: len(places)]
            )
        return result

    return order
