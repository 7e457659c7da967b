"""The train loader: the same samples with the same random changes, whoever reads them."""

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from ddp_kit import Data, build_loader
from ddp_kit.data.batch_plan import describe, plan_batches
from ddp_kit.data.loader import Feed, feed_of
from ddp_kit.data.sampler import GlobalBatchSampler
from ddp_kit.data.seeding import Draws, permutation
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.process_group import process_group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError, DataError

CPU = Placement(torch.device("cpu"))
SIZE = 50
BATCH = 12


class Noisy(Dataset[Any]):
    """Draws from all three default generators, as torchvision's transforms do."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), float(np.random.random()), torch.rand(()).item()


class Keyed(Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitems__(
        self, indices: Any, draws: Draws | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert draws is not None
        return torch.as_tensor(indices), torch.from_numpy(draws.uniform())


class Stream(IterableDataset[Any]):
    def __init__(self, *, knows_length: bool = True):
        self.epoch = 0
        if knows_length:
            self.__class__ = type("Sized", (Stream,), {"__len__": lambda self: SIZE})

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, float]]:
        for i in range(SIZE):
            yield 1000 * self.epoch + i, random.random()


def feeds(data: Data, *, world_size: int, micro_batch: int = 0, num_workers: int = 0) -> list[Feed]:
    plan = plan_batches(BATCH, micro_batch=micro_batch, world_size=world_size)
    return [
        feed_of(data, plan=plan, rank=rank, seed=3, placement=CPU, num_workers=num_workers)
        for rank in range(world_size)
    ]


def read(
    data: Data, *, start: int = 0, end: int = 9, **split: int
) -> list[list[tuple[float, ...]]]:
    """Returns the samples of each global batch, put together from all ranks in order."""
    steps: list[list[tuple[float, ...]]] = [[] for _ in range(start, end)]
    for feed in feeds(data, **split):
        for batch in feed.batches(start=start, end=end):
            for micro_batch in batch.micro_batches:
                steps[batch.step - start] += list(
                    zip(*(column.tolist() for column in micro_batch.batch), strict=True)
                )
    return steps


def together(batches: Iterable[Iterable[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(batches))


DATASETS = {"items": Noisy, "batches": Keyed, "stream": Stream}


@pytest.mark.parametrize("name", DATASETS)
def test_every_split_and_every_worker_reads_the_same(name: str) -> None:
    data = Data(
        DATASETS[name](), augment=lambda batch, draws: [*batch, torch.from_numpy(draws.uniform())]
    )
    reference = read(data, world_size=1)
    assert [len(batch) for batch in reference] == [BATCH] * 9
    for split in (
        {"world_size": 3},
        {"world_size": 2, "micro_batch": 3},
        {"world_size": 5, "micro_batch": 2},
    ):
        assert read(data, **split) == reference
    assert read(data, world_size=2, micro_batch=3, num_workers=2) == reference
    assert read(data, start=4, world_size=2) == reference[4:]


def test_each_epoch_has_another_order_and_drops_another_tail() -> None:
    steps = read(Data(Noisy()), world_size=1, end=8)
    epochs = []
    for first in (0, 4):
        samples = together(steps[first : first + 4])
        epochs.append([int(sample[0]) for sample in samples])
    for number, epoch in enumerate(epochs):
        assert epoch == permutation(3, number, SIZE)[:48].tolist()
        assert len(set(epoch)) == 48  # at most once
    assert set(epochs[0]) != set(epochs[1])


def test_a_sample_is_changed_otherwise_in_another_epoch() -> None:
    steps = read(Data(Noisy()), world_size=1, end=8)
    drawn = []
    for first in (0, 4):
        samples = together(steps[first : first + 4])
        drawn.append({sample[0]: sample[1:] for sample in samples})
    both = drawn[0].keys() & drawn[1].keys()
    assert both
    assert not any(drawn[0][index] == drawn[1][index] for index in both)


def test_reading_does_not_disturb_the_default_generators() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    read(Data(Noisy()), world_size=1)
    assert torch.equal(torch.rand(3), expected)


def test_subsets_and_tensor_sets_are_read_as_what_they_hold() -> None:
    tensors = TensorDataset(torch.arange(SIZE), torch.arange(SIZE) * 2)
    even = Subset(Subset(tensors, range(1, SIZE)), range(1, SIZE - 1, 2))
    samples = together(read(Data(even), world_size=2, end=2))
    assert {sample[0] % 2 for sample in samples} == {0}
    noisy = Subset(Noisy(), range(20, 45))
    assert read(Data(noisy), world_size=1, end=2) == read(Data(noisy), world_size=3, end=2)
    assert read(Data(ConcatDataset([Noisy(), Noisy()])), world_size=1, end=2) == read(
        Data(ConcatDataset([Noisy(), Noisy()])), world_size=2, end=2
    )


def test_a_stream_without_length_goes_on_to_the_next_epoch_by_itself() -> None:
    data = Data(Stream(knows_length=False))
    steps = read(data, world_size=2, end=6)
    assert [int(batch[0][0]) for batch in steps] == [0, 12, 24, 36, 1000, 1012]
    assert feeds(data, world_size=1)[0].steps_per_epoch == 0
    plan = plan_batches(64, micro_batch=0, world_size=1)
    feed = feed_of(data, plan=plan, rank=0, seed=0, placement=CPU)
    with pytest.raises(DataError, match="less than one global batch"):
        list(feed.batches(start=0, end=1))


def test_the_sampler_serves_torchs_own_loader_and_moves_on_by_itself() -> None:
    plan = plan_batches(BATCH, micro_batch=3, world_size=2)
    sampler = GlobalBatchSampler(Noisy(), plan=plan, rank=1, seed=3)
    loader = DataLoader(Noisy(), batch_sampler=sampler)
    for epoch in range(2):
        indices = together(batch[0].tolist() for batch in loader)
        order = permutation(3, epoch, SIZE)
        assert indices == together(order[12 * k + 6 : 12 * k + 12].tolist() for k in range(4))
    assert len(sampler) == 8


def test_an_order_is_checked() -> None:
    for order, words in (
        (lambda *_: [0, 1, SIZE] * 5, "the index 50 where there are 0 to 49"),
        (lambda seed, epoch, size: list(range(size - 12 * epoch)), "has 38 samples"),
    ):
        with pytest.raises(DataError, match=words):
            read(Data(Noisy(), order=order), world_size=1)


def test_data_that_is_empty_or_too_small_is_refused() -> None:
    with process_group(topology=Topology(), device="cpu") as group:
        for data, words in (
            (TensorDataset(torch.zeros(0)), "is empty"),
            (TensorDataset(torch.zeros(3)), "Type --global-batch 3 or less"),
            ({1, 2}, "got set"),
        ):
            with pytest.raises(DataError, match=words):
                build_loader(data, group=group, global_batch=4)


def test_the_split_is_printed_and_balanced() -> None:
    lines = {
        (512, 128, 2): "512 global = 2 ranks x 128 micro-batch x 2 accumulation",
        (512, 50, 3): "512 global = 171 + 171 + 170, in micro-batches of 43 or 42",
        (512, 64, 3): "512 global = 192 + 192 + 128, in micro-batches of 64",
        (512, 0, 1): "512 global = 1 rank x 512 micro-batch x 1 accumulation",
        (10, 0, 9): "10 global = 1 x 2 + 8 x 1, in micro-batches of 2 or 1",
    }
    for (global_batch, micro_batch, world_size), line in lines.items():
        plan = plan_batches(global_batch, micro_batch=micro_batch, world_size=world_size)
        assert describe(plan) == line
    with pytest.raises(ConfigError, match="fewer samples than there are ranks"):
        plan_batches(3, micro_batch=0, world_size=4)


@pytest.mark.parametrize("micro_batch", [0, 1, 3, 7, 8, 64, 1000])
def test_any_world_size_gets_all_of_a_global_batch_once(micro_batch: int) -> None:
    for global_batch in (1, 7, 64, 100):
        for world_size in range(1, min(global_batch, 20) + 1):
            plan = plan_batches(global_batch, micro_batch=micro_batch, world_size=world_size)
            of_ranks = [plan.of_rank(rank) for rank in range(world_size)]
            pieces = together(of_ranks)
            assert [i for i, _, _ in pieces] == list(range(plan.micro_batches))
            firsts = [first for _, first, _ in pieces]
            stops = [stop for _, _, stop in pieces]
            assert [*firsts, global_batch] == [0, *stops]
            assert all(of_ranks)
            assert max(stop - first for _, first, stop in pieces) <= (micro_batch or global_batch)
            if not plan.is_invariant:
                shares = [own[-1][2] - own[0][1] for own in of_ranks]
                assert max(shares) - min(shares) <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_that_a_data_set_makes_on_the_device_are_used_where_they_are() -> None:
    class OnDevice(Dataset[Any]):
        values = torch.arange(8.0, device="cuda")

        def __len__(self) -> int:
            return len(self.values)

        def __getitems__(self, indices: Any, draws: Draws | None = None) -> torch.Tensor:
            return self.values[torch.as_tensor(indices, device="cuda")]

    plan = plan_batches(4, micro_batch=2, world_size=1)
    feed = feed_of(
        Data(OnDevice()), plan=plan, rank=0, seed=0, placement=Placement(torch.device("cuda:0"))
    )
    parts = together(batch.micro_batches for batch in feed.batches(start=0, end=2))
    seen = [part.batch for part in parts]
    assert all(batch.is_cuda for batch in seen)
    assert sorted(torch.cat(seen).tolist()) == list(range(8))
