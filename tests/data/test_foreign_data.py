"""Other people's data sets: files opened at the first sample, streams and data that differ by rank."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, classify, recipe
from torch import nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info

import ddp_kit
from ddp_kit import Data
from ddp_kit.data.agreement import require_same_samples
from ddp_kit.data.batch_plan import plan_batches
from ddp_kit.data.loader import Feed, evaluation_batches, feed_of
from ddp_kit.data.stream_checks import require_resumable
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DataError
from ddp_kit.setup.build import build

CPU = Placement(torch.device("cpu"))
FEATURES = 6


class Opened(Dataset[Any]):
    """Opens its file at the first sample, "in the worker", as told, and seeks before it reads."""

    def __init__(self, path: Path):
        self.path = path
        self.file: Any = None

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.file is None:
            self.file = os.open(self.path, os.O_RDONLY)
        os.lseek(self.file, 8 * index, os.SEEK_SET)
        torch.randn(20)  # time for another process to seek too
        value = int(np.frombuffer(os.read(self.file, 8), dtype=np.int64)[0])
        return torch.full((FEATURES,), float(value)), value


@dataclass(frozen=True, kw_only=True)
class OpenedSettings(Settings):
    num_workers: int = 2
    max_steps: int = 16


def test_a_file_opened_at_the_first_sample_is_each_workers_own(tmp_path: Path) -> None:
    np.arange(400, dtype=np.int64).tofile(tmp_path / "numbers")
    seen: list[int] = []
    evaluated: list[int] = []

    def loss(model: nn.Module, batch: Any) -> ddp_kit.LossSum:
        inputs, values = batch
        seen.extend(int(value) for value in values)
        assert torch.equal(inputs[:, 0].long(), values)
        return classify(model, (inputs, values % 4))

    def evaluate(model: nn.Module, batch: Any) -> dict[str, Any]:
        evaluated.extend(int(value) for value in batch[1])
        return {"mean": (batch[1].sum(), len(batch[1]))}

    settings = OpenedSettings(run_dir=str(tmp_path / "run"), micro_batch=6)
    dataset = Opened(tmp_path / "numbers")
    made = recipe(
        settings,
        loss=loss,
        train_data=lambda: dataset,
        eval_data=lambda: dataset,
        evaluate=evaluate,
    )
    assert ddp_kit.run(made, settings).status == "finished"
    assert dataset.file is None
    trained = seen[-16 * 24 :]  # passes before the first step have seen some of the first samples
    assert len(set(trained)) == 16 * 24
    assert sorted(evaluated[-400:]) == list(range(400))


class OpenedStream(IterableDataset[Any]):
    """Shares itself out among loader workers, as torch's documentation has it."""

    def __init__(self, size: int = 96):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        first = 0
        step = 1
        info = get_worker_info()
        if info is not None:
            first = info.id
            step = info.num_workers
        for index in range(first, self.size, step):
            yield torch.full((FEATURES,), float(index)), index


def numbers_of(feed: Feed, *, steps: int) -> list[int]:
    found: list[int] = []
    for batch in feed.batches(start=0, end=steps):
        for micro_batch in batch.micro_batches:
            found += micro_batch.batch[1].tolist()
    return found


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_stream_that_shares_itself_out_among_workers_is_read_whole(num_workers: int) -> None:
    plan = plan_batches(24, micro_batch=6, world_size=1)
    feed = feed_of(
        Data(OpenedStream()), plan=plan, rank=0, seed=0, placement=CPU, num_workers=num_workers
    )
    assert numbers_of(feed, steps=4) == list(range(96))


@pytest.mark.ranks(1, 2)
def test_an_evaluation_stream_that_shares_itself_out_among_workers_is_read_whole(
    group: Group,
) -> None:
    batches = evaluation_batches(OpenedStream(100), group=group, micro_batch=7, num_workers=2)
    own = [batch.batch[1].tolist() for batch in batches if not batch.request.is_padding]
    every = [list(range(first, min(first + 7, 100))) for first in range(0, 100, 7)]
    assert own == every[group.rank :: group.world_size]


class SplitByRank(IterableDataset[Any]):
    """Each rank's own part, as `split_by_node` and `split_dataset_by_node` make it."""

    def __init__(self, rank: int, world_size: int, *, of: str = "images"):
        self.rank = rank
        self.world_size = world_size
        self.of = of

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.rank, 200, self.world_size):
            if self.of == "texts":
                yield f"text {index}", 0
            else:
                yield torch.full((FEATURES,), float(index)), index % 4


