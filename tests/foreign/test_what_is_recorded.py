"""What train records say: of one step, and of all since the record before; one rate where there is one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, classify, plain, recipe, vectors, weighted
from gans import Gan, gan
from lives import Life, Notes
from torch import nn

from ddp_kit import LossSum, Recipe
from ddp_kit.distributed.process_group import Group
from ddp_kit.setup.build import Built, build
from ddp_kit.testing import assert_same_on_all_ranks
from ddp_kit.trackers.base import RunInfo
from ddp_kit.trackers.console import train_line
from ddp_kit.training.reporter import Reporter
from ddp_kit.training.step import train_step

Record = dict[str, Any]


def recorded(made: Built, *, log_every: int, end: int) -> list[Record]:
    """Returns the train records of so many steps, on any rank."""
    life = Life()
    reporter = Reporter([Notes(life)], log_every=log_every)
    reporter.start(RunInfo(run_dir=Path(), name="run"), step=0)
    for batch in made.feed.batches(start=0, end=end):
        sums = train_step(made.training, batch)
        is_last = made.training.step == end
        reporter.step(made.training, sums, epoch=0, wait_s=0.0, is_last=is_last)
    reporter.flush()
    made.training.control_packet.close()
    return life.records


def counted(model: nn.Module, batch: Any) -> LossSum:
    """A loss whose count varies much from step to step, so that a mean of means is another number."""
    inputs, labels = batch
    found = classify(model, (inputs, labels))
    counts = torch.where(labels == 3, 20.0, 0.1).double()
    return LossSum(found.total, counts.sum())


@pytest.mark.ranks(1, 2, 3)
def test_loss_mean_is_the_sum_of_totals_over_the_sum_of_counts_since_the_record_before(
    group: Group,
) -> None:
    for loss in (classify, weighted, counted):
        settings = Settings(micro_batch=5, max_steps=7)
        every = recorded(build(recipe(settings, loss=loss), settings, group), log_every=1, end=7)
        some = recorded(build(recipe(settings, loss=loss), settings, group), log_every=3, end=7)
        assert [record["step"] for record in some] == [3, 6, 7]
        assert all(record["loss_mean"] == record["loss"] for record in every)
        sums = by_hand(settings, loss)
        for record, (first, last) in zip(some, [(0, 3), (3, 6), (6, 7)], strict=True):
            assert record["loss"] == every[last - 1]["loss"]
            total = sum(total for total, _ in sums[first:last])
            count = sum(count for _, count in sums[first:last])
            assert record["loss_mean"] == pytest.approx(total / count, abs=1e-12)
        assert "accuracy_mean" not in some[0]


def by_hand(settings: Settings, loss: Any) -> list[tuple[float, float]]:
    """Returns (total, count) of each step of a bare loop over whole batches in one process."""
    from ddp_kit.data.seeding import Purpose, key, permutation

    torch.manual_seed(key(settings.seed, Purpose.WEIGHTS))
    model = plain().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs, labels = vectors().tensors
    sums = []
    for step in range(settings.max_steps):
        samples = permutation(settings.seed, 0, 240)[step * 24 : (step + 1) * 24]
        found = loss(model, (inputs[samples].double(), labels[samples]))
        optimizer.zero_grad()
        (found.total / found.count).backward()
        optimizer.step()
        sums.append((found.total.item(), float(found.count)))
    return sums


@pytest.mark.ranks(1, 2)
def test_each_objective_has_a_mean_of_its_own_and_it_does_not_depend_on_the_ranks(
    group: Group,
) -> None:
    settings = Settings(micro_batch=6)
    every = recorded(build(gan(), settings, group), log_every=1, end=4)
    found = recorded(build(gan(), settings, group), log_every=4, end=4)[0]
    for part in ("generator", "discriminator"):
        mean = sum(record[f"{part}/loss"] for record in every) / 4
        assert found[f"{part}/loss_mean"] == pytest.approx(mean, abs=1e-12)
    assert "loss_mean" not in found
    assert_same_on_all_ranks({name: found[name] for name in found if "loss" in name}, group)


def test_the_console_shows_the_mean() -> None:
    record = {
        "kind": "train",
        "step": 9,
        "loss": 9.0,
        "loss_mean": 0.25,
        "lr": 0.1,
        "accuracy": 1.0,
    }
    assert train_line(record) == "step 9  loss 0.25  lr 0.1  accuracy 1"
    parts = {
        "kind": "train",
        "step": 9,
        "a/loss": 9.0,
        "b/loss": 8.0,
        "a/loss_mean": 0.5,
        "b/loss_mean": 0.75,
    }
    assert train_line(parts) == "step 9  a/loss 0.5  b/loss 0.75"


def groups(model: nn.Module, *rates: float) -> torch.optim.Optimizer:
    halves: Any = [model[0], model[2]]
    given = [
        {"params": half.parameters(), "lr": rate} for half, rate in zip(halves, rates, strict=True)
    ]
    return torch.optim.SGD(given, lr=1.0)


@pytest.mark.ranks(1, 2)
def test_groups_with_one_rate_are_one_lr(group: Group) -> None:
    def rates(*given: float) -> dict[str, float]:
        settings = Settings()
        made = build(
            recipe(settings, optimizer=lambda model: groups(model, *given)), settings, group
        )
        record = recorded(made, log_every=1, end=1)[0]
        return {name: value for name, value in record.items() if name.startswith("lr")}

    assert rates(0.5, 0.5) == {"lr": 0.5}
    assert rates(0.5, 0.25) == {"lr": 0.5, "lr/0": 0.5, "lr/1": 0.25}


class NormedGan(Gan):
    """Both objectives call the discriminator, whose layers normalise: one with a momentum, one without."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = nn.Sequential(
            nn.Linear(3, 8),
            nn.BatchNorm1d(8),
            nn.Tanh(),
            nn.BatchNorm1d(8, momentum=None),
            nn.Linear(8, 1),
        )


