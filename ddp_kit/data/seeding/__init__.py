"""Randomness without state: every draw is a function of the seed and of what it is for.

There is nothing to save and nothing to restore: a counter and the seed give every draw again, on
any rank and in any loader worker. `hashing` makes keys of 64 bits, `draws` makes random numbers for
the samples of a batch, `generators` seeds the default generators of Python, NumPy and torch.
"""

from ddp_kit.data.seeding.draws import Draws
from ddp_kit.data.seeding.generators import (
    forward_key,
    generators_aside,
    generators_put_back,
    made_under_seed,
    seed_forward,
    seed_generators,
)
from ddp_kit.data.seeding.hashing import (
    Purpose,
    key,
    keys,
    occurrences_in,
    permutation,
    sample_keys,
)

__all__ = [
    "Draws",
    "Purpose",
    "forward_key",
    "generators_aside",
    "generators_put_back",
    "key",
    "keys",
    "made_under_seed",
    "occurrences_in",
    "permutation",
    "sample_keys",
    "seed_forward",
    "seed_generators",
]
