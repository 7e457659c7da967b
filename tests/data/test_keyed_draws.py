"""Draws by other people's code, of any kind: keyed by sample, or by the step, and by nothing else."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, recipe, trace
from torch import nn
from torch.utils.data import Dataset

import ddp_kit
from ddp_kit import Data
from ddp_kit.data import orders
from ddp_kit.data.batch_plan import plan_batches
from ddp_kit.data.loader import feed_of
from ddp_kit.data.seeding import Draws, Purpose, key, occurrences_in, sample_keys
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.process_group import Group
from ddp_kit.testing import assert_same_on_all_ranks, current_group, run_ranks

CPU = Placement(torch.device("cpu"))
FEATURES = 6


class Drawing(Dataset[Any]):
    """Draws from one of the default generators, from a certain sample on."""

    def __init__(self, kind: str, *, begins_at: int = 0):
        self.kind = kind
        self.begins_at = begins_at
        self.reads = 0

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[int, float]:
        self.reads += 1
        if index < self.begins_at:
            return index, 0.0
        draws = {
            "python": random.random,
            "numpy": lambda: float(np.random.normal()),
            "torch": lambda: torch.rand(()).item(),
            "none": lambda: 1.0,
        }
        return index, draws[self.kind]()


def all_of(steps: list[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(steps))


def samples_of(
    data: Data,
    *,
    world_size: int,
    steps: int,
    start: int = 0,
    num_workers: int = 0,
    global_batch: int = 12,
) -> list[list[Any]]:
    """Returns each step's samples, put together from all ranks."""
    found: list[list[Any]] = [[] for _ in range(steps - start)]
    plan = plan_batches(global_batch, micro_batch=3, world_size=world_size)
    for rank in range(world_size):
        feed = feed_of(data, plan=plan, rank=rank, seed=3, placement=CPU, num_workers=num_workers)
        for batch in feed.batches(start=start, end=steps):
            for micro_batch in batch.micro_batches:
                found[batch.step - start] += list(
                    zip(*(column.tolist() for column in micro_batch.batch), strict=True)
                )
    return found


@pytest.mark.parametrize("begins_at", [0, 25, 49])
@pytest.mark.parametrize("kind", ["python", "numpy", "torch"])
def test_draws_are_keyed_by_sample_though_a_generator_is_seeded_only_once_it_moves(
    kind: str, begins_at: int
) -> None:
    data = Data(Drawing(kind, begins_at=begins_at))
    reference = samples_of(data, world_size=1, steps=8)
    assert samples_of(data, world_size=2, steps=8) == reference
    assert samples_of(data, world_size=2, steps=8, num_workers=2) == reference
    assert samples_of(data, world_size=1, steps=8, start=5) == reference[5:]


def test_a_data_set_that_draws_nothing_is_read_once_and_one_that_draws_a_batch_more() -> None:
    for kind, more in (("none", 0), ("numpy", 3)):
        data = Data(Drawing(kind))
        samples_of(data, world_size=1, steps=4)
        assert data.dataset.reads == 48 + more


@pytest.mark.parametrize("kind", ["python", "numpy", "torch"])
@pytest.mark.parametrize("place", ["augment", "collate"])
def test_draws_in_augment_and_collate_are_keyed_too(kind: str, place: str) -> None:
    drawing = Drawing(kind)

    def change(batch: Any, *_: Any) -> Any:
        columns = batch
        if place == "collate":
            columns = torch.utils.data.default_collate(batch)
        return [columns[0], columns[1] + drawing[99][1]]

    data = Data(Drawing("none"), **{place: change})
    reference = samples_of(data, world_size=1, steps=4)
    assert len({value for _, value in all_of(reference)}) > 4
    assert samples_of(data, world_size=2, steps=4) == reference
    assert samples_of(data, world_size=1, steps=4, start=2) == reference[2:]


def test_reading_puts_all_three_generators_back_a_second_normal_number_too() -> None:
    def next_numbers() -> list[float]:
        return [
            random.random(),
            float(np.random.normal()),
            float(np.random.normal()),
            torch.rand(()).item(),
        ]

    def seeded() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        np.random.normal()  # NumPy keeps the second of two for later

    seeded()
    expected = next_numbers()
    for kind in ("python", "numpy", "torch"):
        seeded()
        samples_of(Data(Drawing(kind)), world_size=1, steps=3)
        assert next_numbers() == expected


