"""Orders as people write them: masks, floats, draws of their own. Each is read as it is meant, or refused by name."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, recipe, vectors
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from ddp_kit import Data
from ddp_kit.data.batch_plan import plan_batches
from ddp_kit.data.loader import Feed, evaluation_batches, feed_of
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DataError
from ddp_kit.setup.build import build

CPU = Placement(torch.device("cpu"))
SIZE = 48
BATCH = 12
Order = Callable[[int, int, int], Any]


class Numbers(Dataset[Any]):
    """Sample i is i."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> int:
        return range(SIZE)[index]


def feed(data: Data, *, seed: int = 0) -> Feed:
    plan = plan_batches(BATCH, micro_batch=4, world_size=1)
    return feed_of(data, plan=plan, rank=0, seed=seed, placement=CPU)


def samples(data: Data, *, start: int = 0, steps: int = 4, seed: int = 0) -> list[int]:
    found: list[int] = []
    for step in feed(data, seed=seed).batches(start=start, end=start + steps):
        for micro_batch in step.micro_batches:
            batch = micro_batch.batch
            found += (batch if isinstance(batch, torch.Tensor) else batch[0]).tolist()
    return found


MASK = np.arange(SIZE) % 2 == 0
NO_INDICES: dict[str, tuple[Order, str]] = {
    "mask": (lambda *_: MASK, "a boolean mask .*np.flatnonzero"),
    "mask of torch": (lambda *_: torch.from_numpy(MASK), "a boolean mask"),
    "list of bools": (lambda *_: MASK.tolist(), "a boolean mask"),
    "floats": (lambda seed, epoch, size: np.linspace(0, size - 1, size), "float64"),
    "floats of torch": (lambda seed, epoch, size: torch.linspace(0, size - 1, size), "float32"),
    "list of floats": (lambda seed, epoch, size: [i / 2 for i in range(size)], "float64"),
    "texts": (lambda seed, epoch, size: [str(i) for i in range(size)], "no numbers"),
    "generator": (lambda seed, epoch, size: iter(range(size)), "a range_iterator"),
    "none": (lambda *_: None, "None"),
    "batches": (lambda seed, epoch, size: np.arange(size).reshape(-1, BATCH), r"shape \(4, 12\)"),
    "ragged batches": (lambda *_: [[0, 1], [2]], "lists of different lengths"),
    "empty": (lambda *_: np.empty(0, dtype=np.int64), "no indices"),
    "empty list": (lambda *_: [], "no indices"),
    "too large": (lambda seed, epoch, size: np.arange(1, size + 1), "48"),
    "negative": (lambda seed, epoch, size: np.arange(-1, size - 1), "-1"),
    "beyond int64": (lambda seed, epoch, size: np.full(size, 2**64 - 1, np.uint64), "18446744"),
}


@pytest.mark.parametrize("kind", NO_INDICES)
def test_what_is_no_list_of_indices_is_refused_and_named(kind: str) -> None:
    order, words = NO_INDICES[kind]
    with pytest.raises(DataError, match=rf"Data.order.* epoch 0.*{words}"):
        feed(Data(Numbers(), order=order))


def test_a_later_epoch_is_looked_at_too() -> None:
    def order(seed: int, epoch: int, size: int) -> Any:
        return np.arange(size) * (1.0 if epoch else 1)

    with pytest.raises(DataError, match=r"order .* epoch 1.* float64"):
        samples(Data(Numbers(), order=lambda seed, epoch, size: order(seed, epoch, size)), steps=5)


INDICES: dict[str, Order] = {
    "list": lambda seed, epoch, size: list(range(size))[::-1],
    "range": lambda seed, epoch, size: range(size - 1, -1, -1),
    "tuple": lambda seed, epoch, size: tuple(range(size))[::-1],
    "int32": lambda seed, epoch, size: np.arange(size, dtype=np.int32)[::-1],
    "uint8": lambda seed, epoch, size: np.arange(size, dtype=np.uint8)[::-1],
    "torch": lambda seed, epoch, size: torch.arange(size).flip(0),
    "torch int32": lambda seed, epoch, size: torch.arange(size, dtype=torch.int32).flip(0),
    "list of torch": lambda seed, epoch, size: list(torch.arange(size).flip(0)),
    "list of numpy": lambda seed, epoch, size: list(np.arange(size)[::-1]),
}


@pytest.mark.parametrize("kind", INDICES)
def test_whole_numbers_of_any_kind_are_taken(kind: str) -> None:
    assert samples(Data(Numbers(), order=INDICES[kind])) == list(range(SIZE))[::-1]


NO_SUBSETS = {
    "mask": (MASK, "a boolean mask"),
    "floats": (np.arange(SIZE) / 2, "float64"),
    "too large": (np.arange(SIZE) + 1, "48"),
}


@pytest.mark.parametrize("kind", NO_SUBSETS)
@pytest.mark.ranks(1, 2)
def test_the_indices_of_a_subset_are_not_cast_either(kind: str, group: Group) -> None:
    given, words = NO_SUBSETS[kind]
    part = Subset(vectors(SIZE), given)  # type: ignore[arg-type]
    settings = Settings(run_dir="", global_batch=BATCH)
    for name, what in (("train_data", "training data"), ("eval_data", "evaluation data")):
        with pytest.raises(DataError, match=f"{what}: .*Subset.*{words}"):
            build(recipe(settings, **{name: lambda: part}), settings, group)


def test_indices_of_a_subset_count_from_the_end_as_torch_has_it() -> None:
    tensors = TensorDataset(torch.arange(SIZE))
    for dataset in (tensors, ConcatDataset([tensors])):
        part = Subset(dataset, torch.arange(-SIZE, 0).flip(0))  # type: ignore[arg-type]
        bare = [int(part[i][0]) for i in range(SIZE)]
        assert samples(Data(part, order=INDICES["list"])) == bare[::-1]


DRAWS: dict[str, Order] = {
    "random": lambda seed, epoch, size: random.sample(range(size), size),
    "numpy": lambda seed, epoch, size: np.random.permutation(size),
    "torch": lambda seed, epoch, size: torch.randperm(size),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_an_order_that_draws_from_a_default_generator_is_a_function_of_seed_and_epoch(
    kind: str,
) -> None:
    data = Data(Numbers(), order=DRAWS[kind])
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    first = samples(data, steps=8)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert before == after
    torch.manual_seed(7)
    assert samples(data, start=2, steps=6) == first[2 * BATCH :]
    assert sorted(first[:SIZE]) == list(range(SIZE))
    assert first[:SIZE] != first[SIZE:]
    assert samples(data, steps=8, seed=1) != first


@pytest.mark.ranks(1, 2)
def test_an_order_from_a_generator_of_its_own_that_moves_on_is_refused(group: Group) -> None:
    generator = np.random.default_rng(0)
    data = Data(vectors(), order=lambda seed, epoch, size: generator.permutation(size))
    settings = Settings(run_dir="")
    with pytest.raises(DataError, match=r"order gave another list .* the second time"):
        build(recipe(settings, train_data=lambda: data), settings, group)


def test_evaluation_reads_a_subset_as_bare_torch_does() -> None:
    from lives import alone

    part = Subset(TensorDataset(torch.arange(SIZE)), [-1, 3, -2, 3])
    batches = evaluation_batches(part, group=alone(), micro_batch=3)
    found = [batch.batch[0].tolist() for batch in batches]
    assert found == [[47, 3, 46], [3]]
