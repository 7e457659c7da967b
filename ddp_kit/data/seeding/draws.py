"""Random numbers for the samples of a batch, keyed by the sample and not by who reads it."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ddp_kit.data.seeding.hashing import GOLDEN, Purpose, chain_each, finish, key, keys


class Draws:
    """Random numbers for the samples of a batch, one row a sample.

    A row depends on (seed, epoch, sample index, how often the sample came before in the epoch) and
    on how many numbers were drawn before, not on the batch, rank or worker. `epoch` counts from 0,
    for an augmentation that changes in the course of training.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        indices: NDArray[np.integer] | Sequence[int],
        *,
        occurrences: NDArray[np.int64] | None = None,
    ):
        """Args: `occurrences` (B,) how often each sample came before in its epoch; None: never."""
        self.epoch = epoch
        self._seed = seed
        self._indices = indices
        self._keys = keys(key(seed, Purpose.SAMPLE, epoch), indices)
        if occurrences is not None:
            again = finish(chain_each(self._keys, occurrences))
            self._keys = np.where(occurrences > 0, again, self._keys)
        self._drawn = 0

    def of_every_epoch(self) -> "Draws":
        """Returns draws for the same samples that are the same in every epoch.

        They are for what a sample keeps all through training.
        """
        return Draws(self._seed, -1, self._indices)

    def _bits(self, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        width = math.prod(shape)
        first = self._drawn + 1
        self._drawn += width
        counters = np.arange(first, first + width, dtype=np.uint64) * np.uint64(GOLDEN)
        state = self._keys[:, None] + counters[None, :]
        return finish(state).reshape(len(self._keys), *shape)

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Returns float64 (B, *shape), uniform in [0, 1)."""
        return (self._bits(shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, high: int, *shape: int) -> NDArray[np.int64]:
        """Returns int64 (B, *shape), uniform in [0, high)."""
        return (self.uniform(*shape) * high).astype(np.int64)

    def normal(self, *shape: int) -> NDArray[np.float64]:
        """Returns float64 (B, *shape), standard normal. Source: Box and Muller, 1958."""
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(*shape)))
        angle = 2.0 * np.pi * self.uniform(*shape)
        return np.asarray(radius * np.cos(angle))
