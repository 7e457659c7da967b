"""Losses and gradients that are not finite, as other people's code makes them: none of them trains on in silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_steps import fused, with_bad_sample
from cases import Settings, classify, plain, recipe
from torch import nn

from ddp_kit import LossSum
from ddp_kit.data.seeding import permutation
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import NonFiniteError
from ddp_kit.setup.build import Built, build
from ddp_kit.strategies.precision import (
    LARGEST_SCALE,
    MOST_AT_FLOOR,
    SMALLEST_SCALE,
    LossScale,
    has_fp16,
)
from ddp_kit.testing import assert_same_on_all_ranks
from ddp_kit.training.nonfinite import look_back
from ddp_kit.training.step import train_step

Cut = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def chosen(total: torch.Tensor, is_bad: torch.Tensor) -> torch.Tensor:
    return torch.where(is_bad, torch.inf, total)


def filled(total: torch.Tensor, is_bad: torch.Tensor) -> torch.Tensor:
    return total.masked_fill(is_bad, torch.nan)


def behind_a_relu(total: torch.Tensor, is_bad: torch.Tensor) -> torch.Tensor:
    """A hinge that nothing passes, and a constant beside it that is inf."""
    sign = torch.where(is_bad, -1.0, 1.0)
    return (total * sign).relu() + torch.where(is_bad, torch.inf, 0.0)


def replaced(total: torch.Tensor, is_bad: torch.Tensor) -> torch.Tensor:
    """What is nan is taken out, and its gradient with it; a barrier puts an inf in its place."""
    kept = (total * torch.where(is_bad, torch.nan, 1.0)).nan_to_num(nan=1e-9)
    return kept - torch.where(is_bad, 0.0, 1.0).log().abs().neg()


def steps(made: Built, *, start: int = 0, end: int) -> None:
    for batch in made.feed.batches(start=start, end=end):
        train_step(made.training, batch)


def without_gradient(cut: Cut) -> Callable[[nn.Module, Any], LossSum]:
    """Returns a loss that is not finite, and sends no gradient at all, where label 9 is in the micro-batch."""

    def loss(model: nn.Module, batch: Any) -> LossSum:
        inputs, labels = batch
        found = classify(model, (inputs, labels % 9))
        return LossSum(cut(found.total, (labels == 9).any()), found.count)

    return loss


def refused(group: Group, settings: Settings, cut: Cut, **parts: Any) -> None:
    """Expects step 3 to be refused on all ranks alike, with rank and sample, and no weight changed."""
    position = 2 * 24 + 23  # the last sample of step 3, which the last rank has
    made = build(
        recipe(
            settings,
            loss=without_gradient(cut),
            train_data=lambda: with_bad_sample(position),
            **parts,
        ),
        settings,
        group,
    )
    training = made.training
    training.objectives[0].is_deferred = "optimizer" in parts
    steps(made, end=2)
    look_back(training)
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    sample = permutation(0, 0, 240)[position]
    named = rf"step 3 is not finite on rank {group.world_size - 1}, samples .*\b{sample}\. The step"
    with pytest.raises(NonFiniteError, match=named):
        steps(made, start=2, end=4)  # a deferred verdict comes one step later
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    training.control_packet.close()


@pytest.mark.ranks(1, 2)
def test_a_loss_that_is_not_finite_and_sends_no_gradient_is_refused_on_all_ranks(
    group: Group,
) -> None:
    for cut in (chosen, filled, behind_a_relu, replaced):
        refused(group, Settings(micro_batch=4), cut)
    refused(group, Settings(micro_batch=12), chosen)
    refused(group, Settings(micro_batch=4), chosen, optimizer=fused("SGD"))


@pytest.mark.ranks(1, 2)
def test_so_it_is_whatever_sums_the_gradients(group: Group) -> None:
    changes: list[dict[str, Any]] = [
        {"exact": True, "micro_batch": 6},
        {"find_unused_parameters": True},
        {"strategy": "zero1"},
        {"strategy": "fsdp", "precision": "fp32"},
    ]
    for change in changes:
        refused(group, Settings(**{"micro_batch": 4, **change}), chosen)


def rooted(model: nn.Module, batch: Any) -> LossSum:
    """Finite, and with a gradient of nan wherever the output is 0: for good."""
    return LossSum(model(batch[0]).float().abs().sqrt().sum(), len(batch[1]))


def still() -> nn.Module:
    model = plain()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return model


@pytest.mark.ranks(1, 2)
def test_an_fp16_run_whose_gradients_are_nan_for_good_ends(group: Group) -> None:
    if not has_fp16(torch.device("cpu")):
        pytest.skip("no float16 kernels for this CPU")
    settings = Settings(precision="fp16", max_steps=70, epochs=20)
    made = build(recipe(settings, model=still, loss=rooted), settings, group)
    training = made.training
    scale = training.objectives[0].scale
    scale.scale = SMALLEST_SCALE * 4
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    named = r"last 20 steps, up to step 22, are not finite at the smallest loss scale.*2\.weight"
    with pytest.raises(NonFiniteError, match=named):
        steps(made, end=70)
    assert training.step == MOST_AT_FLOOR + 1
    assert all(
        torch.equal(value, before[name]) for name, value in training.model.state_dict().items()
    )
    assert_same_on_all_ranks(training.model.state_dict(), group)
    training.control_packet.close()


def test_one_good_step_between_begins_the_count_anew() -> None:
    scale = LossScale(is_on=True, scale=SMALLEST_SCALE)
    for is_bad in [True] * 19 + [False] + [True] * 19:
        scale.update(overflowed=is_bad)
        assert not scale.is_hopeless
    scale.update(overflowed=True)
    assert scale.is_hopeless


def test_a_scale_grows_to_a_limit_from_which_it_can_be_halved() -> None:
    """A run with gradients of 0 would double it until it is inf, and half of inf is inf."""
    scale = LossScale(is_on=True, scale=LARGEST_SCALE, growth_interval=1)
    for _ in range(2000):
        scale.update(overflowed=False)
    assert scale.scale == LARGEST_SCALE
    scale.update(overflowed=True)
    assert scale.scale == LARGEST_SCALE / 2
