"""Streams that are each rank's own: refused without the word for it, taken with it."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, classify, recipe, vectors
from lives import Life, alone, live
from torch import nn
from torch.utils.data import IterableDataset

from ddp_kit import Data, LossSum
from ddp_kit.distributed.collectives import gather_bytes
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import read_topology
from ddp_kit.errors import ConfigError, DataError
from ddp_kit.setup.build import Built, build, build_model
from ddp_kit.testing import run_ranks

ROWS, LABELS = vectors(480).tensors


class Own(IterableDataset[Any]):
    """Every world_size-th sample, as `split_by_node` and `split_dataset_by_node` have it."""

    def __init__(self, rank: int, world_size: int, *, size: int = 480, sized: bool = True):
        self.indices = list(range(rank, size, world_size))
        if sized:
            self.__class__ = type(
                "SizedOwn", (type(self),), {"__len__": lambda own: len(own.indices)}
            )

    def __iter__(self) -> Iterator[Any]:
        for index in self.indices:
            yield ROWS[index], int(LABELS[index])


class Stateful(Own):
    at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]

    def __iter__(self) -> Iterator[Any]:
        while self.at < len(self.indices):
            index = self.indices[self.at]
            self.at += 1
            yield ROWS[index], int(LABELS[index])
        self.at = 0


def at(values: list[float]) -> list[int]:
    """Returns which of the samples these are, by their first feature."""
    places = {value: index for index, value in enumerate(ROWS[:, 0].tolist())}
    return [places[value] for value in values]


def flat(steps: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(steps))


def own_samples(made: Built, *, end: int, start: int = 0) -> list[list[int]]:
    """Returns this rank's samples of each step."""
    steps = []
    with contextlib.closing(made.feed.batches(start=start, end=end)) as batches:
        for batch in batches:
            found: list[float] = []
            for micro_batch in batch.micro_batches:
                found += micro_batch.batch[0][:, 0].tolist()
            steps.append(at(found))
    return steps


def made_of(group: Group, settings: Settings, **parts: Any) -> Built:
    made = build(recipe(settings, **parts), settings, group)
    made.training.control_packet.close()
    return made


@pytest.mark.ranks(2)
def test_the_refusal_of_a_stream_shared_out_by_rank_offers_the_word_for_it(group: Group) -> None:
    settings = Settings(run_dir="")
    for name in ("train_data", "eval_data", "test_data"):
        with pytest.raises(DataError, match=r"Data\(stream, sharded=True\)"):
            build(recipe(settings, **{name: lambda: Own(group.rank, 2)}), settings, group)


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("micro_batch", [0, 4])
def test_each_rank_trains_on_its_own_stream_whole_and_in_order(
    micro_batch: int, num_workers: int, group: Group
) -> None:
    settings = Settings(
        run_dir="", epochs=2, max_steps=0, micro_batch=micro_batch, num_workers=num_workers
    )
    own = Own(group.rank, group.world_size)
    made = made_of(group, settings, train_data=lambda: Data(own, sharded=True))
    assert (made.feed.steps_per_epoch, made.cadence.end) == (20, 40)
    steps = own_samples(made, end=40)
    share = 24 // group.world_size
    assert [len(step) for step in steps] == [share] * 40
    assert flat(steps[:20]) == own.indices == flat(steps[20:])


@pytest.mark.ranks(2)
def test_an_epoch_ends_on_all_ranks_at_the_same_step_that_of_the_shortest(group: Group) -> None:
    own = Own(0, 1, size=(240, 170)[group.rank])
    own.indices = [index + 240 * group.rank for index in own.indices]
    settings = Settings(run_dir="", epochs=2, max_steps=0)
    made = made_of(group, settings, train_data=lambda: Data(own, sharded=True))
    assert (made.feed.steps_per_epoch, made.cadence.end) == (14, 28)
    steps = own_samples(made, end=28)
    assert steps[:14] == steps[14:]
    assert flat(steps[:14]) == own.indices[:168]
    epochs = [batch.epoch for batch in made.feed.batches(start=12, end=16)]
    assert epochs == [0, 0, 1, 1]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_that_ends_before_its_length_ends_the_run_by_name(
    num_workers: int, group: Group
) -> None:
    own = Own(group.rank, 2)
    if group.rank == 1:
        own.indices = own.indices[:-30]
        own.__class__ = type("Wrong", (type(own),), {"__len__": lambda own: 240})
    settings = Settings(run_dir="", epochs=1, max_steps=0, num_workers=num_workers)
    made = made_of(group, settings, train_data=lambda: Data(own, sharded=True))
    if group.rank == 0:
        assert len(own_samples(made, end=20)) == 20
    else:
        with pytest.raises(DataError, match="ended after 210 samples, where its __len__ says 240"):
            own_samples(made, end=20)


