"""The integer hash behind every draw, and the orders and sample keys that follow from it.

The hash is splitmix64's finaliser (Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014), chained over the parts of a key. It is our own so that it stays the same
over NumPy's and torch's versions.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
CHAIN = 0xFF51AFD7ED558CCD


class Purpose(IntEnum):
    """The first part of every key after the seed, so that no two kinds of draw share a stream."""

    ORDER = 1
    SAMPLE = 2
    FORWARD = 3
    WEIGHTS = 4
    STREAM = 5
    SPLIT = 6
    BATCH = 7
    FACTORY = 8


def key(*parts: int) -> int:
    """Returns 64 bits that depend on every part and on their order."""
    state = _chain(*parts)
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def _chain(*parts: int) -> int:
    state = GOLDEN
    for part in parts:
        state = ((state ^ part) * CHAIN + GOLDEN) & MASK
        state ^= state >> 32
    return state


def chain_each(state: NDArray[np.uint64], parts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Chains one more part to each state, as `_chain` does."""
    state = (state ^ parts.astype(np.uint64)) * np.uint64(CHAIN) + np.uint64(GOLDEN)
    return state ^ (state >> np.uint64(32))


def finish(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's finaliser, on each state."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def keys(base: int, indices: NDArray[np.integer] | Sequence[int]) -> NDArray[np.uint64]:
    """Returns 64 bits for each index under the key `base`.

    It is splitmix64 with the index as its counter.

    Returns: shape (n,).
    """
    state: NDArray[np.uint64] = np.asarray(indices).astype(np.uint64)
    return finish((state + np.uint64(1)) * np.uint64(GOLDEN) + np.uint64(base))


def sample_keys(
    seed: int, epoch: int, indices: NDArray[np.int64], occurrences: NDArray[np.int64] | None = None
) -> NDArray[np.uint64]:
    """Returns the keys of samples in an epoch, all at once.

    That of a sample is `key(seed, Purpose.SAMPLE, epoch, index)`.

    Args: `occurrences` (n,) how often each sample came before in its epoch; a sample's first time
        has the key that it has without.
    Returns: shape (n,).
    """
    state = np.full(len(indices), _chain(seed, Purpose.SAMPLE, epoch), dtype=np.uint64)
    found = finish(chain_each(state, indices))
    if occurrences is None or not occurrences.any():
        return found
    again = finish(chain_each(chain_each(state, indices), occurrences))
    return np.where(occurrences > 0, again, found)


def occurrences_in(order: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Returns how often each entry of an order of samples came before in it.

    Returns: shape (n,); None if none comes twice.
    """
    by_sample = np.argsort(order, kind="stable")
    ordered = order[by_sample]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    if is_first.all():
        return None
    places = np.arange(len(order))
    firsts = np.maximum.accumulate(np.where(is_first, places, 0))
    found = np.empty(len(order), dtype=np.int64)
    found[by_sample] = places - firsts
    return found


def permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Returns the order of `size` samples in an epoch: the indices sorted by their keys."""
    epoch_keys = keys(key(seed, Purpose.ORDER, epoch), np.arange(size))
    order: NDArray[np.int64] = np.argsort(epoch_keys, kind="stable")
    return order
