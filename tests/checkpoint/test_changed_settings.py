"""What a life with other settings takes over from the one before: how far it is, and nothing that the new settings decide."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, classify, recipe
from lives import live
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)

import ddp_kit
from ddp_kit import LossSum, Recipe, process_group
from ddp_kit.schedules import warmup_cosine
from ddp_kit.strategies.precision import LossScale, has_fp16

AT = 7  # steps of the first life
Rates = list[list[tuple[float, ...]]]
Schedule = Callable[[Optimizer, int, float], LRScheduler]


def warm_cosine(optimizer: Optimizer, total_steps: int, lr: float) -> LRScheduler:
    parts = [LinearLR(optimizer, 0.1, total_iters=5), CosineAnnealingLR(optimizer, total_steps - 5)]
    return SequentialLR(optimizer, parts, milestones=[5])


SCHEDULES: dict[str, Schedule] = {
    "linear": lambda optimizer, total_steps, lr: LinearLR(
        optimizer, 1.0, 0.0, total_iters=total_steps
    ),
    "polynomial": lambda optimizer, total_steps, lr: PolynomialLR(optimizer, total_steps, power=2),
    "cosine": lambda optimizer, total_steps, lr: CosineAnnealingLR(
        optimizer, total_steps, eta_min=lr / 10
    ),
    "one cycle": lambda optimizer, total_steps, lr: OneCycleLR(
        optimizer, [lr, lr / 2], total_steps=total_steps
    ),
    "warm-up and cosine": warm_cosine,
    "cyclic": lambda optimizer, total_steps, lr: CyclicLR(
        optimizer, lr / 10, lr, step_size_up=total_steps // 5
    ),
    "warmup_cosine": lambda optimizer, total_steps, lr: warmup_cosine(
        optimizer, total_steps, warmup=0.2
    ),
    "lambda": lambda optimizer, total_steps, lr: LambdaLR(
        optimizer, lambda step: 1 - step / total_steps
    ),
}
LONGER = (Settings(epochs=2, max_steps=AT), Settings(epochs=3, max_steps=0, change=("epochs",)), 30)
CHANGES = {
    "epochs": LONGER,
    "max_steps": (Settings(max_steps=AT), Settings(max_steps=20, change=("max_steps",)), 20),
    "lr": (
        Settings(epochs=2, max_steps=AT),
        Settings(epochs=2, max_steps=0, lr=0.02, change=("lr",)),
        20,
    ),
    "something else": (
        Settings(epochs=2, max_steps=AT),
        Settings(epochs=2, max_steps=0, grad_clip=1e9, change=("grad_clip",)),
        20,
    ),
    "nothing": (Settings(epochs=2, max_steps=AT), Settings(epochs=2, max_steps=0), 20),
}


def two_groups(model: nn.Module, settings: Settings) -> Optimizer:
    weight, *others = model.parameters()
    groups = [{"params": [weight]}, {"params": others, "lr": settings.lr / 2}]
    return SGD(groups, lr=settings.lr, momentum=settings.momentum)


def numbers(optimizer: Optimizer) -> list[tuple[float, ...]]:
    return [(group["lr"], group["momentum"]) for group in optimizer.param_groups]


def scheduled(settings: Settings, schedule: Schedule, seen: Rates) -> Recipe:
    """A recipe that notes in `seen` what the optimizer has at each forward pass."""
    made: list[Optimizer] = []

    def optimizer(model: nn.Module) -> Optimizer:
        made.append(two_groups(model, settings))
        return made[0]

    def loss(model: nn.Module, batch: Any) -> LossSum:
        if made:
            seen.append(numbers(made[0]))
        return classify(model, batch)

    return recipe(
        settings,
        loss=loss,
        optimizer=optimizer,
        scheduler=lambda built, total_steps: schedule(built, total_steps, settings.lr),
    )


def of_bare_torch(settings: Settings, schedule: Schedule, *, total_steps: int) -> Rates:
    """Returns what a run of these settings has at each step."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 4))
    optimizer = two_groups(model, settings)
    scheduler = schedule(optimizer, total_steps, settings.lr)
    found = []
    for _ in range(total_steps):
        found.append(numbers(optimizer))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_as_if_the_run_had_always_had_the_new_settings(
    name: str, change: str, tmp_path: Path
) -> None:
    first, second, total_steps = CHANGES[change]
    schedule = SCHEDULES[name]
    seen: Rates = []
    for settings in (first, second):
        seen.clear()
        ended = live(
            lambda own: scheduled(own, schedule, seen),
            replace(settings, run_dir=str(tmp_path / "run")),
        )
    assert ended.step == total_steps
    assert seen[AT - total_steps :] == of_bare_torch(second, schedule, total_steps=total_steps)[AT:]


