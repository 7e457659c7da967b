"""What `--change` takes over from the life before, and what it begins anew; and that no optimizer goes on from another one's state."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, classify, plain, recipe, vectors
from lives import Life, alone, live
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, SequentialLR, StepLR

import ddp_kit
from ddp_kit import Recipe
from ddp_kit.checkpoint.find import Origin, find
from ddp_kit.checkpoint.state_dict import restore_state
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.testing import run_ranks

AT = 7  # steps of the first life
FIRST = Settings(epochs=2, max_steps=AT, precision="fp32")
SECOND = replace(FIRST, max_steps=AT + 4)


def two_lives(
    make: Callable[[Settings], Recipe], first: Settings, second: Settings, folder: Path
) -> Life:
    """Returns the second of two lives of a run, on this rank."""
    live(make, replace(first, run_dir=str(folder)))
    return live(make, replace(second, run_dir=str(folder)))


# The average


class Weights:
    """Notes the weights after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_start(self, model: nn.Module) -> None:
        self.model = model
        self.on_step(0)

    def on_step(self, step: int) -> None:
        self.seen.append(copy.deepcopy(self.model.state_dict()))

    def on_evaluation(self, step: int, metrics: Any) -> None:
        pass

    def on_end(self, reason: str) -> None:
        pass