@pytest.mark.ranks(2)
def test_without_a_length_it_needs_steps_and_begins_again_when_it_ends(group: Group) -> None:
    own = Own(group.rank, 2, size=120, sized=False)
    data = Data(own, sharded=True)
    with pytest.raises(ConfigError, match=r"--epochs 2: .*has no length.*--max-steps"):
        made_of(group, Settings(run_dir="", epochs=2, max_steps=0), train_data=lambda: data)
    made = made_of(group, Settings(run_dir="", max_steps=8), train_data=lambda: data)
    steps = own_samples(made, end=8)
    assert flat(steps[:5]) == own.indices
    assert steps[5:] == steps[:3]
    assert own_samples(made, start=3, end=8) == steps[3:]


@pytest.mark.ranks(2)
def test_ranks_draw_other_numbers_for_the_samples_of_their_own(group: Group) -> None:
    def noisy(batch: Any, draws: Any) -> Any:
        return batch[0] * 0 + torch.from_numpy(draws.uniform(6)), batch[1]

    settings = Settings(run_dir="", max_steps=1)
    data = Data(Own(group.rank, 2), sharded=True, augment=noisy)
    made = made_of(group, settings, train_data=lambda: data)
    (batch,) = made.feed.batches(start=0, end=1)
    found = str(batch.micro_batches[0].batch[0].tolist()).encode()
    rows = gather_bytes(group, found)
    assert rows[0] != rows[1]


@pytest.mark.ranks(2)
def test_what_is_the_same_stream_on_all_ranks_is_not_taken_for_their_own(group: Group) -> None:
    settings = Settings(run_dir="")
    data = Data(Own(0, 1), sharded=True)
    for name in ("train_data", "eval_data", "test_data"):
        with pytest.raises(DataError, match="rank 1 has the same first samples as rank 0"):
            build(recipe(settings, **{name: lambda: data}), settings, group)


@pytest.mark.ranks(1, 2)
def test_it_is_refused_where_it_has_no_meaning(group: Group) -> None:
    settings = Settings(run_dir="")
    for name, what in (("train_data", "training data"), ("eval_data", "evaluation data")):
        made = recipe(settings, **{name: lambda: Data(vectors(), sharded=True)})
        with pytest.raises(ConfigError, match=rf"{what}: Data\(sharded=True\) is for a stream"):
            build(made, settings, group)
    exact = Settings(run_dir="", exact=True, micro_batch=12)
    data = Data(Own(group.rank, group.world_size), sharded=True)
    with pytest.raises(ConfigError, match="--exact: the training data is iterable"):
        build(recipe(exact, train_data=lambda: data), exact, group)


# Evaluation


def mean_of(model: nn.Module, batch: Any) -> dict[str, Any]:
    return {"sum": (batch[0][:, 0].sum(), len(batch[0])), "row": batch[0][:, :1]}


def summed(means: dict[str, float], rows: dict[str, torch.Tensor]) -> dict[str, float]:
    return {"rows": float(rows["row"].sum()), "count": float(len(rows["row"]))}


