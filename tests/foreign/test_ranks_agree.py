"""Data that differs by rank: lengths, orders, splits drawn without a seed. Made alike where that can be, else refused with the rank's name."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, classify, plain, recipe, trace, vectors
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from ddp_kit import Data, LossSum, process_group
from ddp_kit.distributed.collectives import gather_bytes
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DataError
from ddp_kit.recipe import load_recipe
from ddp_kit.setup.build import Built, build
from ddp_kit.testing import run_ranks
from ddp_kit.training.step import train_step

SETTINGS = Settings(run_dir="")


class Sized(IterableDataset[Any]):
    def __init__(self, size: int):
        self.samples = vectors(size)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Any:
        yield from self.samples


# Lengths

KINDS: dict[str, Callable[[int], Any]] = {
    "map": vectors,
    "subset": lambda size: Subset(vectors(400), range(size)),
    "concatenated": lambda size: ConcatDataset([vectors(size // 2)] * 2),
    "stream": Sized,
}


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_that_differ_are_refused_with_both_and_the_rank(kind: str, group: Group) -> None:
    last = group.world_size - 1
    made = KINDS[kind](192 if group.rank == last else 240)
    for name, what in (
        ("train_data", "training data"),
        ("eval_data", "evaluation data"),
        ("test_data", "test data"),
    ):
        words = f"the {what} has 192 samples on rank {last} and 240 on rank 0"
        with pytest.raises(DataError, match=words):
            build(recipe(SETTINGS, **{name: lambda: made}), SETTINGS, group)


@pytest.mark.ranks(2)
def test_each_of_several_sets_is_compared_and_so_are_their_names(group: Group) -> None:
    far = vectors(17 + group.rank)
    for name, what in (("eval_data", "evaluation data"), ("test_data", "test data")):
        made = recipe(SETTINGS, **{name: lambda: {"near": vectors(40), "far": far}})
        with pytest.raises(DataError, match=f"the {what} far has 18 samples on rank 1 and 17"):
            build(made, SETTINGS, group)
        others = {"near": vectors(40), f"of {group.rank}": vectors(40)}
        made = recipe(SETTINGS, **{name: lambda others=others: others})
        with pytest.raises(DataError, match=f"{what}: near, of 1 on rank 1, near, of 0 on rank 0"):
            build(made, SETTINGS, group)


@pytest.mark.ranks(2)
def test_data_that_is_empty_or_missing_on_one_rank_is_named_on_all(group: Group) -> None:
    own = vectors(0 if group.rank else 40)
    made = recipe(SETTINGS, eval_data=lambda: own)
    with pytest.raises(DataError, match="evaluation data has 0 samples on rank 1 and 40 on rank 0"):
        build(made, SETTINGS, group)
    made = recipe(SETTINGS, train_data=lambda: own)
    with pytest.raises(DataError, match="training data has 0 samples on rank 1 and 40 on rank 0"):
        build(made, SETTINGS, group)
    made = recipe(SETTINGS, eval_data=vectors if group.rank == 0 else None)
    with pytest.raises(DataError, match="evaluation data: none on rank 1"):
        build(made, SETTINGS, group)


# Orders and content


@pytest.mark.ranks(2, 3)
def test_an_order_that_depends_on_the_rank_is_refused_where_the_first_batch_is_the_same(
    group: Group,
) -> None:
    def order(seed: int, epoch: int, size: int) -> Any:
        found = np.arange(size)
        if group.rank == 1:
            found[-2:] = found[-2:][::-1]
        return found

    made = recipe(SETTINGS, train_data=lambda: Data(vectors(), order=order))
    with pytest.raises(DataError, match="order of epoch 0 is another one on rank 1"):
        build(made, SETTINGS, group)


class ByRank(Dataset[Any]):
    def __init__(self, rank: int):
        self.rank = rank

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Any:
        return torch.full((6,), 1000.0 * self.rank + index, dtype=torch.float64), index % 4


@pytest.mark.ranks(2)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_and_test_data_that_differ_by_rank_are_refused(
    num_workers: int, group: Group
) -> None:
    settings = Settings(run_dir="", num_workers=num_workers)
    for name, what in (("eval_data", "evaluation data b"), ("test_data", "test data b")):
        sets = {"a": vectors(), "b": ByRank(group.rank)}
        made = recipe(settings, **{name: lambda sets=sets: sets})
        with pytest.raises(DataError, match=f"the {what} gives rank 1 other samples than rank 0"):
            build(made, settings, group)


# Draws in factories

SIZE = 120


def numbers() -> TensorDataset:
    inputs = torch.zeros(SIZE, 6, dtype=torch.float64)
    inputs[:, 0] = torch.arange(SIZE)
    return TensorDataset(inputs, torch.arange(SIZE))


def by_numpy() -> Any:
    return np.random.permutation(SIZE)


def by_random() -> Any:
    return random.sample(range(SIZE), SIZE)


def by_torch() -> Any:
    return torch.randperm(SIZE)


DRAWS = {"numpy": by_numpy, "random": by_random, "torch": by_torch}


def spoil(group: Group) -> None:
    """Leaves each rank's generators elsewhere, as processes that nobody seeds have them."""
    random.seed(100 + group.rank)
    np.random.seed(100 + group.rank)
    torch.manual_seed(100 + group.rank)