@pytest.mark.ranks(1, 2)
def test_a_layer_counts_a_step_once_however_often_the_losses_call_it(group: Group) -> None:
    """The discriminator's loss calls it twice, the generator's once. A plain mean has its calls as its count."""
    for micro_batch in (12, 4):
        settings = Settings(micro_batch=micro_batch)
        made = build(replace(gan(), model=NormedGan), settings, group)
        for batch in made.feed.batches(start=0, end=4):
            train_step(made.training, batch)
        layers = made.training.model.discriminator
        assert int(layers[1].num_batches_tracked) == 4
        assert int(layers[3].num_batches_tracked) == 3 * 4
        made.training.control_packet.close()


class Siamese(nn.Module):
    """A layer that is called once for each of two views."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.plain = nn.BatchNorm1d(3, momentum=None)
        self.last = nn.Linear(6, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        views = [self.plain(self.norm(view)) for view in inputs.chunk(2, dim=1)]
        logits: torch.Tensor = self.last(torch.cat(views, dim=1))
        return logits


@pytest.mark.ranks(1, 2)
def test_so_does_one_that_a_loss_calls_for_two_views(group: Group) -> None:
    for micro_batch in (24, 12, 5):
        settings = Settings(micro_batch=micro_batch if group.world_size == 1 else 0)
        made = build(recipe(settings, model=Siamese), settings, group)
        for batch in made.feed.batches(start=0, end=3):
            train_step(made.training, batch)
        assert int(made.training.model.norm.num_batches_tracked) == 3
        assert int(made.training.model.plain.num_batches_tracked) == 6
        made.training.control_packet.close()


@pytest.mark.ranks(1)
def test_a_plain_mean_of_two_views_is_that_of_plain_torch(group: Group) -> None:
    from ddp_kit.data.seeding import Purpose, key, permutation

    settings = Settings(precision="fp32")
    made = build(recipe(settings, model=Siamese), settings, group)
    for batch in made.feed.batches(start=0, end=3):
        train_step(made.training, batch)
    torch.manual_seed(key(0, Purpose.WEIGHTS))
    bare = Siamese()
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9)
    inputs, labels = vectors().tensors
    for step in range(3):
        samples = permutation(0, 0, 240)[step * 24 : (step + 1) * 24]
        optimizer.zero_grad()
        (classify(bare, (inputs[samples], labels[samples])).total / 24).backward()
        optimizer.step()
    torch.testing.assert_close(made.training.model.plain.running_mean, bare.plain.running_mean)
    torch.testing.assert_close(made.training.model.plain.running_var, bare.plain.running_var)


def overflowing(model: Any, batch: Any) -> LossSum:
    """Finite, with a gradient that fp16 cannot hold."""
    outputs = model(batch[0][:, :3]).float()
    return LossSum((outputs * 1e30).sum() * 1e5, len(outputs))


@pytest.mark.ranks(1, 2)
def test_a_step_of_which_two_objectives_are_skipped_is_one_skipped_step(group: Group) -> None:
    from ddp_kit.strategies.precision import has_fp16

    if not has_fp16(torch.device("cpu")):
        pytest.skip("no float16 kernels for this CPU")
    settings = Settings(precision="fp16")
    first, second = gan().objectives
    made = build(
        Recipe(
            model=Gan,
            objectives=[
                replace(first, loss=lambda model, batch: overflowing(model.discriminator, batch)),
                replace(second, loss=lambda model, batch: overflowing(model.generator, batch)),
            ],
            train_data=lambda: vectors(),
        ),
        settings,
        group,
    )
    records = recorded(made, log_every=1, end=3)
    assert [record["skipped"] for record in records] == [1, 2, 3]
    assert [record["generator/loss_scale"] for record in records] == [2.0**15, 2.0**14, 2.0**13]
