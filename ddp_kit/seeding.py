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
    state = GOLDEN
    for part in parts:
        state = ((state ^ part) * 0xFF51AFD7ED558CCD + GOLDEN) & MASK
        state ^= state >> 32
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def keys(base: int, indices: NDArray[np.integer] | Sequence[int]) -> NDArray[np.uint64]:
    """Returns 64 bits for each index under the key `base`, shape (n,): splitmix64 with the index as its counter."""
    state: NDArray[np.uint64] = np.asarray(indices).astype(np.uint64)
    state = (state + np.uint64(1)) * np.uint64(GOLDEN) + np.uint64(base)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state


def permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Returns the order of `size` samples in an epoch: the indices sorted by their keys."""
    order: NDArray[np.int64] = np.argsort(keys(key(seed, Purpose.ORDER, epoch), np.arange(size)), kind="stable")
    return order


class Draws:
    """Random numbers for the samples of a batch, one row a sample.

    A row depends on (seed, epoch, sample index) and on how many numbers were drawn before, not on the batch, rank or worker.
    `epoch` counts from 0, for an augmentation that changes in the course of training.
    """

    def __init__(self, seed: int, epoch: int, indices: NDArray[np.integer] | Sequence[int]):
        self.epoch = epoch
        self._seed, self._indices = seed, indices
        self._keys = keys(key(seed, Purpose.SAMPLE, epoch), indices)
        self._drawn = 0

    def of_every_epoch(self) -> "Draws":
        """Returns draws for the same samples that are the same in every epoch: what a sample keeps all through training."""
        return Draws(self._seed, -1, self._indices)

    def _bits(self, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        width = 1
        for size in shape:
            width *= size
        counters = np.arange(self._drawn + 1, self._drawn + 1 + width, dtype=np.uint64) * np.uint64(GOLDEN)
        self._drawn += width
        state = self._keys[:, None] + counters[None, :]
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits: NDArray[np.uint64] = (state ^ (state >> np.uint64(31))).reshape(len(self._keys), *shape)
        return bits

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


def seed_generators(value: int) -> None:
    """Seeds the default generators of Python, NumPy and torch (CPU only, no CUDA call) with a 64-bit key."""
    random.seed(value)
    np.random.seed([value & 0xFFFFFFFF, value >> 32])
    torch.default_generator.manual_seed(value)


def forward_key(seed: int) -> int:
    """Returns the key of a run's forward passes, for `seed_forward`."""
    return key(seed, Purpose.FORWARD)


def seed_forward(base: int, step: int, micro_batch: int, *, device: torch.device) -> None:
    """Seeds torch's generators for one forward pass: dropout depends on (seed, step, index of the micro-batch), nothing else."""
    value = (base + step * GOLDEN + micro_batch * 0xC2B2AE3D27D4EB4F) & MASK  # once a forward pass: one round of the hash
    value = (value ^ (value >> 32)) * 0xFF51AFD7ED558CCD & MASK
    value ^= value >> 33
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)
