"""The default generators of Python, NumPy and torch: seeded for a purpose, and put back."""

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from ddp_kit.data.seeding.hashing import GOLDEN, MASK, Purpose, key

Made = TypeVar("Made")
# NumPy takes 10 us for a longer seed, and 2 us for one of 32 bits.
LOW_32 = 0xFFFFFFFF


@contextmanager
def generators_put_back() -> Iterator[None]:
    """Puts the default generators of Python, NumPy and torch (CPU) back at the end."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


@contextmanager
def generators_aside(numpy: np.random.BitGenerator) -> Iterator[None]:
    """As `generators_put_back`, in 60 us where that takes 110.

    While it lasts NumPy draws from `numpy`, and all three generators want to be seeded.
    """
    python_state = random.getstate()
    callers = np.random.mtrand.get_bit_generator()
    numpy_state = np.random.get_state(legacy=False)
    torch_state = torch.get_rng_state()
    np.random.mtrand.set_bit_generator(numpy)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.mtrand.set_bit_generator(callers)
        # Changing the bit generator forgets the second of two normal numbers.
        if numpy_state["has_gauss"]:
            np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def seed_generators(value: int) -> None:
    """Seeds the default generators of Python, NumPy and torch (CPU only) with a 64-bit key."""
    random.seed(value & LOW_32)
    np.random.seed(value & LOW_32)
    torch.default_generator.manual_seed(value)


def made_under_seed(make: Callable[..., Made], *arguments: Any, seed: int, what: str) -> Made:
    """Calls a factory of a recipe under generators that are seeded for it, and put back afterwards.

    What it draws is then the same on all ranks and in all attempts.

    Args: `what` it makes: other factories have other draws.
    """
    with generators_put_back():
        seed_generators(key(seed, Purpose.FACTORY, zlib.crc32(what.encode())))
        return make(*arguments)


def forward_key(seed: int, *, objective: int = 0) -> int:
    """Returns the key of an objective's forward passes in a run, for `seed_forward`.

    Args: `objective` its place among the recipe's; each draws numbers of its own.
    """
    if objective == 0:
        return key(seed, Purpose.FORWARD)
    return key(seed, Purpose.FORWARD, objective)


def seed_forward(base: int, step: int, micro_batch: int, *, device: torch.device) -> None:
    """Seeds all default generators for one forward pass, that of the device too.

    Dropout, mixup by NumPy and layers dropped by `random` then depend on (seed, objective, step,
    index of the micro-batch) and on nothing else.

    Args: `base` the objective's `forward_key`; `step` optimizer steps before this one;
        `micro_batch` its index in the global batch.
    """
    # Once a forward pass: one round of the hash is enough.
    value = (base + step * GOLDEN + micro_batch * 0xC2B2AE3D27D4EB4F) & MASK
    value = (value ^ (value >> 32)) * 0xFF51AFD7ED558CCD & MASK
    value ^= value >> 33
    seed_generators(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)