def averaged_from(seen: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    average = copy.deepcopy(seen[0])
    for weights in seen[1:]:
        for name, own in average.items():
            own.lerp_(weights[name], 1 - decay)
    return average


def with_average(folder: Path) -> None:
    weights = Weights()

    def watched(settings: Settings) -> Recipe:
        return recipe(settings)

    live(watched, replace(FIRST, run_dir=str(folder)))
    settings = replace(SECOND, ema=0.5, change=("ema",), run_dir=str(folder))
    noted = ddp_kit.run(replace(recipe(settings), callbacks=[weights]), settings)
    opened = find(Origin(noted.run_dir / "checkpoints"), group=alone())
    assert opened is not None
    expected = averaged_from(weights.seen, 0.5)
    for name, average in expected.items():
        assert torch.allclose(opened.tensor(f"ema/{name}"), average), name
    again = replace(settings, max_steps=AT + 6, change=())
    weights.seen.clear()
    ddp_kit.run(replace(recipe(again), callbacks=[weights]), again)
    opened = find(Origin(noted.run_dir / "checkpoints"), group=alone())
    assert opened is not None
    weights.seen[0] = expected
    for name, average in averaged_from(weights.seen, 0.5).items():
        assert torch.allclose(opened.tensor(f"ema/{name}"), average), name


def without_average(folder: Path) -> dict[str, torch.Tensor]:
    live(recipe, replace(FIRST, ema=0.5, run_dir=str(folder / "run")))
    off = replace(SECOND, change=("ema",), run_dir=str(folder / "run"))
    cut = live(recipe, off)
    whole = live(recipe, replace(SECOND, run_dir=str(folder / "whole")))
    opened = find(Origin(folder / "run" / "checkpoints"), group=alone())
    assert opened is not None
    assert not [name for name in opened.kinds if name.startswith("ema/")]
    assert all(torch.equal(cut.state[name], tensor) for name, tensor in whole.state.items())
    return cut.state


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_average_that_is_switched_on_begins_from_the_weights(
    world_size: int, tmp_path: Path
) -> None:
    run_ranks(with_average, world_size, tmp_path / "run", group=False)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_average_that_is_switched_off_is_dropped_and_training_is_not_changed_by_it(
    world_size: int, tmp_path: Path
) -> None:
    run_ranks(without_average, world_size, tmp_path, group=False)


def test_another_decay_keeps_the_average(tmp_path: Path) -> None:
    first = replace(FIRST, ema=0.5)
    live(recipe, replace(first, run_dir=str(tmp_path)))
    opened = find(Origin(tmp_path / "checkpoints"), group=alone())
    assert opened is not None
    begun = {name: opened.tensor(f"ema/{name}") for name, _ in plain().named_parameters()}
    weights = Weights()
    second = replace(SECOND, ema=0.9, change=("ema",), run_dir=str(tmp_path))
    ddp_kit.run(replace(recipe(second), callbacks=[weights]), second)
    weights.seen[0] = begun
    opened = find(Origin(tmp_path / "checkpoints"), group=alone())
    assert opened is not None
    for name, average in averaged_from(weights.seen, 0.9).items():
        assert torch.allclose(opened.tensor(f"ema/{name}"), average), name


# What is best by another metric


def test_what_was_best_by_another_metric_is_forgotten(tmp_path: Path) -> None:
    """Accuracies are below 1 and these losses above: none would be better."""

    def measured(settings: Settings) -> Recipe:
        return recipe(settings, eval_data=lambda: vectors(48))

    stop = ddp_kit.settings.EarlyStop
    first = replace(FIRST, eval_every=2, early_stop=stop(metric="loss", mode="min", patience=2))
    second = replace(
        SECOND,
        max_steps=0,
        eval_every=2,
        early_stop=stop(metric="accuracy", mode="max", patience=2),
        change=("early_stop.metric", "early_stop.mode"),
    )
    life = two_lives(measured, first, second, tmp_path)
    assert "accuracy has not improved on 0." in life.reason


# What optimizers count


class ScheduleFree(SGD):
    """Counts in its groups, as the schedule-free ones and Prodigy do: in some that its constructor makes, and one that its step makes."""

    def __init__(self, params: Any, lr: float, momentum: float):
        super().__init__(params, lr, momentum=momentum)
        self.defaults |= {"k": 0, "d": 1.0}
        for group in self.param_groups:
            group |= {"k": 0, "d": 1.0, "scaled": 0.5}

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["d"] = group["d"] * (1 + group["scaled"] / group["k"])
            group["weight_sum"] = group.get("weight_sum", 0.0) + group["d"]
            group["numerator"] = group.get("numerator", torch.zeros(2)) + group["d"]
            for parameter in group["params"]:
                parameter.grad.mul_(group["d"] / (1 + group["weight_sum"]))
                parameter.grad.add_(group["numerator"].mean() * 1e-3)
        super().step(closure)


def counting(settings: Settings) -> Recipe:
    return recipe(
        settings, optimizer=lambda m: ScheduleFree(m.parameters(), settings.lr, settings.momentum)
    )


def cut_and_whole(
    make: Callable[[Settings], Recipe], folder: Path, changed: dict[str, Any]
) -> tuple[Life, Life]:
    """Returns a run that was stopped and changed, and one that was not."""
    first = replace(FIRST, lr=0.02)
    cut = two_lives(make, first, replace(first, max_steps=AT + 4, **changed), folder / "cut")
    whole = live(make, replace(first, max_steps=AT + 4, run_dir=str(folder / "whole")))
    return cut, whole


def counts_on(folder: Path, strategy: Any) -> None:
    changed = {"grad_clip": 1e9, "change": ("grad_clip",), "strategy": strategy}
    cut, whole = cut_and_whole(counting, folder, changed)
    assert all(torch.equal(cut.state[name], tensor) for name, tensor in whole.state.items())


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_an_optimizer_counts_in_its_groups_outlives_every_change(
    world_size: int, tmp_path: Path
) -> None:
    run_ranks(counts_on, world_size, tmp_path, "ddp", group=False)


def test_hyperparameters_that_a_constructor_puts_into_groups_are_those_of_the_new_settings(
    tmp_path: Path,
) -> None:
    """Layer-wise factors, as fine-tuning recipes have them, are settings and no counts."""
    made: list[Optimizer] = []

    def layered(settings: Settings) -> Recipe:
        def optimizer(model: nn.Module) -> Optimizer:
            groups = [
                {"params": [parameter], "lr_scale": settings.momentum * i}
                for i, parameter in enumerate(model.parameters())
            ]
            made.append(SGD(groups, lr=settings.lr))
            return made[-1]

        return recipe(settings, optimizer=optimizer)

    two_lives(layered, FIRST, replace(SECOND, momentum=0.5, change=("momentum",)), tmp_path)
    assert [group["lr_scale"] for group in made[-1].param_groups] == [0.0, 0.5, 1.0, 1.5]


def test_what_a_removed_schedule_has_moved_does_not_come_back(tmp_path: Path) -> None:
    made: list[Optimizer] = []

    def scheduled(settings: Settings) -> Recipe:
        def optimizer(model: nn.Module) -> Optimizer:
            made.append(SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum))
            return made[-1]

        schedule = None
        if settings.grad_clip:
            schedule = lambda built, steps: OneCycleLR(built, 0.5, total_steps=steps)  # noqa: E731
        return recipe(settings, optimizer=optimizer, scheduler=schedule)

    first = replace(FIRST, grad_clip=1e9)
    two_lives(scheduled, first, replace(SECOND, change=("grad_clip",)), tmp_path)
    (group,) = made[-1].param_groups
    assert (group["lr"], group["momentum"]) == (0.1, 0.9)


