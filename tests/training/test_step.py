"""One optimizer step: the dry run before the first, and faults of a loss."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import Settings, distance, normed, recipe, trace, vectors, weighted
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from ddp_kit import Data, LossSum
from ddp_kit.data.seeding import permutation
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.model_state.places import places_of
from ddp_kit.setup.build import Built, build, build_model
from ddp_kit.training.step import train_step


def steps(made: Built, *, start: int = 0, end: int) -> None:
    for batch in made.feed.batches(start=start, end=end):
        train_step(made.training, batch)


# The dry run


@pytest.mark.ranks(1, 2)
def test_the_dry_run_leaves_no_trace(group: Group) -> None:
    settings = Settings(micro_batch=6)
    made = recipe(settings, model=normed, eval_data=lambda: vectors(10))
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    training = build(made, settings, group).training
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    fresh = build_model(made, settings, group).state_dict()
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(tensor, fresh[name]), name
    assert not training.objectives[0].optimizer.state
    assert all(parameter.grad is None for parameter in training.model.parameters())
    assert all(module.training for module in training.model.modules())
    assert training.step == 0


class Crossed(nn.Module):
    """Layers registered in another order than they are used, and of several DDP buckets: they are rebuilt after a first backward."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(512, 4)
        self.middle = nn.ModuleList([nn.Linear(512, 512) for _ in range(3)])
        self.first = nn.Linear(6, 512)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(inputs)
        for layer in reversed(self.middle):
            hidden = torch.tanh(layer(hidden))
        return self.last(hidden)


@pytest.mark.ranks(3)
def test_two_lives_of_the_same_start_give_the_same_bits(group: Group) -> None:
    """DDP's buckets are final before the first real step; at 3 ranks another bucket is another order of summation."""
    settings = Settings(precision="fp32", max_steps=4)
    whole, first, second = (
        build(recipe(settings, model=Crossed), settings, group) for _ in range(3)
    )
    wrapped: Any = whole.training.objectives[0].call
    assert wrapped._has_rebuilt_buckets
    assert len(wrapped.reducer._get_zeros_like_grad_buckets()) > 1
    steps(whole, end=4)
    steps(first, end=2)
    second.training.model.load_state_dict(first.training.model.state_dict())
    second.training.objectives[0].optimizer.load_state_dict(
        first.training.objectives[0].optimizer.state_dict()
    )
    second.training.step = 2
    steps(second, start=2, end=4)
    for name, tensor in whole.training.model.state_dict().items():
        assert torch.equal(tensor, second.training.model.state_dict()[name]), name


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 4)
        self.spare = nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.used(inputs)


@pytest.mark.ranks(1, 2)
def test_unused_parameters_are_named_before_the_first_step_and_allowed_by_a_flag(
    group: Group,
) -> None:
    settings = Settings(micro_batch=4)
    if group.world_size > 1:
        with pytest.raises(
            ConfigError,
            match=r"spare\.weight, spare\.bias got no gradient.*--find-unused-parameters",
        ):
            build(recipe(settings, model=Unused), settings, group)
    allowed = replace(settings, find_unused_parameters=True)
    ours = trace(group, recipe(allowed, model=Unused), allowed)
    only = trace(group, recipe(settings, model=lambda: nn.Sequential(nn.Linear(6, 4))), settings)
    assert ours.gradient["used.weight"].shape == (4, 6)
    assert ours.gradient.keys() == {"used.weight", "used.bias"}
    assert distance({"w": ours.gradient["used.weight"]}, {"w": only.gradient["0.weight"]}) <= 1e-12