def trained_on(made: Built, group: Group, *, steps: int) -> list[int]:
    """Returns the samples of some steps, of all ranks."""
    own: list[int] = []
    for batch in made.feed.batches(start=0, end=steps):
        for micro_batch in batch.micro_batches:
            own += micro_batch.batch[0][:, 0].int().tolist()
    rows = gather_bytes(group, ",".join(map(str, own)).encode())
    found: list[int] = []
    for row in rows:
        found += [int(value) for value in row.decode().split(",")]
    return found


def modulo(model: nn.Module, batch: Any) -> LossSum:
    inputs, numbers_ = batch
    return classify(model, (inputs / SIZE, numbers_ % 4))


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("kind", DRAWS)
def test_a_split_drawn_in_a_factory_is_the_same_on_all_ranks_and_on_all_starts(
    kind: str, group: Group
) -> None:
    draw = DRAWS[kind]
    parts: dict[str, Any] = {}

    def train_data() -> Any:
        # As it is written: split once, and kept for the validation data.
        found = draw()
        parts["train"] = [int(index) for index in found[:96]]
        parts["eval"] = [int(index) for index in found[96:]]
        return Subset(numbers(), found[:96])

    first: dict[str, Any] = {}
    for _ in range(2):
        spoil(group)
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
        made = build(
            recipe(
                SETTINGS,
                loss=modulo,
                train_data=train_data,
                eval_data=lambda: Subset(numbers(), parts["eval"]),
            ),
            SETTINGS,
            group,
        )
        after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])
        found = trained_on(made, group, steps=4)
        made.training.control_packet.close()
        assert sorted(found) == sorted(parts["train"])
        assert not set(found) & set(parts["eval"])
        first = first or dict(parts)
        assert parts == first
    assert set(gather_bytes(group, str(parts).encode())) == {str(parts).encode()}


@pytest.mark.ranks(1, 2)
def test_an_order_drawn_in_a_factory_is_the_same_on_all_ranks(group: Group) -> None:
    def train_data() -> Any:
        drawn = np.random.permutation(SIZE)
        return Data(numbers(), order=lambda seed, epoch, size: drawn)

    spoil(group)
    made = build(recipe(SETTINGS, loss=modulo, train_data=train_data), SETTINGS, group)
    assert sorted(trained_on(made, group, steps=5)) == list(range(SIZE))
    made.training.control_packet.close()


class Drawn(nn.Module):
    """Draws its shape and values as layers do that are built by NumPy or `random`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()
        self.scale = nn.Parameter(torch.tensor(np.random.rand(6)))
        self.keep = random.random()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs * self.scale.to(inputs.dtype)) * self.keep


def losses_of(seed: int) -> list[float]:
    """Returns the losses of a run of which model, optimizer and data draw without a seed."""

    def train_data() -> Any:
        noise = np.random.randn(240, 6)
        inputs, labels = vectors().tensors
        return TensorDataset(inputs + torch.from_numpy(noise), labels)

    def optimizer(model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1 * (1 + random.random()))

    settings = Settings(run_dir="", seed=seed)
    made = recipe(settings, model=Drawn, train_data=train_data, optimizer=optimizer)
    with process_group(device="cpu") as group:
        spoil(group)
        return trace(group, made, settings).losses


def test_models_optimizers_and_data_that_draw_train_alike_on_any_number_of_ranks_and_starts() -> (
    None
):
    (reference,) = run_ranks(losses_of, 1, 0, group=False)
    for losses in run_ranks(losses_of, 2, 0, group=False):
        assert losses == pytest.approx(reference, rel=1e-9)
    (other,) = run_ranks(losses_of, 1, 1, group=False)
    assert other != pytest.approx(reference, rel=1e-3)


TEXT = """
import random
from dataclasses import dataclass

import numpy as np

import ddp_kit

AT_IMPORT = np.random.rand(), random.random()


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    epochs: int = 1


def recipe(settings):
    return AT_IMPORT, (np.random.rand(), random.random())
"""


def test_what_a_recipes_file_draws_is_the_same_on_every_start(tmp_path: Path) -> None:
    drawn = []
    for name in ("one", "other"):
        path = tmp_path / f"{name}.py"
        path.write_text(TEXT)
        random.seed(len(drawn))
        np.random.seed(len(drawn))
        before = random.getstate()
        source = load_recipe(str(path))
        drawn.append(source.build(source.settings()))
        assert random.getstate() == before
        assert source.build(source.settings(seed=1)) != drawn[-1]
        sys.modules.pop(name)
    assert drawn[0] == drawn[1]


@pytest.mark.ranks(1, 2)
def test_steps_are_taken_after_all_that(group: Group) -> None:
    """The comparisons at start leave the ranks in step."""
    made = build(
        recipe(SETTINGS, eval_data=lambda: {"a": vectors(40), "b": Sized(17)}, test_data=vectors),
        SETTINGS,
        group,
    )
    for batch in made.feed.batches(start=0, end=2):
        train_step(made.training, batch)
    assert made.evaluator(made.training.model)
    made.training.control_packet.close()
