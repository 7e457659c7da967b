"""Python's, NumPy's and torch's default generators while a user's data set is read.

They are as if seeded from a key before each sample, and as they were before once the reading ends.
Seeding three generators around every sample costs more than many a data set, so a generator is
seeded only once it was seen to move: whoever reads a batch asks `have_moved` afterwards, and reads
the batch again if they have.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ddp_kit.data.seeding.generators import LOW_32, generators_aside


class KeyedGenerators:
    """The default generators as one reader of a data set leaves and finds them."""

    def __init__(self) -> None:
        self._seeds_python = False
        self._seeds_numpy = False
        self._seeds_torch = False
        self._is_installed = False
        # Two of a kind stay in step as long as nobody draws from the one that a data set finds.
        self._numpy = np.random.MT19937(0)
        self._numpy_twin = np.random.MT19937(0)
        self._python_twin = random.Random(0)
        self._torch_state = b""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts the caller's generators aside while it lasts.

        It costs 60 us, so the training process wraps a whole global batch in it.
        """
        if self._is_installed:
            yield
            return
        with generators_aside(self._numpy):
            self._install()
            try:
                yield
            finally:
                self._is_installed = False

    def install_once(self) -> None:
        """Puts the generators that a data set is to find in place for good.

        It is for a loader worker, in which nobody else draws.
        """
        if not self._is_installed:
            self._install()

    def _install(self) -> None:
        self._is_installed = True
        random.seed(0)
        self._python_twin.seed(0)
        np.random.mtrand.set_bit_generator(self._numpy)
        self._torch_state = _torch_state()

    def seed(self, key: int) -> None:
        """Seeds those generators that have been seen to move, from 64 bits."""
        if self._seeds_python:
            random.seed(key & LOW_32)
        if self._seeds_numpy:
            np.random.seed(key & LOW_32)
        if self._seeds_torch:
            torch.default_generator.manual_seed(key)

    @property
    def are_seeded(self) -> bool:
        """Whether any generator is seeded at all: else keys need not be computed."""
        return self._seeds_python or self._seeds_numpy or self._seeds_torch

    def have_moved(self) -> bool:
        """Whether a generator that is not seeded was drawn from since the last call.

        From now on it is seeded.
        """
        found = False
        if not self._seeds_python and random.getrandbits(64) != self._python_twin.getrandbits(64):
            self._seeds_python = True
            found = True
        if not self._seeds_numpy and self._numpy.random_raw() != self._numpy_twin.random_raw():
            self._seeds_numpy = True
            found = True
        if not self._seeds_torch and _torch_state() != self._torch_state:
            self._seeds_torch = True
            found = True
        return found


def _torch_state() -> bytes:
    return torch.get_rng_state().numpy().tobytes()
