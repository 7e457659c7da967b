"""Files that a data set opens at its first sample, and samples that an epoch draws again, in the wrappings that people give them."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, classify, recipe
from lives import live
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from ddp_kit import Data, LossSum, orders
from ddp_kit.data.batch_plan import plan_batches
from ddp_kit.data.loader import feed_of
from ddp_kit.data.transfer import Placement
from ddp_kit.testing import run_ranks

CPU = Placement(torch.device("cpu"))
FEATURES = 6
SIZE = 120


class Opened(Dataset[Any]):
    """Opens its file at the first sample, as everybody is told, and seeks before it reads."""

    def __init__(self, path: str):
        self.path = path
        self.file: Any = None

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.file is None:
            self.file = os.open(self.path, os.O_RDONLY)
        os.lseek(self.file, 8 * index, os.SEEK_SET)
        torch.randn(20)  # time for another process to seek too
        value = int(np.frombuffer(os.read(self.file, 8), dtype=np.int64)[0])
        return torch.full((FEATURES,), value / SIZE, dtype=torch.float64), value


def lived(path: str, micro_batch: Any) -> tuple[list[int], dict[str, float], list[bool]]:
    """Returns this rank's training samples, the metrics, and whether a handle was opened here."""
    made = {name: Opened(path) for name in ("train", "near", "far", "test")}
    seen: list[int] = []

    def loss(model: nn.Module, batch: Any) -> LossSum:
        inputs, values = batch
        assert torch.equal(inputs[:, 0], values.double() / SIZE)
        if model.training:
            seen.extend(values.tolist())
        return classify(model, (inputs, values % 4))

    def evaluate(model: nn.Module, batch: Any) -> dict[str, Any]:
        assert torch.equal(batch[0][:, 0], batch[1].double() / SIZE)
        return {"sum": (batch[1].sum(), 1), "count": (len(batch[1]), 1)}

    def totals(means: dict[str, float], rows: Any) -> dict[str, float]:
        return {"mean": means["sum"] / means["count"]}

    settings = Settings(
        run_dir=f"{path}.run", num_workers=2, epochs=1, max_steps=0, micro_batch=micro_batch
    )
    life = live(
        lambda own: recipe(
            own,
            loss=loss,
            train_data=lambda: ConcatDataset([made["train"], Subset(made["train"], [5] * 24)]),
            eval_data=lambda: {"near": made["near"], "far": Subset(made["far"], range(60))},
            test_data=lambda: made["test"],
            evaluate=evaluate,
            summarize=totals,
        ),
        settings,
    )
    return seen, life.metrics, [data.file is not None for data in made.values()]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, "auto"), (1, 6), (2, 6)])
def test_no_handle_is_opened_in_the_training_process_for_any_data(
    world_size: int, micro_batch: Any, tmp_path: Path
) -> None:
    np.arange(SIZE, dtype=np.int64).tofile(tmp_path / "numbers")
    ended = run_ranks(lived, world_size, str(tmp_path / "numbers"), micro_batch, group=False)
    found: list[int] = []
    for seen, metrics, are_open in ended:
        found += seen[len(seen) - 144 // world_size :]
        assert are_open == [False] * 4
        assert metrics["near/mean"] == metrics["test/mean"] == (SIZE - 1) / 2
        assert metrics["far/mean"] == 59 / 2
    assert sorted(found) == sorted([*range(SIZE), *[5] * 24])


# Samples that come again


class Drawn(Dataset[Any]):
    """Sample i with a number of each generator."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[float, ...]:
        return float(index), random.random(), np.random.rand(), torch.rand(()).item()


class Batched(Drawn):
    """Reads a batch at a time, and is given draws."""

    def __getitems__(self, indices: Any, draws: Any) -> list[tuple[float, ...]]:
        numbers = draws.uniform(3).tolist()
        return [(float(i), *row) for i, row in zip(indices, numbers, strict=True)]


def jitter(batch: Any, draws: Any) -> Any:
    return [*batch, torch.from_numpy(draws.uniform())]


ORDERS: dict[str, Any] = {
    "weighted": orders.weighted([30.0] + [1.0] * 23, samples=72),
    "mixture": orders.mixture([2, 22], weights=[1, 1], samples=72),
    "repeated three times": lambda seed, epoch, size: np.repeat(np.arange(size), 3),
    "with replacement": lambda seed, epoch, size: np.random.randint(size, size=72),
    "one alone": lambda seed, epoch, size: np.zeros(72, dtype=int),
}
SETS = {"items": Drawn(), "batches": Batched(), "subset": Subset(Drawn(), range(24))}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", SETS)
def test_each_time_a_sample_comes_it_is_augmented_anew_and_alike_for_any_split(
    kind: str, order: str
) -> None:
    data = Data(SETS[kind], order=ORDERS[order], augment=jitter)

    def read(world_size: int, num_workers: int = 0) -> list[tuple[float, ...]]:
        plan = plan_batches(12, micro_batch=3, world_size=world_size)
        steps: list[list[tuple[float, ...]]] = [[] for _ in range(12)]
        for rank in range(world_size):
            feed = feed_of(
                data, plan=plan, rank=rank, seed=0, placement=CPU, num_workers=num_workers
            )
            for batch in feed.batches(start=0, end=12):
                for part in batch.micro_batches:
                    columns = [column.tolist() for column in part.batch]
                    steps[batch.step] += list(zip(*columns, strict=True))
        return [row for step in steps for row in step]

    reference = read(1)
    # Two epochs of 72: no draw comes twice, of whichever generator.
    assert len({row[0] for row in reference[:72]}) < 72
    for column in range(1, 5):
        assert len({row[column] for row in reference}) == 144
    assert read(2) == reference
    assert read(4) == reference
    if order == "repeated three times":
        assert read(2, num_workers=2) == reference