def test_a_schedule_that_ends_before_the_step_reached_is_refused_by_name(tmp_path: Path) -> None:
    first = Settings(max_steps=9, run_dir=str(tmp_path / "run"))
    live(lambda own: scheduled(own, SCHEDULES["one cycle"], []), first)
    second = replace(first, max_steps=5, change=("max_steps",))
    with pytest.raises(
        ddp_kit.errors.ConfigError,
        match=r"at step 9, and the schedule of the changed settings \(OneCycleLR\)",
    ):
        live(lambda own: scheduled(own, SCHEDULES["one cycle"], []), second)


class Counting(SGD):
    """Counts its steps in its groups, as schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float, momentum: float):
        super().__init__(params, lr, momentum=momentum)
        self.defaults["count"] = 0
        for group in self.param_groups:
            group["count"] = 0

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["count"] += 1


def test_what_an_optimizer_counts_in_its_groups_goes_on_and_its_arguments_are_the_new_ones(
    tmp_path: Path,
) -> None:
    made: list[Optimizer] = []

    def counted(settings: Settings) -> Recipe:
        def optimizer(model: nn.Module) -> Optimizer:
            made.append(Counting(model.parameters(), settings.lr, settings.momentum))
            return made[-1]

        return recipe(settings, optimizer=optimizer)

    first = Settings(epochs=2, max_steps=AT, run_dir=str(tmp_path / "run"))
    live(counted, first)
    live(counted, replace(first, max_steps=9, momentum=0.5, lr=0.02, change=("momentum", "lr")))
    (group,) = made[-1].param_groups
    assert (group["count"], group["momentum"], group["lr"]) == (9, 0.5, 0.02)


# The loss scale

needs_fp16 = pytest.mark.skipif(
    not has_fp16(torch.device("cpu")), reason="torch has no float16 kernels for this CPU"
)


@needs_fp16
@pytest.mark.parametrize(
    ("before", "after", "scale"),
    [
        ("fp32", "fp16", LossScale(is_on=True, scale=2.0**16)),
        ("fp16", "fp32", LossScale(is_on=False)),
        ("fp16", "bf16", LossScale(is_on=False)),
        ("fp16", "fp16", LossScale(is_on=True, scale=4.0, good_steps=3)),
    ],
)
def test_a_loss_scale_is_taken_over_from_fp16_to_fp16_only(
    before: Any, after: Any, scale: LossScale, tmp_path: Path
) -> None:
    """The scale decides what is done with gradients that are not finite: skipped in fp16, an error otherwise."""
    with process_group(device="cpu") as group:
        for precision in (before, after):
            settings = Settings(precision=precision)
            model = recipe(settings).model()
            feed = ddp_kit.build_loader(recipe(settings).train_data(), group=group, global_batch=24)
            training = ddp_kit.wrap(
                model,
                SGD(model.parameters(), lr=0.1),
                classify,
                group=group,
                feed=feed,
                precision=precision,
            )
            own = training.objectives[0].scale
            if ddp_kit.restore(training, tmp_path):
                break
            if own.is_on:
                own.scale = 4.0
                own.good_steps = 3
            training.step = 1
            ddp_kit.save(training, tmp_path)
            training.checkpoints.finish()
            training.checkpoints = None
        assert own == scale


@needs_fp16
def test_change_precision_trains_with_the_scale_of_the_new_one(tmp_path: Path) -> None:
    for before, after in (("fp32", "fp16"), ("fp16", "bf16")):
        seen: list[torch.Tensor] = []

        def noting(settings: Settings, seen: list[torch.Tensor] = seen) -> Recipe:
            def loss(model: nn.Module, batch: Any) -> LossSum:
                found = classify(model, batch)
                if found.total.requires_grad:
                    found.total.register_hook(lambda gradient: seen.append(gradient * 24))
                return found

            return recipe(settings, loss=loss)

        first = Settings(epochs=2, max_steps=3, precision=before, run_dir=str(tmp_path / before))
        live(noting, first)
        seen.clear()
        live(noting, replace(first, max_steps=5, precision=after, change=("precision",)))
        assert [round(float(found)) for found in seen[-2:]] == [2**16 if after == "fp16" else 1] * 2
