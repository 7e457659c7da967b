"""Buffers: none thrown away, the same on all ranks at every step boundary, and frozen ones left alone."""

from typing import Any

import pytest
import torch
from cases import Counting, Settings, classify, distance, recipe, trace, vectors
from torch import nn

from ddp_kit import Data
from ddp_kit.data.batch_plan import BatchPlan, plan_batches
from ddp_kit.data.seeding import Purpose, key, permutation
from ddp_kit.distributed.process_group import Group
from ddp_kit.setup.build import build
from ddp_kit.testing import assert_same_on_all_ranks
from ddp_kit.training.step import train_step


def normalising() -> nn.Module:
    """Its statistics depend on the inputs alone, so that they can be worked out by hand."""
    return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))


def by_hand(settings: Settings, plan: BatchPlan) -> dict[str, torch.Tensor]:
    """Returns BatchNorm's buffers after each micro-batch of a step starts from the same base and the results are averaged."""
    inputs = vectors().tensors[0].double()
    mean = torch.zeros(6).double()
    variance = torch.ones(6).double()
    for step in range(settings.max_steps):
        order = permutation(settings.seed, 0, 240)[step * 24 : (step + 1) * 24]
        parts = [
            inputs[order[start:stop]]
            for start, stop in zip(plan.bounds, plan.bounds[1:], strict=False)
        ]
        mean = torch.stack([0.9 * mean + 0.1 * part.mean(0) for part in parts]).mean(0)
        variance = torch.stack([0.9 * variance + 0.1 * part.var(0) for part in parts]).mean(0)
    return {"0.running_mean": mean, "0.running_var": variance}


@pytest.mark.ranks(1, 2, 3)
def test_statistics_of_all_ranks_and_micro_batches_count(group: Group) -> None:
    for micro_batch in (4, 5):
        settings = Settings(micro_batch=micro_batch, max_steps=5)
        made = build(recipe(settings, model=normalising), settings, group)
        for batch in made.feed.batches(start=0, end=settings.max_steps):
            train_step(made.training, batch)
            assert_same_on_all_ranks(dict(made.training.model.named_buffers()), group)
            assert int(made.training.model[0].num_batches_tracked) == made.training.step
        found = {
            name: buffer
            for name, buffer in made.training.model.named_buffers()
            if "running" in name
        }
        plan = plan_batches(24, micro_batch=micro_batch, world_size=group.world_size)
        assert distance(found, by_hand(settings, plan)) <= 1e-12


@pytest.mark.ranks(1)
def test_one_micro_batch_gives_the_statistics_of_plain_torch(group: Group) -> None:
    settings = Settings(max_steps=6, precision="fp32")
    ours = trace(group, recipe(settings, model=normalising), settings)
    torch.manual_seed(key(0, Purpose.WEIGHTS))
    model = normalising()
    for step in range(settings.max_steps):
        model(vectors().tensors[0][permutation(0, 0, 240)[step * 24 : (step + 1) * 24]])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, ours.state[name]), name


class Block(nn.Sequential):
    """What is checkpointed: its forward pass runs again in backward."""


def blocks() -> nn.Module:
    return nn.Sequential(
        Block(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3)), nn.Linear(8, 4)
    )


@pytest.mark.ranks(1, 2)
def test_checkpointed_activations_do_not_count_a_batch_twice(group: Group) -> None:
    for micro_batch in (0, 6):
        made = [
            Settings(micro_batch=micro_batch, max_steps=4, activation_checkpointing=name)
            for name in ("", "Block")
        ]
        kept, again = (trace(group, recipe(settings, model=blocks), settings) for settings in made)
        assert int(again.state["0.1.num_batches_tracked"]) == 4
        floats = [
            {name: tensor.double() for name, tensor in life.state.items()} for life in (again, kept)
        ]
        assert distance(*floats) <= 1e-12
        assert again.losses == pytest.approx(kept.losses, abs=1e-12)


@pytest.mark.ranks(1, 2, 3)
def test_of_another_buffer_what_the_first_micro_batch_makes_of_it_stays(group: Group) -> None:
    settings = Settings(micro_batch=4, max_steps=3, ema=0.5)
    made = build(recipe(settings, model=Counting), settings, group)
    training = made.training
    model: Any = training.model
    assert not model.seen.any()  # the dry run has left no trace
    assert not model.mean.any()
    seen = torch.zeros(6).double()
    mean = torch.zeros(6).double()
    average = torch.zeros(6).double()
    inputs = vectors().tensors[0].double()
    for batch in made.feed.batches(start=0, end=settings.max_steps):
        first = inputs[permutation(0, 0, 240)[training.step * 24 :][:4]]
        seen += first.sum(0)
        mean = 0.5 * mean + 0.5 * first.mean(0)
        average = 0.5 * average + 0.5 * mean
        train_step(training, batch)
        assert_same_on_all_ranks(dict(model.named_buffers()), group)
        assert torch.allclose(model.seen, seen, atol=1e-12)
        assert torch.allclose(model.mean, mean, atol=1e-12)
    assert training.average is not None
    assert torch.allclose(
        dict(zip(training.average.names, training.average.averages, strict=True))["mean"],
        average,
        atol=1e-12,
    )


def half_frozen() -> nn.Module:
    """A pretrained layer whose statistics are frozen, as for fine-tuning, and one that trains."""
    frozen = nn.BatchNorm1d(6)
    with torch.no_grad():
        frozen.running_mean.uniform_(-1, 1)
        frozen.running_var.uniform_(0.3, 3)
    model = nn.Sequential(frozen, nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    frozen.eval()
    return model


@pytest.mark.ranks(1, 2)
def test_a_frozen_layer_keeps_its_statistics_bitwise_and_its_mode(group: Group) -> None:
    for micro_batch in (0, 4):
        settings = Settings(micro_batch=micro_batch, max_steps=5)
        made = build(
            recipe(settings, model=half_frozen, eval_data=lambda: Data(vectors(10)), loss=classify),
            settings,
            group,
        )
        model = made.training.model
        before = {name: buffer.clone() for name, buffer in model[0].named_buffers()}
        for batch in made.feed.batches(start=0, end=settings.max_steps):
            train_step(made.training, batch)
            made.evaluator(model)
            assert not model[0].training
            assert model[2].training
        for name, buffer in model[0].named_buffers():
            assert torch.equal(buffer, before[name]), name
        assert int(model[2].num_batches_tracked) == settings.max_steps