class ByRank(Dataset[Any]):
    """Another part of the data on each rank."""

    def __init__(self, rank: int):
        self.rank = rank

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((FEATURES,), float(1000 * self.rank + index)), index % 4


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_that_differs_by_rank_is_refused_in_words(group: Group, num_workers: int) -> None:
    settings = Settings(run_dir="", num_workers=num_workers)
    stream = SplitByRank(group.rank, group.world_size)
    cases = {
        "split_by_node": {"train_data": lambda: stream},
        "the same samples on every rank": {"train_data": lambda: ByRank(group.rank)},
        "evaluation data gives rank 1": {
            "eval_data": lambda: SplitByRank(group.rank, group.world_size)
        },
    }
    for words, parts in cases.items():
        with pytest.raises(DataError, match=words):
            build(recipe(settings, **parts), settings, group)


@pytest.mark.ranks(2)
def test_texts_that_differ_by_rank_are_refused_too(group: Group) -> None:
    settings = Settings(run_dir="")
    data = Data(
        SplitByRank(group.rank, 2, of="texts"),
        collate=lambda samples: [text for text, _ in samples],
    )
    with pytest.raises(DataError, match="split_by_node"):
        build(recipe(settings, train_data=lambda: data), settings, group)


def sparse(batch: torch.Tensor) -> torch.Tensor:
    return batch.to_sparse()


def compressed(batch: torch.Tensor) -> torch.Tensor:
    return batch.to_sparse_csr()


def ragged(batch: torch.Tensor) -> torch.Tensor:
    rows = [row[: 2 + i % 3] for i, row in enumerate(batch)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("made_by", [sparse, compressed, ragged], ids=["coo", "csr", "jagged"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")  # torch's own word
def test_batches_of_any_layout_are_compared_over_ranks(group: Group, made_by: Any) -> None:
    same = made_by(torch.ones(6, 4))
    other = made_by(torch.ones(6, 4) * (1 + group.rank))
    require_same_samples(group, [same], what="training data", is_iterable=False)
    with pytest.raises(DataError, match="gives rank 1 other samples"):
        require_same_samples(group, [other], what="training data", is_iterable=False)


class OneShot(IterableDataset[Any]):
    """Goes on where the iteration before has stopped, as one that wraps a socket or a file does."""

    def __init__(self) -> None:
        self.left = iter(range(4000))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for index in self.left:
            yield torch.full((FEATURES,), float(index)), index % 4


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_that_does_not_begin_again_is_refused_before_samples_are_lost(
    num_workers: int, group: Group
) -> None:
    settings = Settings(run_dir="", num_workers=num_workers)
    kinds = [("train_data", "training data")]
    # A new worker for each evaluation has a stream that nobody has read.
    if not num_workers:
        kinds.append(("eval_data", "evaluation data"))
    for name, what in kinds:
        with pytest.raises(DataError, match=f"the {what} does not begin again"):
            build(recipe(settings, **{name: OneShot}), settings, group)


class Stateful(IterableDataset[Any]):
    """Has a place in its state. `kind` says what it draws: an order, a number a sample, or nothing."""

    def __init__(self, kind: str):
        self.kind = kind
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        order = list(range(96))
        if self.kind == "order":
            order = torch.randperm(96).tolist()
        if self.kind == "order of its own":
            order = np.random.default_rng(0).permutation(96).tolist()
        begin = self.at
        for place in range(begin, 96):
            self.at = place + 1
            noise = torch.rand(()).item() if self.kind == "noise" else 0.0
            yield torch.full((FEATURES,), order[place] + noise), order[place] % 4
        self.at = 0


@pytest.mark.parametrize("kind", ["nothing", "noise", "order of its own"])
def test_a_stream_that_goes_on_from_its_state_is_taken_and_left_where_it_was(kind: str) -> None:
    dataset = Stateful(kind)
    require_resumable(Data(dataset), seed=0, after=24)
    assert dataset.at == 0


def test_a_stream_whose_state_lacks_what_it_draws_is_refused_unless_it_may_restart(
    tmp_path: Path,
) -> None:
    settings = Settings(run_dir=str(tmp_path / "run"))
    made = recipe(settings, train_data=lambda: Stateful("order"))
    with pytest.raises(
        DataError, match=r"does not go on from its state_dict .* --resume-data restart"
    ):
        ddp_kit.run(made, settings)
    restarts = Settings(run_dir=str(tmp_path / "restarts"), resume_data="restart")
    assert ddp_kit.run(made, restarts).status == "finished"
