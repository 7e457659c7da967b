"""Schedules as people write them, in a run whose length, rate or own settings change: the rates are those of a run that had the new settings from the beginning."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cases import Settings, classify, recipe
from lives import live
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)

import ddp_kit
from ddp_kit import LossSum, Recipe, schedules

AT = 7  # steps of the first life


@dataclass(frozen=True, kw_only=True)
class Own(Settings):
    """Fields of a recipe's own that a schedule reads."""

    floor: float = 0.0
    warmup: int = 2
    gamma: float = 0.5


Seen = list[list[tuple[Any, ...]]]
Schedule = Callable[[Optimizer, int, Own], Any]


def chained(optimizer: Optimizer, total_steps: int, own: Own) -> ChainedScheduler:
    warm = ConstantLR(optimizer, 0.1, total_iters=own.warmup)
    return ChainedScheduler([warm, ExponentialLR(optimizer, own.gamma)], optimizer=optimizer)


def of_three(optimizer: Optimizer, total_steps: int, own: Own) -> SequentialLR:
    parts = [
        LinearLR(optimizer, 0.1, total_iters=own.warmup),
        CosineAnnealingLR(optimizer, total_steps - 6, eta_min=own.floor),
        ConstantLR(optimizer, 0.01, total_iters=total_steps),
    ]
    return SequentialLR(optimizer, parts, milestones=[own.warmup, total_steps - 4])


class Noam(LRScheduler):
    """Computed from the step alone, as "Attention Is All You Need" has it."""

    def __init__(self, optimizer: Optimizer, warmup: int):
        self.warmup = warmup
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        step = self.last_epoch + 1
        factor = min(step**-0.5, step * self.warmup**-1.5)
        return [base * factor for base in self.base_lrs]


class Decay(LRScheduler):
    """Computed from the rate before, and moves the weight decay too."""

    def __init__(self, optimizer: Optimizer, total_steps: int):
        self.total_steps = total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.1 * self.last_epoch / self.total_steps
        factor = 1 - 1 / self.total_steps if self.last_epoch else 1
        return [group["lr"] * factor for group in self.optimizer.param_groups]


class Duck:
    """No LRScheduler of torch's: a text on the web."""

    def __init__(self, optimizer: Optimizer, total_steps: int):
        self.optimizer, self.total_steps, self.done = optimizer, total_steps, 0
        self.base = [group["lr"] for group in optimizer.param_groups]

    def step(self) -> None:
        self.done += 1
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * (1 - self.done / self.total_steps)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "base": self.base, "total_steps": self.total_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