SIZES = {"even": (96, 96), "uneven": (97, 12), "one sample": (1, 61), "blocks alike": (30, 25)}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", SIZES)
def test_an_evaluation_counts_each_sample_of_all_ranks_once(
    kind: str, num_workers: int, group: Group
) -> None:
    sizes = SIZES[kind]
    own = Own(0, 1, size=sizes[group.rank])
    own.indices = [index + 240 * group.rank for index in own.indices]
    settings = Settings(run_dir="", num_workers=num_workers, micro_batch=12)
    passes: list[int] = []

    def counted(model: nn.Module, batch: Any) -> dict[str, Any]:
        passes.append(len(batch[0]))
        return mean_of(model, batch)

    made = build(
        recipe(
            settings,
            eval_data=lambda: {"own": Data(own, sharded=True), "all": vectors(40)},
            evaluate=counted,
            summarize=summed,
        ),
        settings,
        group,
    )
    passes.clear()
    metrics = made.evaluator(made.training.model)
    made.training.control_packet.close()
    # All ranks must call the model alike: fsdp gathers its weights, and stops are agreed between.
    assert len(set(gather_bytes(group, str(len(passes)).encode()))) == 1
    every = [*range(sizes[0]), *range(240, 240 + sizes[1])]
    expected = ROWS[every, 0].double()
    assert metrics["own/sum"] == pytest.approx(float(expected.mean()), rel=1e-12)
    assert metrics["own/rows"] == pytest.approx(float(expected.sum()), rel=1e-9)
    assert metrics["own/count"] == len(every)
    assert metrics["all/count"] == 40


@pytest.mark.ranks(2)
def test_a_rank_without_any_sample_to_evaluate_is_refused(group: Group) -> None:
    settings = Settings(run_dir="")
    own = Own(0, 1, size=0 if group.rank else 40, sized=False)
    made = recipe(settings, eval_data=lambda: Data(own, sharded=True))
    with pytest.raises(DataError, match=r"evaluation data .* rank 1 has no samples"):
        build(made, settings, group)


# Whole runs


def lived(folder: str, settings: Settings, kind: str) -> tuple[Life, list[list[int]]]:
    """Trains on this rank's own stream, of which the samples of each step are returned."""
    place = read_topology()
    seen: list[list[int]] = []
    made = {"own": Own, "stateful": Stateful}[kind]

    def loss(model: nn.Module, batch: Any) -> LossSum:
        if model.training:
            seen.append(at(batch[0][:, 0].tolist()))
        return classify(model, batch)

    life = live(
        lambda own: recipe(
            own,
            loss=loss,
            train_data=lambda: Data(made(place.rank, place.world_size), sharded=True),
        ),
        replace(settings, run_dir=folder),
    )
    return life, seen


def refusal(folder: str, settings: Settings, kind: str) -> str:
    try:
        lived(folder, settings, kind)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["own", "stateful"])
def test_a_run_that_goes_on_is_the_one_that_was_never_stopped_at_the_same_number_of_ranks(
    kind: str, tmp_path: Path
) -> None:
    settings = Settings(epochs=2, max_steps=0, log_every=1)
    whole = run_ranks(lived, 2, str(tmp_path / "whole"), settings, kind, group=False)
    stopped = replace(settings, max_steps=27)
    run_ranks(lived, 2, str(tmp_path / "run"), stopped, kind, group=False)
    words = run_ranks(refusal, 1, str(tmp_path / "run"), settings, kind, group=False)
    assert "each rank's own" in words[0]
    assert "Start 2 ranks" in words[0]
    gone_on = run_ranks(lived, 2, str(tmp_path / "run"), settings, kind, group=False)
    for (life, seen), (reference, expected) in zip(gone_on, whole, strict=True):
        assert life.step == reference.step == 40
        assert seen[-13:] == expected[-13:]
        for name, tensor in reference.state.items():
            assert torch.equal(life.state[name], tensor)


def test_the_loss_is_that_of_bare_torch_on_the_samples_of_all_ranks(tmp_path: Path) -> None:
    settings = Settings(epochs=1, max_steps=5, log_every=1)
    ended = run_ranks(lived, 2, str(tmp_path / "run"), settings, "own", group=False)
    losses = [record["loss"] for record in ended[0][0].records if record["kind"] == "train"]
    own = recipe(settings)
    model = build_model(own, settings, alone())
    optimizer = own.parts()[0].optimizer(model)
    for step, loss in enumerate(losses):
        batch = np.concatenate([life[1][step - 5] for life in ended])
        optimizer.zero_grad()
        expected = classify(model, (ROWS[batch].double(), LABELS[batch])).total / 24
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(float(expected.detach()), rel=1e-9)
