"""Samples that cannot be a batch, settings that have no effect, lengths that are wrong: each is named, and so is what it is about."""

import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, recipe, vectors
from lives import alone
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from ddp_kit import Data
from ddp_kit.data.batch_plan import plan_batches
from ddp_kit.data.loader import evaluation_batches, feed_of
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, DataError
from ddp_kit.setup.build import build
from ddp_kit.training.evaluation_sets import data_sets

CPU = Placement(torch.device("cpu"))


# What is said of evaluation data and has no effect there

FIELDS: dict[str, Any] = {
    "augment": lambda batch, draws: batch,
    "order": lambda seed, epoch, size: range(size),
    "count": lambda batch: len(batch[1]),
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("kind", ["eval_data", "test_data"])
@pytest.mark.ranks(1, 2)
def test_what_has_no_effect_on_evaluation_data_is_refused_by_name(
    kind: str, field: str, group: Group
) -> None:
    settings = Settings(run_dir="")
    with_field = Data(vectors(), **{field: FIELDS[field]})
    what = {"eval_data": "evaluation data", "test_data": "test data"}[kind]
    for given, named in ((with_field, what), ({"a": vectors(), "b": with_field}, f"{what} b")):
        made = recipe(settings, **{"eval_data": vectors, kind: lambda given=given: given})
        with pytest.raises(ConfigError, match=rf"Data\({field}=\.\.\.\) .*the {named}.* leave it"):
            build(made, settings, group)


def test_what_has_an_effect_on_evaluation_data_is_taken() -> None:
    (data,) = data_sets(Data(vectors(), collate=list), what="evaluation").values()
    assert data.collate is list


# Samples

FEATURES = 6
ODD: dict[str, tuple[Any, str]] = {
    "none": (None, r"sample 17 is None"),
    "none within": ((torch.zeros(FEATURES), None), r"sample 17 has None at \[1\]"),
    "shape": ((torch.zeros(5), 1), r"sample 17 has shape \(5,\) at \[0\], .*shape \(6,\)"),
    "rank": ((torch.zeros(2, FEATURES), 1), r"sample 17 has shape \(2, 6\) at \[0\]"),
    "array": ((np.zeros(5, np.float32), 1), r"sample 17 has shape \(5,\) at \[0\]"),
    "length": ((torch.zeros(FEATURES),), r"sample 17 has 1 value, .*2 values"),
    "kind": ((torch.zeros(FEATURES), "one"), r"sample 17 has a text at \[1\], .*a number"),
    "keys": ({"input": torch.zeros(FEATURES)}, r"sample 17 has the keys input, .*2 values"),
}


class WithOne(Dataset[Any]):
    """Sample 17 is odd."""

    def __init__(self, odd: Any, *, by_key: bool = False):
        self.odd = odd
        self.by_key = by_key

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        if index == 17:
            return self.odd
        if self.by_key:
            return {"input": torch.zeros(FEATURES), "label": index % 4}
        return torch.zeros(FEATURES), index % 4


class Batched(WithOne):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Streamed(IterableDataset[Any]):
    def __init__(self, odd: Any):
        self.samples = WithOne(odd)

    def __iter__(self) -> Iterator[Any]:
        for index in range(48):
            yield self.samples[index]


KINDS = {"items": WithOne, "batches": Batched, "stream": Streamed}


def read_all(data: Any, *, training: bool, num_workers: int = 0) -> None:
    """Reads all 48 samples, 12 a step and 6 a micro-batch."""
    if training:
        plan = plan_batches(12, micro_batch=6, world_size=1)
        feed = feed_of(
            Data(data), plan=plan, rank=0, seed=0, placement=CPU, num_workers=num_workers
        )
        list(feed.batches(start=0, end=4))
        return
    list(evaluation_batches(data, group=alone(), micro_batch=6, num_workers=num_workers))


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_that_fits_into_no_batch_is_named_with_its_data_set(kind: str, odd: str) -> None:
    value, words = ODD[odd]
    for training, what in ((True, "training data"), (False, "evaluation data")):
        with pytest.raises(DataError, match=f"(?s)^the {what}: {words}"):
            read_all(KINDS[kind](value), training=training)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_loader_worker_names_it_too(kind: str, training: bool) -> None:
    with pytest.raises(DataError, match=r"^the \w+ data: sample 17 is None") as caught:
        read_all(KINDS[kind](None), training=training, num_workers=2)
    assert "Traceback" not in str(caught.value)


def test_a_key_that_a_sample_lacks_is_named() -> None:
    with pytest.raises(DataError, match=r"sample 17 has the keys input, .*input, label"):
        read_all(WithOne({"input": torch.zeros(FEATURES)}, by_key=True), training=True)


def test_an_object_that_no_batch_can_hold_is_named_by_its_kind() -> None:
    class Picture:
        pass

    class Pictures(Dataset[Any]):
        def __len__(self) -> int:
            return 48

        def __getitem__(self, index: int) -> Any:
            return Picture(), 0

    with pytest.raises(DataError, match=r"sample \d+ has a Picture at \[0\].*collate"):
        read_all(Pictures(), training=True)


def test_a_sample_behind_subsets_is_named_by_both_indices() -> None:
    inner = Subset(WithOne(None), list(range(47, -1, -1)))
    with pytest.raises(DataError, match=r"sample 30 \(index 17 of the data set in the Subset\) is"):
        read_all(inner, training=True)
    both = ConcatDataset([WithOne((torch.zeros(FEATURES), 0)), WithOne(None)])
    with pytest.raises(DataError, match=r"sample 65 is None"):
        read_all(both, training=False)


class Broken(WithOne):
    def __getitem__(self, index: int) -> Any:
        if index == 17:
            raise OSError("no such picture")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_raises_is_named_and_its_error_passes_through(num_workers: int) -> None:
    with pytest.raises(OSError, match="no such picture") as caught:
        read_all(Broken(None), training=True, num_workers=num_workers)
    notes = [*getattr(caught.value, "__notes__", []), str(caught.value)]
    assert any("while reading sample 17 of the training data" in note for note in notes)


def test_a_collate_of_ones_own_may_drop_none_and_is_told_of_it_if_it_fails() -> None:
    def kept(samples: list[Any]) -> Any:
        return [sample for sample in samples if sample is not None]

    def fails(samples: list[Any]) -> Any:
        return torch.stack([inputs for inputs, _ in samples])

    def breaks(samples: list[Any]) -> Any:
        raise ValueError("of its own")

    plan = plan_batches(12, micro_batch=6, world_size=1)
    for collate, error, words in (
        (fails, TypeError, "unpack"),
        (breaks, ValueError, "of its own"),
    ):
        feed = feed_of(
            Data(WithOne(None), collate=collate), plan=plan, rank=0, seed=0, placement=CPU
        )
        with pytest.raises(error, match=words) as caught:
            list(feed.batches(start=0, end=4))
        (note,) = caught.value.__notes__
        assert re.search(r"of the training data into a batch; sample 17 is None", note)
    feed = feed_of(Data(WithOne(None), collate=kept), plan=plan, rank=0, seed=0, placement=CPU)
    steps = list(feed.batches(start=0, end=4))
    sizes = [sum(len(part.batch) for part in step.micro_batches) for step in steps]
    assert sum(sizes) == 47


class Short(Batched):
    def __getitems__(self, indices: list[int]) -> Any:
        return super().__getitems__(indices)[1:]


class Forgot(Batched):
    def __getitems__(self, indices: list[int]) -> Any:
        super().__getitems__(indices)


def test_a_batch_of_another_number_of_samples_is_refused() -> None:
    sample = (torch.zeros(FEATURES), 0)
    with pytest.raises(DataError, match=r"training data: .*__getitems__ gave 5 samples for 6"):
        read_all(Short(sample), training=True)
    with pytest.raises(DataError, match=r"evaluation data: .*__getitems__ gave None for 6"):
        read_all(Forgot(sample), training=False)


# Random numbers of a collate


class Noise(Dataset[Any]):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> int:
        return index


class NoiseByBatch(Noise):
    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self[index] for index in indices]


