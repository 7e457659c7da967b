"""Draws are functions of the seed and of what they are for."""

import random

import numpy as np
import pytest
import torch

from ddp_kit.data import orders
from ddp_kit.data.seeding import (
    Draws,
    forward_key,
    generators_put_back,
    key,
    permutation,
    seed_forward,
    seed_generators,
)
from ddp_kit.errors import DataError

GOLDEN_KEYS = [16109376577732193491, 11110072706454795156, 21077252156847029, 16545586078752390967]
GOLDEN_ORDER = [2, 8, 6, 9, 7, 4, 5, 3, 1, 0]
GOLDEN_DRAWS = [[650, 981], [734, 981]]


def test_the_hash_and_the_permutation_stay_as_they_are() -> None:
    """Golden values: a change here would change every run's numbers."""
    assert [key(0), key(1, 2, 3), key(3, 2, 1), key(-1)] == GOLDEN_KEYS
    assert permutation(0, 0, 10).tolist() == GOLDEN_ORDER
    assert Draws(1, 2, [3, 4]).integers(1000, 2).tolist() == GOLDEN_DRAWS


def test_a_permutation_has_every_index_once_and_depends_on_seed_and_epoch() -> None:
    for size in (0, 1, 2, 1000):
        assert sorted(permutation(3, 4, size).tolist()) == list(range(size))
    # torch's own sampler adds seed and epoch
    assert permutation(0, 1, 50).tolist() != permutation(1, 0, 50).tolist()


def test_the_first_places_of_permutations_are_uniform() -> None:
    firsts = np.bincount([int(permutation(seed, 0, 8)[0]) for seed in range(8000)], minlength=8)
    assert abs(firsts - 1000).max() < 150  # 5 standard deviations


def test_a_samples_draws_do_not_depend_on_its_batch() -> None:
    alone = Draws(0, 1, [7])
    together = Draws(0, 1, [3, 7, 9])
    for draw in ("uniform", "normal"):
        assert getattr(alone, draw)(2)[0].tolist() == getattr(together, draw)(2)[1].tolist()
    assert alone.integers(10).shape == (1,)
    values = Draws(0, 0, np.arange(100_000)).normal()
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


def test_keyed_generators_seed_and_put_back_all_three() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.random()), torch.rand(()).item()]

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with generators_put_back():
        seed_generators(key(5, 6))
        first = draw()
    assert draw() == expected
    seed_generators(key(5, 6))
    assert draw() == first


def test_forward_seeds_differ_by_step_and_micro_batch_and_nothing_else() -> None:
    seen = set()
    for step in range(50):
        for micro_batch in range(50):
            seed_forward(forward_key(0), step, micro_batch, device=torch.device("cpu"))
            seen.add(torch.rand(()).item())
    assert len(seen) > 2490
    seed_forward(forward_key(0), 3, 4, device=torch.device("cpu"))
    first = torch.rand(5)
    seed_forward(forward_key(0), 3, 4, device=torch.device("cpu"))
    assert torch.equal(first, torch.rand(5))


def test_weighted_orders_draw_in_proportion_and_never_weight_zero() -> None:
    order = orders.weighted([0.0, 1.0, 3.0, 0.0], samples=40_000)
    drawn = np.bincount(order(0, 0, 4), minlength=4)
    assert drawn[0] == drawn[3] == 0
    assert abs(drawn[2] / drawn[1] - 3) < 0.15
    with pytest.raises(DataError, match="none negative"):
        orders.weighted([1.0, -1.0])


def test_orders_by_length_keep_lengths_together_and_samples_apart() -> None:
    lengths = np.arange(100) % 10
    order = orders.by_length(lengths, group=8)(0, 0, 100)
    assert len(set(order.tolist())) == 96
    assert max(np.ptp(lengths[order[i : i + 8]]) for i in range(0, 96, 8)) <= 1
    assert order.tolist() != orders.by_length(lengths, group=8)(0, 1, 100).tolist()


def test_mixtures_take_from_parts_in_proportion_without_repeats_before_all_were_seen() -> None:
    order = orders.mixture([100, 10], weights=[1, 1], samples=200)(0, 0, 110)
    first = order[order < 100]
    second = order[order >= 100]
    assert abs(len(second) - 100) < 40
    assert len(set(first[:100].tolist())) == len(first[:100])
    assert sorted(second[:10].tolist()) == list(range(100, 110))


def test_draws_of_every_epoch_are_the_same_in_each_and_others_than_those_of_any() -> None:
    first = Draws(1, 0, [3, 4]).of_every_epoch().integers(1000, 5).tolist()
    later = Draws(1, 7, [3, 4]).of_every_epoch().integers(1000, 5).tolist()
    assert first == later
    assert first not in [Draws(1, epoch, [3, 4]).integers(1000, 5).tolist() for epoch in range(8)]
    assert Draws(1, 7, [3]).epoch == 7