class Flipped(Dataset[Any]):
    """Has a random number of its own each time that a sample is read."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, torch.rand(()).item()


class FlippedBatches(Flipped):
    def __getitems__(
        self, indices: Any, draws: Draws | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert draws is not None
        return torch.as_tensor(indices), torch.from_numpy(draws.uniform())


def augmented(batch: Any, draws: Draws) -> Any:
    return [batch[0], torch.from_numpy(draws.uniform())]


@pytest.mark.parametrize(
    "data",
    [Data(Flipped(8)), Data(FlippedBatches(8)), Data(Flipped(8), augment=augmented)],
    ids=["items", "batches", "augment"],
)
def test_a_sample_drawn_again_in_an_epoch_is_changed_otherwise(data: Data) -> None:
    weighted = Data(
        data.dataset, augment=data.augment, order=orders.weighted([20.0] + [1.0] * 7, samples=48)
    )
    steps = samples_of(weighted, world_size=1, steps=4)
    rare = [value for index, value in all_of(steps) if index == 0]
    assert len(rare) > 20
    assert len(set(rare)) == len(rare)
    assert samples_of(weighted, world_size=2, steps=4) == steps
    assert samples_of(weighted, world_size=1, steps=4, start=2) == steps[2:]
    once = dict(all_of(samples_of(data, world_size=1, steps=2, global_batch=3)))
    first: dict[int, float] = {}
    for index, value in all_of(steps):
        first.setdefault(index, value)
    for index in once.keys() & first.keys():
        assert first[index] == once[index]


def test_keys_of_a_batch_are_those_of_its_samples_and_occurrences_are_counted() -> None:
    indices = np.array([7, 0, 2**40, 7])
    expected = [key(5, Purpose.SAMPLE, 2, int(index)) for index in indices]
    assert sample_keys(5, 2, indices).tolist() == expected
    again = sample_keys(5, 2, indices, np.array([0, 0, 0, 1])).tolist()
    assert again[:3] == expected[:3]
    assert again[3] == key(5, Purpose.SAMPLE, 2, 7, 1)
    assert occurrences_in(np.array([3, 1, 2])) is None
    found = occurrences_in(np.array([3, 1, 3, 3, 1]))
    assert found is not None
    assert found.tolist() == [0, 0, 1, 2, 1]


class Mixed(nn.Module):
    """Mixes by NumPy and drops a layer by `random`, as mixup and LayerDrop are written."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(2))
        self.head = nn.Linear(FEATURES, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = float(np.random.beta(0.4, 0.4))
        x = share * x + (1 - share) * x.flip(0)
        for layer in self.layers:
            if random.random() < 0.7:
                x = x + torch.tanh(layer(x))
        return self.head(x)


def weights_after(folder: Path, *, exact: bool, noise: int) -> str:
    """Trains in a process that has drawn something of its own before."""
    random.seed(noise)
    np.random.seed(noise)
    settings = Settings(
        run_dir=str(folder), max_steps=5, micro_batch=6, exact=exact, find_unused_parameters=True
    )
    return ddp_kit.run(recipe(settings, model=Mixed), settings).weights_sha256


@pytest.mark.parametrize("exact", [False, True])
def test_draws_by_python_and_numpy_in_the_model_follow_from_the_seed(
    tmp_path: Path, exact: bool
) -> None:
    found = {weights_after(tmp_path / str(noise), exact=exact, noise=noise) for noise in range(3)}
    assert len(found) == 1


def losses_on_a_rank() -> list[float]:
    group = current_group()
    random.seed(group.rank)
    np.random.seed(group.world_size)
    settings = Settings(micro_batch=6, max_steps=5, find_unused_parameters=True, run_dir="")
    return trace(group, recipe(settings, model=Mixed), settings).losses


def test_draws_by_python_and_numpy_in_the_model_are_the_same_on_any_number_of_ranks() -> None:
    alone, *others = (run_ranks(losses_on_a_rank, world_size)[0] for world_size in (1, 2, 4))
    for found in others:
        assert found == pytest.approx(alone, rel=1e-9)


class Noisy(torch.optim.SGD):
    """Adds noise to each weight, as Langevin dynamics does."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=1e-2)


@pytest.mark.ranks(2, 4)
def test_an_optimizer_that_draws_leaves_the_same_weights_on_all_ranks(group: Group) -> None:
    settings = Settings(micro_batch=6, max_steps=3, run_dir="")
    made = recipe(settings, optimizer=lambda model: Noisy(model.parameters(), lr=0.1))
    state = trace(group, made, settings).state
    assert_same_on_all_ranks(state, group)