def noisy(samples: list[int]) -> Any:
    own = (random.random(), np.random.rand(), torch.rand(()).item())
    return [(sample, *own) for sample in samples]


@pytest.mark.parametrize("dataset", [Noise(), NoiseByBatch()], ids=["items", "batches"])
def test_a_collate_draws_the_same_on_any_number_of_ranks_and_workers(dataset: Any) -> None:
    def read(world_size: int, num_workers: int) -> dict[int, Any]:
        plan = plan_batches(12, micro_batch=6, world_size=world_size)
        found = {}
        for rank in range(world_size):
            feed = feed_of(
                Data(dataset, collate=noisy),
                plan=plan,
                rank=rank,
                seed=0,
                placement=CPU,
                num_workers=num_workers,
            )
            for step in feed.batches(start=0, end=4):
                for part in step.micro_batches:
                    found |= {row[0]: row[1:] for row in part.batch}
        return found

    reference = read(1, 0)
    assert len(set(reference.values())) == 8
    assert read(2, 0) == read(1, 2) == read(2, 2) == reference


# Streams that know their length wrongly


class Sized(IterableDataset[Any]):
    def __init__(self, *, really: int, says: int):
        self.really = really
        self.says = says

    def __len__(self) -> int:
        return self.says

    def __iter__(self) -> Iterator[Any]:
        samples = vectors(self.really)
        for index in range(self.really):
            yield samples[index]


def said_of(stream: Sized, file: Path, *, num_workers: int, world_size: int) -> list[str]:
    """Reads 12 steps of 24 samples on each rank. Returns what was said of the length, by all processes."""
    told = logging.FileHandler(file)
    logging.getLogger("ddp_kit").addHandler(told)
    plan = plan_batches(24, micro_batch=6, world_size=world_size)
    try:
        for rank in range(world_size):
            feed = feed_of(
                Data(stream), plan=plan, rank=rank, seed=0, placement=CPU, num_workers=num_workers
            )
            feed.dry_run_batch()
            assert len(list(feed.batches(start=0, end=12))) == 12
    finally:
        logging.getLogger("ddp_kit").removeHandler(told)
        told.close()
    return file.read_text().splitlines()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_that_is_longer_or_shorter_than_it_says_is_told_once(
    num_workers: int, world_size: int, tmp_path: Path
) -> None:
    for really, words in (
        (120, r"more than the 96 samples that its __len__ says: .* 4 steps, .* goes on"),
        (60, r"gave 60 samples where its __len__ says 96: .* 4 steps, .* begins again after 2"),
    ):
        (line,) = said_of(
            Sized(really=really, says=96),
            tmp_path / f"{really}",
            num_workers=num_workers,
            world_size=world_size,
        )
        assert re.search(words, line), line


class Unsized(Sized):
    def __len__(self) -> int:
        raise TypeError("no length")


@pytest.mark.parametrize("stream", [Sized(really=110, says=110), Unsized(really=110, says=0)])
def test_a_stream_that_says_it_rightly_or_not_at_all_is_not_told_of(
    stream: Sized, tmp_path: Path
) -> None:
    assert said_of(stream, tmp_path / "told", num_workers=0, world_size=1) == []
