"""Several losses and optimizers on one global batch: a small GAN against a loop written by hand."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, distance, vectors
from gans import Gan, fooled, gan, judged
from lives import Life, Notes
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from ddp_kit import LossSum, Objective, Recipe
from ddp_kit.data.seeding import forward_key, permutation, seed_forward
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, NonFiniteError
from ddp_kit.setup.build import build, build_model
from ddp_kit.testing import assert_same_on_all_ranks
from ddp_kit.trackers.base import RunInfo
from ddp_kit.training.reporter import Reporter
from ddp_kit.training.step import train_step


def by_hand(
    model: Any, settings: Settings, *, order: str
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Trains in a bare loop on whole batches. Returns the losses and gradient norms of each step, and the last weights."""
    optimizers = {
        "d": SGD(model.discriminator.parameters(), lr=0.5, momentum=0.9),
        "g": Adam(model.generator.parameters(), lr=0.05),
    }
    scheduler = ExponentialLR(optimizers["g"], gamma=0.9)
    found = []
    for step in range(settings.max_steps):
        samples = permutation(settings.seed, 0, 240)[step * 24 : (step + 1) * 24]
        batch = [vectors().tensors[0][samples].double()]
        record: dict[str, float] = {}
        for name in order:
            part = model.discriminator if name == "d" else model.generator
            result = (judged if name == "d" else fooled)(model, batch)
            prefix = "discriminator/" if name == "d" else "generator/"
            model.zero_grad()
            (result.total / 24).backward()
            record[f"{prefix}loss"] = result.total.item() / 24
            record[f"{prefix}grad_norm"] = float(
                torch.nn.utils.clip_grad_norm_(part.parameters(), settings.grad_clip)
            )
            optimizers[name].step()
        scheduler.step()
        found.append(record)
    return found, model.state_dict()


@pytest.mark.ranks(1, 2, 4)
def test_a_gan_gives_the_numbers_of_a_loop_written_by_hand(group: Group) -> None:
    """Each objective clips its own gradients; in the other order they are other numbers."""
    settings = Settings(max_steps=8, grad_clip=0.2, micro_batch=5)
    ends = []
    for order in ("dg", "gd"):
        made = build(gan(order=order), settings, group)
        life = Life()
        reporter = Reporter([Notes(life)], log_every=1)
        reporter.start(RunInfo(run_dir=Path(), name="gan", settings={}, total_steps=8), step=0)
        for batch in made.feed.batches(start=0, end=8):
            sums = train_step(made.training, batch)
            reporter.step(made.training, sums, epoch=0, wait_s=0.0, is_last=False)
        reporter.flush()
        losses, state = by_hand(build_model(gan(), settings, group), settings, order=order)
        assert distance(made.training.model.state_dict(), state) <= 1e-10
        assert len(life.records) == 8
        for step, (ours, bare) in enumerate(zip(life.records, losses, strict=True)):
            assert {name: ours[name] for name in bare} == pytest.approx(bare, abs=1e-10)
            assert ours["generator/lr"] == pytest.approx(0.05 * 0.9**step)
            assert ours["discriminator/lr"] == 0.5
            assert 0 <= ours["discriminator/fooled"] <= 1
        assert_same_on_all_ranks(made.training.model.state_dict(), group)
        ends.append(state)
    assert distance(ends[0], ends[1]) > 1e-3


@pytest.mark.ranks(1, 2)
def test_an_objective_gives_no_gradient_to_the_other_parts(group: Group) -> None:
    settings = Settings(micro_batch=5)
    made = build(gan(), settings, group)
    training = made.training
    training.objectives = training.objectives[
        1:
    ]  # the generator's alone, through the discriminator
    for batch in made.feed.batches(start=0, end=1):
        train_step(training, batch)
    assert all(
        parameter.grad is None and parameter.requires_grad
        for parameter in training.model.discriminator.parameters()
    )
    assert all(parameter.grad is not None for parameter in training.model.generator.parameters())


