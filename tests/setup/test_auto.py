"""`--micro-batch auto`: the largest micro-batch that fits on every rank, found before training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Settings, classify, normed, recipe
from torch import nn

from ddp_kit import LossSum
from ddp_kit.data.dataset import as_data
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.setup.build import build, build_model
from ddp_kit.setup.find_batch_size import find_micro_batch
from ddp_kit.setup.memory_format import placement_of


def raises_above(size: int) -> Callable[[nn.Module, Any], LossSum]:
    """Returns a loss for which a device would be too small."""

    def loss(model: nn.Module, batch: Any) -> LossSum:
        if len(batch[1]) > size:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return classify(model, batch)

    return loss


def asks_above(size: int) -> Callable[[nn.Module, Any], LossSum]:
    """Returns a loss that asks this machine for more memory than there is."""

    def loss(model: nn.Module, batch: Any) -> LossSum:
        if len(batch[1]) > size:
            torch.empty(2**50, dtype=torch.uint8)
        return classify(model, batch)

    return loss


@pytest.mark.ranks(1, 2)
def test_auto_finds_the_largest_divisor_that_fits_on_every_rank(group: Group) -> None:
    settings = Settings(micro_batch="auto")
    for fails in (raises_above, asks_above):
        for limits, expected in (
            ((24, 24), 24 // group.world_size),
            ((9, 9), 8),
            ((11, 4), {1: 8, 2: 4}[group.world_size]),
        ):
            made = recipe(settings, model=normed, loss=fails(limits[group.rank]))
            assert build(made, settings, group).training.plan.largest == expected
    # the last rank is too small, the others are large enough
    is_last = group.rank == group.world_size - 1
    made = recipe(settings, loss=raises_above(0 if is_last else 24))
    with pytest.raises(ConfigError, match="not even one sample fits into memory on every rank"):
        build(made, settings, group)


@pytest.mark.ranks(1)
def test_auto_leaves_no_trace_and_lets_other_errors_through(group: Group) -> None:
    settings = Settings(micro_batch="auto")
    found = recipe(settings, model=normed, loss=raises_above(6))
    model = build_model(found, settings, group)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    placement = placement_of(model, settings, group)
    data = as_data(found.train_data())
    size = find_micro_batch(
        model, found.parts(), data, placement=placement, settings=settings, group=group
    )
    assert size == 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        build(recipe(settings, model=lambda: nn.Linear(5, 4)), settings, group)
