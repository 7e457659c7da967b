"""Promise 1: ranks and accumulation only split the batch. The reference is bare PyTorch on the whole global batch."""

import pytest
import torch
from cases import (
    Settings,
    Trace,
    classify,
    distance,
    normed,
    plain,
    recipe,
    trace,
    vectors,
    weighted,
)
from torch.nn.functional import cross_entropy

from ddp_kit.data.seeding import Purpose, key, permutation
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.distributed.topology import Topology


def alone(made, settings: Settings) -> Trace:
    with process_group(topology=Topology(), device="cpu") as group:
        return trace(group, made, settings)


def bare(
    settings: Settings, *, loss: str
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Trains by hand, without any of ddp_kit's step: one process, whole batches, mean losses."""
    torch.manual_seed(key(settings.seed, Purpose.WEIGHTS))
    model = plain().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)
    inputs, labels = vectors().tensors
    losses: list[float] = []
    gradient: dict[str, torch.Tensor] = {}
    for step in range(settings.max_steps):
        epoch, k = divmod(step, 240 // settings.global_batch)
        order = permutation(settings.seed, epoch, 240)[
            k * settings.global_batch : (k + 1) * settings.global_batch
        ]
        logits = model(inputs[order].double())
        if loss == "weighted":
            weight = torch.tensor([0.0, 0.5, 1.0, 3.0]).double()
            value = cross_entropy(logits, labels[order], weight=weight) + 0.01 * sum(
                p.square().sum() for p in model.parameters()
            )
        else:
            value = cross_entropy(logits, labels[order])
        optimizer.zero_grad()
        value.backward()
        if settings.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        losses.append(value.item())
        if not step:
            gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    return losses, gradient, dict(model.state_dict())


SPLITS = [
    {"micro_batch": 0},
    {"micro_batch": 3},
    {"micro_batch": 5},
]  # whole shares, dividing, ragged


def give_the_gradient_of_bare_pytorch(group: Group, *, steps: int) -> None:
    for split in SPLITS:
        for loss in (classify, weighted):
            settings = Settings(max_steps=steps, lr=0.05, grad_clip=0.3, **split)
            ours = trace(group, recipe(settings, loss=loss), settings)
            losses, gradient, state = bare(settings, loss=loss.__name__)
            assert distance(ours.gradient, gradient) <= 1e-12, (split, loss)
            assert distance(ours.state, state) <= 1e-9
            assert max(abs(a - b) for a, b in zip(ours.losses, losses, strict=True)) <= 1e-9


@pytest.mark.ranks(1, 3, 4)
def test_ranks_and_accumulation_give_the_gradient_of_bare_pytorch(group: Group) -> None:
    """12 steps: an epoch has 10."""
    give_the_gradient_of_bare_pytorch(group, steps=12)


@pytest.mark.ranks(2, 3)
def test_batchnorm_and_dropout_are_the_same_at_any_world_size_where_the_micro_batch_is_stated(
    group: Group,
) -> None:
    settings = Settings(max_steps=12, micro_batch=3, lr=0.05)
    ours = trace(group, recipe(settings, model=normed, loss=weighted), settings)
    one = alone(recipe(settings, model=normed, loss=weighted), settings)
    assert ours.samples == one.samples
    assert distance(ours.gradient, one.gradient) <= 1e-12
    assert max(abs(a - b) for a, b in zip(ours.losses, one.losses, strict=True)) <= 1e-9
    statistics = {
        name: value.double()
        for name, value in ours.state.items()
        if "running" in name or "tracked" in name
    }
    assert distance(statistics, {name: one.state[name].double() for name in statistics}) <= 1e-9
    assert int(one.state["1.num_batches_tracked"]) == settings.max_steps


@pytest.mark.ranks(1, 3)
def test_a_global_batch_is_the_same_samples_in_the_same_order_for_every_split(group: Group) -> None:
    for split in SPLITS:
        settings = Settings(max_steps=12, **split)
        ours = trace(group, recipe(settings), settings)
        for step, samples in enumerate(ours.samples):
            epoch, k = divmod(step, 10)
            assert samples == permutation(0, epoch, 240)[24 * k : 24 * (k + 1)].tolist()


@pytest.mark.ranks(2, 4)
def test_fp32_agrees_at_the_first_step_and_over_a_run_at_a_small_rate(group: Group) -> None:
    for steps, rate in ((1, 0.1), (12, 0.01)):
        settings = Settings(precision="fp32", max_steps=steps, micro_batch=6, lr=rate)
        ours = trace(group, recipe(settings, model=normed), settings)
        one = alone(recipe(settings, model=normed), settings)
        assert distance(ours.gradient, one.gradient) <= 1e-5
        assert max(abs(a - b) for a, b in zip(ours.losses, one.losses, strict=True)) <= 1e-5


@pytest.mark.ranks(2)
def test_a_count_known_before_the_forward_pass_gives_the_same_numbers(group: Group) -> None:
    from ddp_kit import Data

    def count(batch: list[torch.Tensor]) -> float:
        return float(torch.tensor([0.0, 0.5, 1.0, 3.0])[batch[1]].sum())

    settings = Settings(micro_batch=5, max_steps=10)
    known = trace(
        group,
        recipe(settings, loss=weighted, train_data=lambda: Data(vectors(), count=count)),
        settings,
    )
    found = trace(group, recipe(settings, loss=weighted), settings)
    assert distance(known.gradient, found.gradient) <= 1e-12


@pytest.mark.ranks(3)
def test_one_step_costs_one_all_reduce_of_each_bucket(group: Group) -> None:
    """With accumulation as without: only the last micro-batch sums over ranks."""
    from unittest.mock import patch

    import torch.distributed as dist

    from ddp_kit.setup.build import build
    from ddp_kit.training.step import train_step

    settings = Settings(micro_batch=2, max_steps=4)
    made = build(recipe(settings), settings, group)
    synced = []
    wrapped = made.training.objectives[0].call
    plain_forward = type(wrapped).forward
    with patch.object(
        type(wrapped),
        "forward",
        lambda self, *a: (synced.append(self.require_backward_grad_sync), plain_forward(self, *a))[
            1
        ],
    ):
        with patch.object(
            dist, "all_reduce", side_effect=AssertionError("an all-reduce besides DDP's own")
        ):
            for batch in made.feed.batches(start=0, end=4):
                train_step(made.training, batch)
    assert synced == [False, False, False, True] * 4


@pytest.mark.slow
@pytest.mark.steady
@pytest.mark.ranks(2, 4, 8)
def test_all_of_this_holds_on_two_to_eight_ranks_and_over_50_steps(group: Group) -> None:
    give_the_gradient_of_bare_pytorch(group, steps=50)
    test_batchnorm_and_dropout_are_the_same_at_any_world_size_where_the_micro_batch_is_stated(group)
    test_a_global_batch_is_the_same_samples_in_the_same_order_for_every_split(group)