def hopeless(model: Gan, batch: Any) -> LossSum:
    return LossSum(fooled(model, batch).total * torch.nan, len(batch[0]))


@pytest.mark.ranks(2)
def test_where_a_later_objective_is_not_finite_it_is_said_that_the_earlier_one_was_applied(
    group: Group,
) -> None:
    first, second = gan().objectives
    made = build(
        replace(gan(), objectives=[first, replace(second, loss=hopeless)]), Settings(), group
    )
    before = {name: tensor.clone() for name, tensor in made.training.model.state_dict().items()}
    with pytest.raises(
        NonFiniteError,
        match=r"The step of generator was not applied; that of discriminator, .* was\.",
    ):
        train_step(made.training, next(made.feed.batches(start=0, end=1)))
    for name, tensor in made.training.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("generator")


@pytest.mark.ranks(1)
def test_an_objective_with_a_wrong_part_or_foreign_parameters_is_refused(group: Group) -> None:
    def with_part(**changes: Any) -> Recipe:
        given: dict[str, Any] = {
            "loss": fooled,
            "optimizer": lambda part: SGD(part.parameters()),
            "trains": "generator",
        }
        other = Objective(
            loss=judged, optimizer=lambda part: SGD(part.parameters()), trains="discriminator"
        )
        return Recipe(
            model=Gan,
            objectives=[Objective(**(given | changes)), other],
            train_data=lambda: vectors(),
        )

    def foreign(part: nn.Module) -> SGD:
        return SGD([*part.parameters(), nn.Parameter(torch.zeros(2))])

    def partly(part: Any) -> SGD:
        return SGD(part[0].parameters())

    for changes, message in (
        ({"trains": "genrator"}, "genrator.*no such part.*Did you mean '?generator"),
        ({"optimizer": foreign}, "holds 1 tensors that are not parameters of the model"),
        ({"optimizer": partly}, r"does not hold generator\.2\.weight, generator\.2\.bias"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(with_part(**changes), Settings(), group)
    with pytest.raises(ConfigError, match="not both"):
        Recipe(model=Gan, loss=fooled, objectives=gan().objectives, train_data=lambda: vectors())


DRAWN: list[tuple[float, float, float]] = []


class Noisy(nn.Module):
    """Notes the noise that each loss draws, by generator, in the order of the forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = nn.Linear(6, 1)
        self.generator = nn.Linear(6, 1)

    def draw(self) -> None:
        DRAWN.append((torch.rand(()).item(), float(np.random.random()), random.random()))


def _noisy_loss(part: str) -> Callable[[Any, Any], LossSum]:
    def loss(model: Noisy, batch: Any) -> LossSum:
        model.draw()
        values = getattr(model, part)(batch[0])
        return LossSum(values.sum(), len(values))

    return loss


@pytest.mark.ranks(1, 2)
def test_objectives_of_one_step_draw_noise_of_their_own(group: Group) -> None:
    """A generator must not see its discriminator's noise again; the first objective's is that of a recipe with one."""
    settings = Settings(max_steps=2, micro_batch=12)
    parts = [
        Objective(
            loss=_noisy_loss(name),
            optimizer=lambda part: SGD(part.parameters(), lr=0.0),
            trains=name,
        )
        for name in ("discriminator", "generator")
    ]
    recipe = Recipe(model=Noisy, objectives=parts, train_data=lambda: vectors())
    made = build(recipe, settings, group)
    DRAWN.clear()
    for batch in made.feed.batches(start=0, end=2):
        train_step(made.training, batch)
    for numbers in zip(*DRAWN, strict=True):
        assert len(set(numbers)) == len(DRAWN)
    first_micro_batch = group.rank * 2 // group.world_size
    seed_forward(forward_key(settings.seed), 0, first_micro_batch, device=group.device)
    assert DRAWN[0][0] == torch.rand(()).item()