@pytest.mark.ranks(2)
def test_nothing_but_ddp_uses_its_gloo_group_in_a_step(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a collective that failed unread, gloo may let another one of the same group wait until its timeout."""
    made = build(
        recipe(Settings(micro_batch=6), model=normed, loss=weighted), Settings(micro_batch=6), group
    )
    made.training.forward_state.first.places += [
        place for place in places_of(made.training.model) if place.name.endswith("mean")
    ]
    made.training.forward_state.settle()
    used = []
    for name in ("all_reduce", "broadcast"):
        real = getattr(dist, name)
        monkeypatch.setattr(
            dist,
            name,
            lambda *args, group, real=real, **more: (
                used.append(group) or real(*args, group=group, **more)
            ),
        )
    steps(made, end=2)
    assert used.count(group.sums_pg) == 6
    assert group.pg not in used
    assert group.sums_pg not in (group.pg, group.control_pg)


# Faults of a loss


def no_sum(model: nn.Module, batch: Any) -> Any:
    return cross_entropy(model(batch[0]), batch[1])


def one_each(model: nn.Module, batch: Any) -> LossSum:
    return LossSum(cross_entropy(model(batch[0]), batch[1], reduction="none"), len(batch[1]))


def detached(model: nn.Module, batch: Any) -> LossSum:
    return LossSum(
        cross_entropy(model(batch[0]), batch[1], reduction="sum").detach(), len(batch[1])
    )


def odd_int(model: nn.Module, batch: Any) -> LossSum:
    return LossSum(cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1]) + 1)


def no_count(model: nn.Module, batch: Any) -> LossSum:
    return LossSum(cross_entropy(model(batch[0]), batch[1], reduction="sum"), 0)


AT_START = [
    (
        no_sum,
        DdpKitError,
        r"must return LossSum\(total, count\) with a scalar tensor as total; it returned Tensor with .* shape \(\)",
    ),
    (one_each, DdpKitError, r"it returned LossSum with a total of shape \(24,\)"),
    (detached, ConfigError, r"the loss has no gradient.*without detach\(\)"),
    (odd_int, ConfigError, r"count is the int 25 for 24 samples\. Return it as a tensor"),
    (no_count, ConfigError, r"count is the int 0 for 24 samples"),
]


@pytest.mark.ranks(1)
def test_a_wrong_loss_is_refused_before_the_first_step(group: Group) -> None:
    for loss, kind, message in AT_START:
        with pytest.raises(kind, match=message):
            build(recipe(Settings(), loss=loss), Settings(), group)


@dataclass
class Changing:
    """A loss that changes what it returns as count after the dry run."""

    count: Callable[[int], Any]
    is_on: bool = False

    def __call__(self, model: nn.Module, batch: Any) -> LossSum:
        whole = cross_entropy(model(batch[0]), batch[1], reduction="sum")
        return LossSum(whole, self.count(len(batch[1])) if self.is_on else len(batch[1]))


@pytest.mark.ranks(2)
def test_a_count_that_begins_to_vary_as_an_int_is_refused(group: Group) -> None:
    for count, found in ((lambda n: n - 1, "11"), (torch.tensor, r"tensor\(12\)")):
        loss = Changing(count)
        made = build(recipe(Settings(), loss=loss), Settings(), group)
        loss.is_on = True
        with pytest.raises(
            DdpKitError, match=f"count is {found} for 12 samples.*must be a tensor always"
        ):
            steps(made, end=1)


def only_three(model: nn.Module, batch: Any) -> LossSum:
    """Counts the samples of class 3 alone."""
    keeps = batch[1] == 3
    return LossSum(
        (cross_entropy(model(batch[0]), batch[1], reduction="none") * keeps).sum(), keeps.sum()
    )


def with_barren_step(step: int) -> TensorDataset:
    """Returns data with no sample of class 3 in the global batch of `step`, counted from 0."""
    inputs, labels = vectors().tensors
    labels = labels.clone()
    order = permutation(0, 0, 240)[step * 24 : (step + 1) * 24]
    labels[order] = labels[order].clamp(max=2)
    return TensorDataset(inputs, labels)


@pytest.mark.ranks(1, 2)
def test_a_count_of_zero_over_the_whole_batch_names_the_step(group: Group) -> None:
    def count(batch: Any) -> int:
        return int((batch[1] == 3).sum())

    for known in (None, count):
        data = Data(with_barren_step(1), count=known)
        made = build(
            recipe(Settings(), loss=only_three, train_data=lambda data=data: data),
            Settings(),
            group,
        )
        steps(made, end=1)
        before = {name: tensor.clone() for name, tensor in made.training.model.state_dict().items()}
        with pytest.raises(
            DdpKitError, match=r"step 2: the loss's count over the whole global batch is 0"
        ):
            steps(made, start=1, end=2)
        assert all(
            torch.equal(tensor, before[name])
            for name, tensor in made.training.model.state_dict().items()
        )


@pytest.mark.ranks(2)
def test_a_rank_without_counted_samples_changes_nothing(group: Group) -> None:
    """Its micro-batches have a count of 0; those of the other rank have not."""
    inputs, labels = vectors().tensors
    order = permutation(0, 0, 240)
    kept = labels.clone()
    kept[order[12:24]] = kept[order[12:24]].clamp(max=2)
    settings = Settings(max_steps=1, micro_batch=4)
    ours = trace(
        group,
        recipe(settings, loss=only_three, train_data=lambda: TensorDataset(inputs, kept)),
        settings,
    )
    own = order[:24][(kept[order[:24]] == 3).numpy()]
    model = build_model(recipe(settings), settings, group)
    cross_entropy(model(inputs[own].double()), kept[own]).backward()
    assert distance(ours.gradient, {name: p.grad for name, p in model.named_parameters()}) <= 1e-12


@pytest.mark.ranks(1)
def test_an_exception_in_the_loss_says_where_it_was(group: Group) -> None:
    loss = Changing(lambda n: 1 / 0)
    made = build(recipe(Settings(micro_batch=6), loss=loss), Settings(micro_batch=6), group)
    loss.is_on = True
    with pytest.raises(ZeroDivisionError) as caught:
        steps(made, end=1)
    first = ", ".join(str(index) for index in permutation(0, 0, 240)[:6])
    (note,) = caught.value.__notes__
    assert note.startswith("in the forward pass of step 1")
    assert note.endswith(f"samples {first}")
