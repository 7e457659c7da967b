"""The loop: schedules, records, early stopping, averaged and best weights, and who is told what."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Settings, normed, plain, recipe, vectors
from lives import live, lives
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, MultiStepLR

from ddp_kit import Recipe, schedules
from ddp_kit.data.seeding import Purpose, key, permutation
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.settings import EarlyStop
from ddp_kit.setup.build import build
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.training.ema import WeightAverage
from ddp_kit.training.loop import Cadence
from ddp_kit.training.step import train_step

# Schedules


def rates(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    """Returns the rate that each step uses."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = make(optimizer)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


PAIRS: dict[str, tuple[Any, Any]] = {
    "cosine": (
        lambda o: schedules.warmup_cosine(o, 40, warmup=0, final=0.1),
        lambda o: CosineAnnealingLR(o, T_max=40, eta_min=0.04),
    ),
    "linear": (
        lambda o: schedules.linear(o, 40, warmup=0, final=0.25),
        lambda o: LinearLR(o, 1.0, 0.25, total_iters=40),
    ),
    "step": (
        lambda o: schedules.step(o, 40, at=(0.5, 0.75), factor=0.1),
        lambda o: MultiStepLR(o, milestones=[20, 30], gamma=0.1),
    ),
    "exponential": (
        lambda o: schedules.exponential(o, 40, final=0.01),
        lambda o: ExponentialLR(o, gamma=0.01 ** (1 / 40)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_schedule_gives_the_rates_of_torchs(name: str) -> None:
    ours, torchs = PAIRS[name]
    assert rates(ours, 40) == pytest.approx(rates(torchs, 40), rel=1e-9)


def test_a_warm_up_rises_in_a_line_and_the_decay_has_the_steps_after_it() -> None:
    for warmup in (8, 0.2):
        found = rates(lambda o, warmup=warmup: schedules.warmup_cosine(o, 40, warmup=warmup), 40)
        assert found[:8] == pytest.approx([0.4 * (step + 1) / 9 for step in range(8)])
        assert found[8:] == pytest.approx(
            [0.2 * (1 + math.cos(math.pi * step / 32)) for step in range(32)]
        )
    for steps, warmup, message in (
        (0, 0.1, "type --epochs N or --max-steps N"),
        (5, 9, "does not fit into 5 steps"),
    ):
        with pytest.raises(ConfigError, match=message):
            rates(
                lambda o, steps=steps, warmup=warmup: schedules.linear(o, steps, warmup=warmup), 1
            )


def two_groups(settings: Settings) -> Recipe:
    """A rate for each layer, and a schedule that writes down how many steps it was promised."""

    def optimizer(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [
                {"params": model[0].parameters(), "lr": 0.2},
                {"params": model[2].parameters(), "lr": 0.1},
            ]
        )

    def scheduler(built: torch.optim.Optimizer, total_steps: int) -> Any:
        return CosineAnnealingLR(built, T_max=total_steps)

    return recipe(settings, optimizer=optimizer, scheduler=scheduler, eval_data=lambda: vectors(30))


def test_records_carry_the_rate_that_each_step_used_counted_in_optimizer_steps() -> None:
    """Two epochs of ten steps, each of several micro-batches; `max_steps` beside `epochs` only stops."""
    settings = Settings(epochs=2, max_steps=15, micro_batch=3, log_every=1)
    for life in (live(two_groups, settings), lives(two_groups, settings, world_size=2)[0]):
        cosine = [0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(15)]
        assert life.of("train", "lr/0") == pytest.approx([0.2 * value for value in cosine])
        assert life.of("train", "lr/1") == pytest.approx([0.1 * value for value in cosine])
        assert life.of("train", "lr") == life.of("train", "lr/0")


# Records


def evaluated(settings: Settings) -> Recipe:
    return recipe(settings, eval_data=lambda: vectors(30))


def bare(settings: Settings) -> list[tuple[float, float]]:
    """Returns loss and accuracy of each step, by hand."""
    torch.manual_seed(key(settings.seed, Purpose.WEIGHTS))
    model = plain().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)
    found = []
    for step in range(settings.max_steps):
        order = permutation(settings.seed, step // 10, 240)[step % 10 * 24 :][:24]
        inputs, labels = (tensor[order] for tensor in vectors().tensors)
        logits = model(inputs.double())
        loss = cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        found.append((loss.item(), (logits.argmax(1) == labels).double().mean().item()))
    return found


def test_records_hold_the_global_loss_of_their_step_and_what_a_user_looks_for() -> None:
    settings = Settings(max_steps=25, micro_batch=5, log_every=10, eval_every=10, grad_clip=1.0)
    reference = bare(settings)
    for life in (live(evaluated, settings), lives(evaluated, settings, world_size=3)[0]):
        kinds = [(record["kind"], record["step"], record["epoch"]) for record in life.records]
        expected: list[tuple[str, int, int]] = []
        for epoch, step in enumerate((10, 20, 25)):
            expected += [("train", step, epoch), ("eval", step, epoch)]
        assert kinds == expected
        train = [record for record in life.records if record["kind"] == "train"]
        assert [record["samples"] for record in train] == [240, 480, 600]
        for record in train:
            assert (record["loss"], record["accuracy"]) == pytest.approx(
                reference[record["step"] - 1], abs=1e-9
            )
            assert 0 <= record["data_wait"] <= 1
            assert (
                min(
                    record[name] for name in ("samples_per_s", "peak_memory_mib", "grad_norm", "lr")
                )
                > 0
            )
            assert list(record)[:4] == ["kind", "step", "epoch", "samples"]


def test_callbacks_observe_on_every_rank() -> None:
    settings = Settings(max_steps=4, eval_every=2)
    for life in lives(evaluated, settings, world_size=2):
        assert [call[:2] for call in life.calls] == [
            ("start", "Sequential"),
            *[
                ("step", 1),
                ("step", 2),
                ("evaluation", 2),
                ("step", 3),
                ("step", 4),
                ("evaluation", 4),
            ],
            ("end", "finished"),
        ]
        assert life.calls[-2][2] == life.metrics
    for life in lives(recipe, replace(settings, eval_every=0), world_size=1):
        assert not [
            call for call in life.calls if call[0] == "evaluation"
        ]  # there is nothing to evaluate


def test_an_evaluation_is_due_at_its_pace_at_every_epochs_end_and_at_the_end() -> None:
    def due(cadence: Cadence) -> list[int]:
        return [step for step in range(1, cadence.end + 1) if cadence.evaluates(step)]

    assert due(Cadence(end=25, steps_per_epoch=10)) == [10, 20, 25]
    assert due(Cadence(end=25, steps_per_epoch=10, eval_every=4)) == [4, 8, 10, 12, 16, 20, 24, 25]
    assert due(Cadence(end=7, steps_per_epoch=0, eval_every=3)) == [3, 6, 7]


# Early stopping, best weights and test data


def stops_at(values: list[float], **rule: Any) -> int:
    """Returns the evaluation, counted from 1, after which training stops; 0 if it does not."""
    stopping = EarlyStopping(EarlyStop(metric="value", **rule))
    return next(
        (i for i, value in enumerate(values, 1) if stopping.update({"value": value}, step=i)), 0
    )


def test_patience_counts_evaluations_without_an_improvement() -> None:
    assert stops_at([3, 2, 2, 2, 2], patience=2) == 4
    assert stops_at([3, 2, 2.5, 1, 2, 2], patience=2) == 6
    assert stops_at([1, 2, 2, 2], patience=2, mode="max") == 4
    assert stops_at([1, 2, 3, 4], patience=1, mode="max") == 0
    assert stops_at([3, 2.95, 2.92, 2.91], patience=3, min_delta=0.1) == 4
    assert (
        stops_at([3, 2.95, 2.85, 2.8], patience=2, min_delta=0.1) == 0
    )  # measured from the best, not from the last
    assert stops_at([math.nan] * 3, patience=3) == 3
    assert stops_at([math.nan, 2, math.nan, 1.5, math.nan], patience=2) == 0
    assert not EarlyStopping(EarlyStop()).update({}, step=1)
    with pytest.raises(
        ConfigError,
        match=r"--early-stop\.metric value: evaluation does not produce it; it produces other",
    ):
        EarlyStopping(EarlyStop(metric="value")).update({"other": 1.0}, step=1)


SCORES = {2: 0.5, 4: 0.7, 6: 0.6, 8: 0.9, 10: 0.8, 12: 0.1, 14: 0.2}  # the best at step 8


class Scored(nn.Module):
    """Counts the steps it was trained for, so that an evaluation can follow SCORES."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
        return self.layer(inputs)


def score(model: Any, batch: Any) -> dict[str, Any]:
    return {
        "score": (SCORES.get(int(model.steps), 0.0) * len(batch[1]), len(batch[1])),
        "steps": (model.steps * len(batch[1]), len(batch[1])),
    }


def scored(settings: Settings) -> Recipe:
    return recipe(
        settings,
        model=Scored,
        evaluate=score,
        eval_data=lambda: vectors(30),
        test_data=lambda: vectors(7),
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_early_stopping_ends_all_ranks_at_one_step_and_the_test_uses_the_best_weights(
    world_size: int,
) -> None:
    settings = Settings(
        max_steps=20,
        eval_every=2,
        log_every=3,
        early_stop=EarlyStop(metric="score", mode="max", patience=3),
    )
    ends = lives(scored, settings, world_size=world_size)
    assert {life.step for life in ends} == {14}
    assert {life.reason for life in ends} == {
        "stopped early: score has not improved on 0.9 (step 8) for 3 evaluations"
    }
    first = ends[0]
    assert [
        (record["step"], record["steps"]) for record in first.records if record["kind"] == "test"
    ] == [(8, 8.0)]
    assert first.metrics["test/steps"] == 8.0
    assert float(first.files["steps"]) == 8.0  # what the run leaves as its model
    assert float(first.state["steps"]) == 14.0  # the last weights are put back
    assert first.of("train", "step") == [3, 6, 9, 12]
    assert not first.records[0].keys() & {"test/steps", "test/score"}


@pytest.mark.ranks(1)
def test_it_is_said_at_start_where_best_may_not_be_what_was_meant(group: Group) -> None:
    def notes(rule: EarlyStop, **parts: Any) -> list[str]:
        settings = Settings(early_stop=rule)
        found = build(
            recipe(settings, eval_data=lambda: vectors(10), **parts), settings, group
        ).training.notes
        return [note.split(",")[0] for note in found]

    smaller = "a smaller accuracy counts as the better one: if it is the larger one"
    assert notes(EarlyStop(metric="accuracy")) == [smaller]
    assert (
        notes(EarlyStop(metric="accuracy", mode="max"))
        == notes(EarlyStop(metric="loss"))
        == notes(EarlyStop())
        == []
    )
    parts: dict[str, Any] = {
        "test_data": lambda: vectors(10),
        "evaluate": lambda model, batch: {"error": (torch.tensor(1.0), 1)},
    }
    assert notes(EarlyStop(), **parts) == ["the last weights are the ones tested"]
    assert notes(EarlyStop(metric="error"), **parts) == []


def test_the_test_data_steer_nothing() -> None:
    settings = Settings(max_steps=6, eval_every=2, log_every=1)
    with_test = lives(scored, settings, world_size=2)[0]
    without = lives(_untested, settings, world_size=2)[0]
    assert [
        kind for kind in (record["kind"] for record in with_test.records) if kind == "test"
    ] == ["test"]
    assert with_test.records[-1]["kind"] == "test"
    assert with_test.of("train", "loss") == without.of("train", "loss")
    assert all(torch.equal(tensor, without.state[name]) for name, tensor in with_test.state.items())


def _untested(settings: Settings) -> Recipe:
    return replace(scored(settings), test_data=None)


def test_a_run_that_stops_leaves_the_record_of_its_last_logged_step() -> None:
    settings = Settings(
        max_steps=20,
        eval_every=2,
        log_every=2,
        early_stop=EarlyStop(metric="score", mode="max", patience=1),
    )
    assert lives(scored, settings, world_size=2)[0].of("train", "step") == [2, 4, 6]


@pytest.mark.ranks(1)
def test_a_metric_that_evaluation_does_not_produce_is_refused_at_start(group: Group) -> None:
    settings = Settings(early_stop=EarlyStop(metric="acuracy"))
    with pytest.raises(
        ConfigError, match=r"does not produce it; it produces .*\. Did you mean '?accuracy"
    ):
        build(recipe(settings, eval_data=lambda: vectors(30)), settings, group)
    with pytest.raises(ConfigError, match="has no eval_data"):
        build(recipe(settings), settings, group)


# The average of the weights


@pytest.mark.ranks(1, 2)
def test_the_average_is_torchs_and_evaluation_uses_it_and_puts_the_weights_back(
    group: Group,
) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    settings = Settings(max_steps=6, micro_batch=6, ema=0.8)
    made = build(recipe(settings, model=normed, eval_data=lambda: vectors(30)), settings, group)
    training = made.training
    assert isinstance(training.average, WeightAverage)
    reference = AveragedModel(
        training.model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True
    )
    reference.update_parameters(
        training.model
    )  # its first call copies; ours begins with the initial weights
    for batch in made.feed.batches(start=0, end=6):
        train_step(training, batch)
        reference.update_parameters(training.model)
    averaged = {
        name: tensor
        for name, tensor in reference.module.state_dict().items()
        if tensor.is_floating_point()
    }
    for name, average in zip(training.average.names, training.average.averages, strict=True):
        assert torch.allclose(average, averaged[name], rtol=0, atol=1e-14), name
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    metrics = made.evaluator(training.model, average=training.average)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items()
    )
    inputs, labels = vectors(30).tensors
    reference.module.eval()
    assert metrics["loss"] == pytest.approx(
        cross_entropy(reference.module(inputs.double()), labels).item(), abs=1e-12
    )
    assert metrics["loss"] != pytest.approx(made.evaluator(training.model)["loss"], abs=1e-6)