# Other optimizers and schedules


class Renamed(Adam):
    """Has Adam's state, and is another one for all that anybody knows."""


KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    "plain SGD": lambda parameters: SGD(parameters, lr=0.1),
    "Adam": lambda parameters: Adam(parameters, lr=0.1),
    "AdamW": lambda parameters: AdamW(parameters, lr=0.1),
    "Renamed": lambda parameters: Renamed(parameters, lr=0.1),
}
OTHERS = [
    ("Adam", "SGD"),
    ("SGD", "Adam"),
    ("plain SGD", "Adam"),
    ("Adam", "AdamW"),
    ("AdamW", "Adam"),
    ("Adam", "Renamed"),
]


def refused_whole(folder: Path, before: str, after: str) -> None:
    live(
        lambda own: recipe(own, optimizer=lambda model: KINDS[before](model.parameters())),
        replace(FIRST, run_dir=str(folder)),
    )
    models: list[nn.Module] = []

    def other(settings: Settings) -> Recipe:
        def optimizer(model: nn.Module) -> Optimizer:
            models.extend([model, copy.deepcopy(model)])
            return KINDS[after](model.parameters())

        return recipe(settings, optimizer=optimizer)

    saved, built = before.split()[-1], after.split()[-1]
    with pytest.raises(ConfigError) as refused:
        live(other, replace(SECOND, lr=0.2, change=("lr",), run_dir=str(folder)))
    text = str(refused.value)
    assert f"{saved}, and this attempt builds" in text
    assert f"{built}." in text
    assert "--init-from" in text
    live_one, fresh = (model.state_dict() for model in models)
    assert all(torch.equal(live_one[name], tensor) for name, tensor in fresh.items())


@pytest.mark.parametrize(("before", "after"), OTHERS)
def test_another_kind_of_optimizer_is_refused_by_name_before_the_model_is_touched(
    before: str, after: str, tmp_path: Path
) -> None:
    refused_whole(tmp_path, before, after)


def test_another_kind_of_optimizer_is_refused_on_two_ranks_too(tmp_path: Path) -> None:
    run_ranks(refused_whole, 2, tmp_path, "Adam", "AdamW", group=False)


def own_training(
    group: Group, optimizer: Callable[[Any], Optimizer], schedule: Any = None
) -> ddp_kit.training.state.Training:
    model = plain()
    built = optimizer(model.parameters())
    feed = ddp_kit.build_loader(vectors(), group=group, global_batch=8)
    return ddp_kit.wrap(
        model,
        built,
        classify,
        group=group,
        feed=feed,
        scheduler=schedule(built) if schedule else None,
    )


def saved_and_restored(
    folder: Path, before: tuple[Any, Any], after: tuple[Any, Any]
) -> ddp_kit.training.state.Training:
    with ddp_kit.process_group(device="cpu") as group:
        training = own_training(group, *before)
        for batch in training_batches(training, group):
            ddp_kit.train_step(training, batch)
        ddp_kit.save(training, folder)
    with ddp_kit.process_group(device="cpu") as group:
        training = own_training(group, *after)
        ddp_kit.restore(training, folder)
    return training


