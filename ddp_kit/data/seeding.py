"""Randomness without state: every draw is a function of the seed and of what it is for.

Owns: the integer hash, the permutation of an epoch, the draws of a sample, and the torch generators of a micro-batch.
Refuses: captured generator states. There is nothing to save: a counter and the seed give every draw again, on any rank or worker.

The hash is splitmix64's finaliser (Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014),
chained over the parts of a key. It is our own so that it stays the same over NumPy's and torch's versions.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
CHAIN = 0xFF51AFD7ED558CCD
LOW_32 = 0xFFFFFFFF  # NumPy takes 10 us for a longer seed, and 2 us for one of 32 bits


class Purpose(IntEnum):
    """The first part of every key after the seed, so that no two kinds of draw share a stream."""

    ORDER = 1
    SAMPLE = 2
    FORWARD = 3
    WEIGHTS = 4
    STREAM = 5
    SPLIT = 6
    BATCH = 7


def key(*parts: int) -> int:
    """Returns 64 bits that depend on every part and on their order."""
    state = _chained(*parts)
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def _chained(*parts: int) -> int:
    state = GOLDEN
    for part in parts:
        state = ((state ^ part) * CHAIN + GOLDEN) & MASK
        state ^= state >> 32
    return state


def _chained_each(state: NDArray[np.uint64], parts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Chains one more part to each state, as `_chained` does."""
    state = (state ^ parts.astype(np.uint64)) * np.uint64(CHAIN) + np.uint64(GOLDEN)
    return state ^ (state >> np.uint64(32))


def _finished(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's finaliser."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def keys(base: int, indices: NDArray[np.integer] | Sequence[int]) -> NDArray[np.uint64]:
    """Returns 64 bits for each index under the key `base`, shape (n,): splitmix64 with the index as its counter."""
    state: NDArray[np.uint64] = np.asarray(indices).astype(np.uint64)
    return _finished((state + np.uint64(1)) * np.uint64(GOLDEN) + np.uint64(base))


def sample_keys(
    seed: int, epoch: int, indices: NDArray[np.int64], occurrences: NDArray[np.int64] | None = None
) -> NDArray[np.uint64]:
    """Returns the keys of samples in an epoch, shape (n,): `key(seed, Purpose.SAMPLE, epoch, index)`, all at once.

    Args: `occurrences` (n,) how often each sample came before in its epoch; a sample's first time has the key that it has without.
    """
    state = np.full(len(indices), _chained(seed, Purpose.SAMPLE, epoch), dtype=np.uint64)
    found = _finished(_chained_each(state, indices))
    if occurrences is None or not occurrences.any():
        return found
    again = _finished(_chained_each(_chained_each(state, indices), occurrences))
    return np.where(occurrences > 0, again, found)


def occurrences_in(order: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Returns how often each entry of an order of samples came before in it, shape (n,); None if none comes twice."""
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
    order: NDArray[np.int64] = np.argsort(
        keys(key(seed, Purpose.ORDER, epoch), np.arange(size)), kind="stable"
    )
    return order


class Draws:
    """Random numbers for the samples of a batch, one row a sample.

    A row depends on (seed, epoch, sample index, how often the sample came before in the epoch) and on how many numbers were drawn
    before, not on the batch, rank or worker. `epoch` counts from 0, for an augmentation that changes in the course of training.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        indices: NDArray[np.integer] | Sequence[int],
        *,
        occurrences: NDArray[np.int64] | None = None,
    ):
        """Args: `occurrences` (B,) how often each sample came before in its epoch; None: none did."""
        self.epoch = epoch
        self._seed, self._indices = seed, indices
        self._keys = keys(key(seed, Purpose.SAMPLE, epoch), indices)
        if occurrences is not None:
            again = _finished(_chained_each(self._keys, occurrences))
            self._keys = np.where(occurrences > 0, again, self._keys)
        self._drawn = 0

    def of_every_epoch(self) -> "Draws":
        """Returns draws for the same samples that are the same in every epoch: what a sample keeps all through training."""
        return Draws(self._seed, -1, self._indices)

    def _bits(self, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        width = 1
        for size in shape:
            width *= size
        counters = np.arange(self._drawn + 1, self._drawn + 1 + width, dtype=np.uint64) * np.uint64(
            GOLDEN
        )
        self._drawn += width
        state = self._keys[:, None] + counters[None, :]
        return _finished(state).reshape(len(self._keys), *shape)

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Returns float64 (B, *shape), uniform in [0, 1)."""
        return (self._bits(shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, high: int, *shape: int) -> NDArray[np.int64]:
        """Returns int64 (B, *shape), uniform in [0, high)."""
        return (self.uniform(*shape) * high).astype(np.int64)

    def normal(self, *shape: int) -> NDArray[np.float64]:
        """Returns float64 (B, *shape), standard normal. Source: Box and Muller, 1958."""
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(*shape)))
        return np.asarray(radius * np.cos(2.0 * np.pi * self.uniform(*shape)))


@contextmanager
def generators_put_back() -> Iterator[None]:
    """Puts the default generators of Python, NumPy and torch (CPU) back at the end."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


@contextmanager
def generators_aside(numpy: np.random.BitGenerator) -> Iterator[None]:
    """As `generators_put_back`, in 60 us where that takes 110: inside, NumPy draws from `numpy`, and all three want to be seeded."""
    python = random.getstate()
    callers = np.random.mtrand.get_bit_generator()
    state = np.random.get_state(legacy=False)
    torch_state = torch.get_rng_state()
    np.random.mtrand.set_bit_generator(numpy)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.mtrand.set_bit_generator(callers)
        if state[
            "has_gauss"
        ]:  # changing the bit generator forgets the second of two normal numbers
            np.random.set_state(state)
        torch.set_rng_state(torch_state)


def seed_generators(value: int) -> None:
    """Seeds the default generators of Python, NumPy and torch (CPU only, no CUDA call) with a 64-bit key."""
    random.seed(value & LOW_32)
    np.random.seed(value & LOW_32)
    torch.default_generator.manual_seed(value)


def forward_key(seed: int) -> int:
    """Returns the key of a run's forward passes, for `seed_forward`."""
    return key(seed, Purpose.FORWARD)


def seed_forward(base: int, step: int, micro_batch: int, *, device: torch.device) -> None:
    """Seeds all default generators for one forward pass: dropout, mixup by NumPy, layers dropped by `random` depend on (seed, step,
    index of the micro-batch), nothing else.
    """
    value = (
        base + step * GOLDEN + micro_batch * 0xC2B2AE3D27D4EB4F
    ) & MASK  # once a forward pass: one round of the hash
    value = (value ^ (value >> 32)) * 0xFF51AFD7ED558CCD & MASK
    value ^= value >> 33
    seed_generators(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)