SCHEDULES: dict[str, Schedule] = {
    "linear": lambda o, n, own: LinearLR(o, 1.0, own.floor, total_iters=n),
    "polynomial": lambda o, n, own: PolynomialLR(o, n, power=2),
    "cosine": lambda o, n, own: CosineAnnealingLR(o, n, eta_min=own.floor),
    "restarts": lambda o, n, own: CosineAnnealingWarmRestarts(o, max(2, n // 5), 2, own.floor),
    "one cycle": lambda o, n, own: OneCycleLR(o, [own.lr, own.lr / 2], total_steps=n),
    "cyclic": lambda o, n, own: CyclicLR(o, own.lr / 10, own.lr, step_size_up=n // 5),
    "triangles": lambda o, n, own: CyclicLR(o, own.lr / 10, own.lr, n // 5, mode="triangular2"),
    "step": lambda o, n, own: StepLR(o, n // 4, gamma=own.gamma),
    "multistep": lambda o, n, own: MultiStepLR(o, [n // 5, n // 2, n - 2], gamma=own.gamma),
    "exponential": lambda o, n, own: ExponentialLR(o, own.gamma ** (1 / n)),
    "multiplied": lambda o, n, own: MultiplicativeLR(o, lambda step: 1 - step / (2 * n)),
    "lambda": lambda o, n, own: LambdaLR(
        o, [lambda step: 1 - step / n, lambda step: 1 / (1 + step)]
    ),
    "chained": chained,
    "of three": of_three,
    "noam": lambda o, n, own: Noam(o, own.warmup),
    "decay": lambda o, n, own: Decay(o, n),
    "duck": lambda o, n, own: Duck(o, n),
    "ours": lambda o, n, own: schedules.warmup_cosine(o, n, warmup=own.warmup / 20),
}
FIRST = Own(epochs=2, max_steps=AT)
CHANGES = {
    "epochs": (replace(FIRST), replace(FIRST, epochs=3, max_steps=0, change=("epochs",)), 30),
    "max_steps": (
        Own(max_steps=AT + 5),
        Own(max_steps=20, change=("max_steps",)),
        20,
    ),
    "lr": (FIRST, replace(FIRST, max_steps=0, lr=0.02, change=("lr",)), 20),
    "own fields": (
        FIRST,
        replace(
            FIRST,
            max_steps=0,
            floor=0.01,
            warmup=5,
            gamma=0.9,
            change=("floor", "warmup", "gamma"),
        ),
        20,
    ),
    "nothing": (FIRST, replace(FIRST, max_steps=0), 20),
}


def two_groups(kind: str, model: nn.Module, own: Own) -> Optimizer:
    weight, *others = model.parameters()
    groups = [{"params": [weight]}, {"params": others, "lr": own.lr / 2}]
    if kind == "adam":
        return Adam(groups, lr=own.lr, betas=(own.momentum, 0.99))
    return SGD(groups, lr=own.lr, momentum=own.momentum)


def numbers(optimizer: Optimizer) -> list[tuple[Any, ...]]:
    keys = ("lr", "momentum", "betas", "weight_decay", "initial_lr", "max_lr", "min_lr")
    return [tuple(group.get(key) for key in keys) for group in optimizer.param_groups]


def scheduled(own: Own, schedule: Schedule, seen: Seen, kind: str = "sgd") -> Recipe:
    """A recipe that notes in `seen` what the optimizer has at each forward pass."""
    made: list[Optimizer] = []

    def optimizer(model: nn.Module) -> Optimizer:
        made.append(two_groups(kind, model, own))
        return made[0]

    def loss(model: nn.Module, batch: Any) -> LossSum:
        if made:
            seen.append(numbers(made[0]))
        return classify(model, batch)

    return recipe(
        own,
        loss=loss,
        optimizer=optimizer,
        scheduler=lambda built, total_steps: schedule(built, total_steps, own),
    )


def of_bare_torch(own: Own, schedule: Schedule, *, total_steps: int, kind: str = "sgd") -> Seen:
    """Returns what a run of these settings has at each step."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 4))
    optimizer = two_groups(kind, model, own)
    scheduler = schedule(optimizer, total_steps, own)
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
    seen: Seen = []
    for own in (first, second):
        seen.clear()
        ended = live(
            lambda own: scheduled(own, schedule, seen), replace(own, run_dir=str(tmp_path / "run"))
        )
    assert ended.step == total_steps
    at = first.max_steps
    expected = of_bare_torch(second, schedule, total_steps=total_steps)
    assert seen[at - total_steps :] == expected[at:]


@pytest.mark.parametrize("name", ["one cycle", "cyclic"])
def test_betas_that_a_schedule_moves_are_those_of_the_new_settings_too(
    name: str, tmp_path: Path
) -> None:
    first, second, total_steps = CHANGES["epochs"]
    seen: Seen = []
    for own in (first, second):
        seen.clear()
        live(
            lambda own: scheduled(own, SCHEDULES[name], seen, "adam"),
            replace(own, run_dir=str(tmp_path / "run")),
        )
    expected = of_bare_torch(second, SCHEDULES[name], total_steps=total_steps, kind="adam")
    assert seen[AT - total_steps :] == expected[AT:]


class Table(Duck):
    """Has a rate for each step and no more."""

    def step(self) -> None:
        self.done += 1
        rates = [1 / number for number in range(1, self.total_steps + 1)]
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * rates[self.done]


def test_a_schedule_of_ones_own_that_does_not_go_as_far_is_refused_by_name(tmp_path: Path) -> None:
    first = Own(max_steps=9, run_dir=str(tmp_path / "run"))
    live(lambda own: scheduled(own, SCHEDULES["duck"], []), first)
    with pytest.raises(
        ddp_kit.errors.ConfigError, match=r"at step 9, and the schedule .*\(Table\)"
    ):
        live(
            lambda own: scheduled(own, lambda o, n, own: Table(o, n), []),
            replace(first, max_steps=5, change=("max_steps",)),
        )
