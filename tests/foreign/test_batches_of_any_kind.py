"""Batches of other kinds than tuples and dicts of tensors: on their way to the device, and compared over ranks."""

from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, distance, recipe, trace, vectors
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import Dataset, default_collate

from ddp_kit import Data, LossSum
from ddp_kit.data.transfer import Placement, stays_in_stream
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import DataError, DdpKitError
from ddp_kit.setup.build import build
from ddp_kit.setup.census import all_like_the_first
from ddp_kit.training.step import train_step


@dataclass(frozen=True, slots=True)
class Record:
    """Frozen, with a constructor of which its fields say nothing."""

    x: torch.Tensor
    y: torch.Tensor
    names: list[str] = field(default_factory=list)
    size: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.size + len(self.y))


Pair = namedtuple("Pair", ["x", "y"])


class Encoding(UserDict):  # type: ignore[type-arg]
    """As tokenizers have it: a mapping that knows attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any, *, non_blocking: bool = False) -> "Encoding":
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Graph:
    """As graph libraries have it: no container that anybody knows, and it moves itself."""

    def __init__(self, **tensors: Any):
        self.store = dict(tensors)

    def __getattr__(self, name: str) -> Any:
        if name == "store" or name not in self.store:
            raise AttributeError(name)
        return self.store[name]

    def to(self, device: Any, *args: Any, non_blocking: bool = False) -> "Graph":
        moved = {key: value.to(device, *args) for key, value in self.store.items()}
        self.non_blocking = non_blocking
        return Graph(**moved)


class Forgetful(Graph):
    """Moves itself in place and returns nothing."""

    def to(self, device: Any) -> None:  # type: ignore[override]
        self.store = {key: value.to(device) for key, value in self.store.items()}


def record_of(samples: list[Any]) -> Record:
    x, y = default_collate(samples)
    return Record(x, y, names=["a"] * len(y))


def packed_of(samples: list[Any]) -> dict[str, Any]:
    sequences = [x[: 1 + int(y)] for x, y in samples]
    return {
        "x": pack_sequence(sequences, enforce_sorted=False),
        "y": torch.stack([y for _, y in samples]),
    }


def holds(kind: Any) -> Callable[[list[Any]], Any]:
    def collate(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return kind(x=x, y=y)

    return collate


COLLATES: dict[str, Callable[[list[Any]], Any]] = {
    "dataclass": record_of,
    "namedtuple": holds(Pair),
    "encoding": holds(Encoding),
    "graph": holds(Graph),
    "forgetful": holds(Forgetful),
    "namespace": holds(SimpleNamespace),
}


def loss(model: nn.Module, batch: Any) -> LossSum:
    x = batch.x.to(next(model.parameters()).dtype)
    return LossSum(cross_entropy(model(x), batch.y, reduction="sum"), len(batch.y))


def on_tuples(model: nn.Module, batch: Any) -> LossSum:
    return loss(model, Pair(*batch))


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("kind", COLLATES)
def test_a_batch_of_any_kind_trains_as_a_tuple_of_its_tensors_does(group: Group, kind: str) -> None:
    settings = Settings(micro_batch=4)
    made = recipe(settings, loss=loss, train_data=lambda: Data(vectors(), collate=COLLATES[kind]))
    ours = trace(group, made, settings)
    with process_group(topology=Topology(), device="cpu") as one:
        tuples = trace(one, recipe(settings, loss=on_tuples), settings)
    assert distance(ours.state, tuples.state) <= 1e-12


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(1, 4, batch_first=True)

    def forward(self, x: Any) -> Any:
        out, _ = pad_packed_sequence(self.inner(x)[0], batch_first=True)
        return out.sum(1)


class Ragged(Dataset[Any]):
    def __len__(self) -> int:
        return 240

    def __getitem__(self, index: int) -> Any:
        x, y = vectors().tensors
        return x[index, :, None], y[index]


def packed_loss(model: nn.Module, batch: Any) -> LossSum:
    logits = model(batch["x"])
    return LossSum(cross_entropy(logits, batch["y"], reduction="sum"), len(batch["y"]))


@pytest.mark.ranks(1, 2)
def test_packed_sequences_of_ragged_lengths_train_as_one_rank_and_bare_torch_do(
    group: Group,
) -> None:
    from ddp_kit.data.seeding import Purpose, key, permutation

    settings = Settings(micro_batch=4)
    made = recipe(
        settings,
        model=Recurrent,
        loss=packed_loss,
        train_data=lambda: Data(Ragged(), collate=packed_of),
    )
    ours = trace(group, made, settings)
    torch.manual_seed(key(settings.seed, Purpose.WEIGHTS))
    net = Recurrent().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=settings.lr, momentum=settings.momentum)
    data = Ragged()
    for step in range(3):
        optimizer.zero_grad()
        part = permutation(0, 0, 240)[24 * step : 24 * step + 24]
        batch = packed_of([(x.double(), y) for x, y in (data[int(i)] for i in part)])
        (packed_loss(net, batch).total / 24).backward()
        optimizer.step()
    assert distance(ours.state, dict(net.state_dict())) <= 1e-12


def tensors_of(batch: Any) -> list[torch.Tensor]:
    return [batch.x, batch.y]


@pytest.mark.parametrize("kind", [kind for kind in COLLATES if kind != "namespace"])
def test_a_batch_of_any_kind_is_moved_to_another_device(kind: str) -> None:
    """The meta device stands for one that a test has everywhere."""
    batch = COLLATES[kind]([vectors()[i] for i in range(4)])
    moved = Placement(torch.device("meta"))(batch)
    assert type(moved) is type(batch)
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    if kind == "dataclass":
        assert moved.names == ["a"] * 4
        assert moved.size == 4
        assert batch.x.device.type == "cpu"


def test_the_batch_sizes_of_a_packed_sequence_stay_in_host_memory() -> None:
    batch = packed_of([Ragged()[i] for i in range(4)])["x"]
    moved = Placement(torch.device("meta"))(batch)
    assert isinstance(moved, PackedSequence)
    assert moved.data.device.type == "meta"
    assert moved.sorted_indices.device.type == "meta"
    assert moved.batch_sizes.device.type == "cpu"
    doubled = Placement(torch.device("cpu"), dtype=torch.float64)(batch)
    assert doubled.data.dtype == torch.float64


def test_what_moves_itself_moves_in_the_stream_that_uses_it() -> None:
    samples = [vectors()[i] for i in range(4)]
    for kind, collate in COLLATES.items():
        assert stays_in_stream(collate(samples)) == (kind in ("graph", "forgetful"))


class ByRank(Dataset[Any]):
    """Every rank another one."""

    def __init__(self, rank: int):
        self.rank = rank

    def __len__(self) -> int:
        return 240

    def __getitem__(self, index: int) -> Any:
        x, y = vectors()[index]
        return x + self.rank, y


def with_numbers(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return {"x": x.numpy(), "scale": float(x.sum()), "y": y}


def numbers_loss(model: nn.Module, batch: Any) -> LossSum:
    x = torch.from_numpy(np.asarray(batch["x"])).to(next(model.parameters()).dtype)
    return LossSum(cross_entropy(model(x), batch["y"], reduction="sum"), len(batch["y"]))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", [*(k for k in COLLATES if k != "namespace"), "arrays"])
def test_other_samples_on_a_rank_are_seen_in_a_batch_of_any_kind(group: Group, kind: str) -> None:
    settings = Settings(micro_batch=4)
    own_loss, collate = loss, COLLATES.get(kind, with_numbers)
    if kind == "arrays":
        own_loss = numbers_loss
    made = recipe(
        settings, loss=own_loss, train_data=lambda: Data(ByRank(group.rank), collate=collate)
    )
    with pytest.raises(DataError, match="gives rank 1 other samples than rank 0"):
        build(made, settings, group)


def test_another_batch_for_the_census_is_made_of_any_kind() -> None:
    for kind in ("dataclass", "namedtuple", "encoding"):
        batch = COLLATES[kind]([vectors()[i] for i in range(4)])
        other = all_like_the_first(batch, 4)
        assert type(other) is type(batch)
        assert torch.equal(other.x, batch.x[:1].expand(4, 6))


# Data.count


def count_of_few(batch: Any) -> float:
    """Right for the samples of the first step, and not for all."""
    _, labels = batch
    return float((labels != 3).sum()) + float((labels == 3).any() and COUNTS["is_wrong"])


COUNTS = {"is_wrong": False}


def without_threes(model: nn.Module, batch: Any) -> LossSum:
    inputs, labels = batch
    losses = cross_entropy(model(inputs), labels, reduction="none") * (labels != 3)
    return LossSum(losses.sum(), (labels != 3).sum())


@pytest.mark.ranks(1, 2)
def test_a_count_known_beforehand_is_compared_with_the_losss_in_every_step(group: Group) -> None:
    settings = Settings(micro_batch=4)
    made = build(
        recipe(
            settings, loss=without_threes, train_data=lambda: Data(vectors(), count=count_of_few)
        ),
        settings,
        group,
    )
    batches = iter(made.feed.batches(start=0, end=2))
    train_step(made.training, next(batches))
    COUNTS["is_wrong"] = True
    try:
        with pytest.raises(
            DdpKitError, match=r"step 2: Data\(count=\.\.\.\) gives \S+ where the loss counts"
        ):
            train_step(made.training, next(batches))
    finally:
        COUNTS["is_wrong"] = False