def training_batches(training: Any, group: Group) -> Any:
    feed = ddp_kit.build_loader(vectors(), group=group, global_batch=8)
    return feed.batches(start=training.step, end=training.step + 2)


SCHEDULES: dict[str, Any] = {
    "none": None,
    "step": lambda optimizer: StepLR(optimizer, 3),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 10),
    "step, cosine": lambda optimizer: SequentialLR(
        optimizer, [StepLR(optimizer, 3), CosineAnnealingLR(optimizer, 10)], milestones=[4]
    ),
    "cosine, step": lambda optimizer: SequentialLR(
        optimizer, [CosineAnnealingLR(optimizer, 10), StepLR(optimizer, 3)], milestones=[4]
    ),
}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("step", "cosine", "the schedule torch.StepLR, and this attempt builds the schedule"),
        ("none", "step", "no schedule, and this attempt builds the schedule torch.StepLR"),
        ("step", "none", "the schedule torch.StepLR, and this attempt builds no schedule"),
        ("step, cosine", "cosine, step", r"torch.SequentialLR\(torch.StepLR, torch.Cosine"),
    ],
)
def test_a_loop_of_ones_own_does_not_go_on_with_another_schedule(
    before: str, after: str, words: str, tmp_path: Path
) -> None:
    sgd = KINDS["SGD"]
    with pytest.raises(ConfigError, match=words):
        saved_and_restored(tmp_path, (sgd, SCHEDULES[before]), (sgd, SCHEDULES[after]))


@pytest.mark.parametrize(("before", "after"), [("Adam", "SGD"), ("SGD", "Adam")])
def test_a_checkpoint_that_does_not_name_its_optimizer_is_told_by_the_keys_of_its_groups(
    before: str, after: str, tmp_path: Path
) -> None:
    saved_and_restored(tmp_path, (KINDS[before], None), (KINDS[before], None))
    opened = find(Origin(tmp_path), group=alone())
    assert opened is not None
    for entry in opened.values["objectives"]:
        for key in ("optimizer", "schedule", "counted", "rest"):
            del entry[key]
    with ddp_kit.process_group(device="cpu") as group:
        restore_state(opened, own_training(group, KINDS[before]))
        with pytest.raises(ConfigError, match=r"an optimizer with .*, and this attempt builds"):
            restore_state(opened, own_training(group, KINDS[after]))


def test_keys_of_groups_that_were_renamed_are_refused_by_name(tmp_path: Path) -> None:
    class Own(SGD):
        key = "speed"

        def __init__(self, params: Any):
            super().__init__(params, lr=0.1)
            self.defaults[self.key] = 1.0
            self.param_groups[0][self.key] = 1.0

    first = Own
    second = type("Own", (Own,), {"key": "velocity"})
    with pytest.raises(ConfigError, match=r"an optimizer with speed.*Own, which has velocity"):
        saved_and_restored(tmp_path, (first, None), (second, None))


def test_the_best_checkpoint_may_be_older_than_the_average(tmp_path: Path) -> None:
    """The test data are evaluated with its weights as they were evaluated then."""

    def worse_and_worse(model: nn.Module, batch: Any) -> ddp_kit.LossSum:
        found = classify(model, batch)
        if model.training:
            return replace(found, total=-found.total)
        return found

    def tested(settings: Settings) -> Recipe:
        return recipe(
            settings,
            loss=worse_and_worse,
            eval_data=lambda: vectors(),
            test_data=lambda: vectors(),
        )

    first = replace(FIRST, max_steps=4, eval_every=2, lr=0.01)
    second = replace(first, max_steps=0, epochs=2, ema=0.5, change=("ema",))
    life = two_lives(tested, first, second, tmp_path)
    (found,) = (record for record in life.records if record["kind"] == "test")
    assert found["step"] <= 4
    assert life.metrics["test/loss"] < life.metrics["loss"]
