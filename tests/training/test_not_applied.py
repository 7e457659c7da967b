"""Steps that must not be applied: a loss or gradient that is not finite ends all ranks, with the weights as they were before."""

from typing import Any

import pytest
import torch
from bad_steps import fused, inf_at_9, with_bad_sample
from cases import Settings, normed, plain, recipe, weighted
from torch import nn
from torch.nn.functional import cross_entropy

from ddp_kit import LossSum, build_loader, wrap
from ddp_kit.data.seeding import permutation
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import NonFiniteError
from ddp_kit.settings import EarlyStop
from ddp_kit.setup.build import Built, build
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.stopping.signals import StopFlag
from ddp_kit.testing import assert_same_on_all_ranks
from ddp_kit.training.loop import fit
from ddp_kit.training.nonfinite import look_back
from ddp_kit.training.reporter import Reporter
from ddp_kit.training.step import train_step


def steps(made: Built, *, start: int = 0, end: int) -> None:
    for batch in made.feed.batches(start=start, end=end):
        train_step(made.training, batch)


def nan_at_9(model: nn.Module, batch: Any) -> LossSum:
    """Loss and gradient are nan where a bad sample is."""
    inputs, labels = batch
    losses = cross_entropy(model(inputs), labels % 9, reduction="none") * torch.where(
        labels == 9, torch.nan, 1.0
    )
    return LossSum(losses.sum(), len(labels))


class Noting(nn.Module):
    """BatchNorm, and a buffer of its own that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = normed()
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += inputs.detach().sum(0)
        return self.net(inputs)


class TwoDtypes(nn.Module):
    """A float64 layer before a float32 one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8).double()
        self.last = nn.Linear(8, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(inputs.double()).relu().float())


@pytest.mark.ranks(1, 2)
def test_a_bad_gradient_is_found_among_parameters_of_two_dtypes(group: Group) -> None:
    """A recipe's model is cast to one; that of a loop of one's own is not."""
    model = TwoDtypes()
    feed = build_loader(with_bad_sample(30), group=group, global_batch=24)
    training = wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nan_at_9, group=group, feed=feed
    )
    batches = feed.batches(start=0, end=2)
    train_step(training, next(batches))
    with pytest.raises(NonFiniteError, match="step 2"):
        train_step(training, next(batches))


@pytest.mark.ranks(1, 2, 3)
def test_a_loss_that_is_not_finite_ends_all_ranks_at_one_step_with_rank_and_samples_named(
    group: Group,
) -> None:
    position = 2 * 24 + 23  # the last sample of step 3, which the last rank has
    settings = Settings(micro_batch=4, grad_clip=1.0)
    for optimizer, loss in (
        (None, nan_at_9),
        (None, inf_at_9),
        ("SGD", inf_at_9),
        ("AdamW", nan_at_9),
    ):
        parts: dict[str, Any] = {"optimizer": fused(optimizer)} if optimizer else {}
        made = build(
            recipe(
                settings,
                model=Noting,
                loss=loss,
                train_data=lambda: with_bad_sample(position),
                **parts,
            ),
            settings,
            group,
        )
        training = made.training
        training.objectives[0].is_deferred = optimizer is not None
        steps(made, end=2)
        look_back(training)
        before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
        sample = permutation(0, 0, 240)[position]
        named = rf"the loss of step 3 is not finite on rank {group.world_size - 1}, samples .*\b{sample}\. The step was not"
        with pytest.raises(NonFiniteError, match=named):
            steps(made, start=2, end=4)  # a deferred verdict comes one step later
        for name, tensor in training.model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert_same_on_all_ranks(training.model.state_dict(), group)


@pytest.mark.ranks(2)
def test_deferring_the_verdict_changes_no_bit(group: Group) -> None:
    settings = Settings(micro_batch=5, max_steps=5, grad_clip=0.3)
    ends = []
    for is_deferred in (False, True):
        made = build(recipe(settings, loss=weighted, optimizer=fused("AdamW")), settings, group)
        made.training.objectives[0].is_deferred = is_deferred
        steps(made, end=5)
        look_back(made.training)
        ends.append(made.training.model.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.ranks(2)
def test_a_bad_last_step_is_not_missed_when_its_verdict_is_deferred(group: Group) -> None:
    """Nor is it evaluated: the loop looks back before it does."""
    settings = Settings(max_steps=3)
    made = build(
        recipe(
            settings,
            loss=inf_at_9,
            optimizer=fused("SGD"),
            train_data=lambda: with_bad_sample(2 * 24 + 23),
        ),
        settings,
        group,
    )
    made.training.objectives[0].is_deferred = True
    evaluated: list[int] = []
    with pytest.raises(NonFiniteError, match="the loss of step 3 is not finite on rank 1"):
        fit(
            made.training,
            made.feed.batches(start=0, end=3),
            cadence=made.cadence,
            report=Reporter([], log_every=1),
            evaluate=lambda epoch: evaluated.append(epoch) or {},  # type: ignore[func-returns-value]  # notes the call
            early_stopping=EarlyStopping(EarlyStop()),
            stop=StopFlag(),
        )
    assert not evaluated


def root(model: nn.Module, batch: Any) -> LossSum:
    """Finite, but its gradient is not where the output is 0."""
    return LossSum(model(batch[0]).abs().sqrt().sum(), len(batch[1]))


@pytest.mark.ranks(2)
def test_a_gradient_that_is_not_finite_though_the_loss_is_names_the_parameters(
    group: Group,
) -> None:
    def still() -> nn.Module:
        model = plain()
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        return model

    made = build(recipe(Settings(), model=still, loss=root), Settings(), group)
    with pytest.raises(
        NonFiniteError,
        match=r"the gradient of step 1 is not finite though the loss is, in .*2\.weight, 2\.bias",
    ):
        steps(made, end=1)
