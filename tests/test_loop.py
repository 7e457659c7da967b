"""The loop: schedules, records, early stopping, averaged and best weights, and who is told what."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Settings, classify, plain, recipe, trace, vectors
from lives import live, lives
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, MultiStepLR
from torch.utils.data import TensorDataset

from ddp_kit import Data, LossSum, Recipe, schedules
from ddp_kit.auto import find_micro_batch
from ddp_kit.compose import build_model, compose, placement_of
from ddp_kit.data.data import as_data
from ddp_kit.early_stopping import EarlyStopping
from ddp_kit.ema import WeightAverage
from ddp_kit.errors import ConfigError
from ddp_kit.fit import Pace
from ddp_kit.groups import Group
from ddp_kit.settings import EarlyStop
from ddp_kit.step import train_step

# Schedules


def rates(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    """Returns the rate that each step uses."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler, used = make(optimizer), []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


PAIRS: dict[str, tuple[Any, Any]] = {
    "cosine": (lambda o: schedules.warmup_cosine(o, 40, warmup=0, final=0.1), lambda o: CosineAnnealingLR(o, T_max=40, eta_min=0.04)),
    "linear": (lambda o: schedules.linear(o, 40, warmup=0, final=0.25), lambda o: LinearLR(o, 1.0, 0.25, total_iters=40)),
    "step": (lambda o: schedules.step(o, 40, at=(0.5, 0.75), factor=0.1), lambda o: MultiStepLR(o, milestones=[20, 30], gamma=0.1)),
    "exponential": (lambda o: schedules.exponential(o, 40, final=0.01), lambda o: ExponentialLR(o, gamma=0.01 ** (1 / 40))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_schedule_gives_the_rates_of_torchs(name: str) -> None:
    ours, torchs = PAIRS[name]
    assert rates(ours, 40) == pytest.approx(rates(torchs, 40), rel=1e-9)


def test_a_warm_up_rises_in_a_line_and_the_decay_has_the_steps_after_it() -> None:
    for warmup in (8, 0.2):
        found = rates(lambda o, warmup=warmup: schedules.warmup_cosine(o, 40, warmup=warmup), 40)
        assert found[:8] == pytest.approx([0.4 * (step + 1) / 9 for step in range(8)])
        assert found[8:] == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 32)) for step in range(32)])
    for steps, warmup, message in ((0, 0.1, "type --epochs N or --max-steps N"), (5, 9, "does not fit into 5 steps")):
        with pytest.raises(ConfigError, match=message):
            rates(lambda o, steps=steps, warmup=warmup: schedules.linear(o, steps, warmup=warmup), 1)


def two_groups(settings: Settings) -> Recipe:
    """A rate for each layer, and a schedule that writes down how many steps it was promised."""

    def optimizer(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "lr": 0.1}])

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


def test_records_hold_the_global_loss_of_their_step_and_what_a_user_looks_for() -> None:
    def made(settings: Settings) -> Recipe:
        return recipe(settings, eval_data=lambda: vectors(30))

    settings = Settings(max_steps=25, micro_batch=5, log_every=10, eval_every=10, grad_clip=1.0)
    for life in (live(made, settings), lives(_recorded, settings, world_size=3)[0]):
        assert [(r["kind"], r["step"]) for r in life.records] == [("train", 10), ("eval", 10), ("train", 20), ("eval", 20), ("train", 25), ("eval", 25)]
        train = [record for record in life.records if record["kind"] == "train"]
        assert [record["samples"] for record in train] == [240, 480, 600]
        assert [record["epoch"] for record in train] == [0, 1, 2]
        for record in train:
            assert record["loss"] == pytest.approx(BARE[record["step"] - 1][0], abs=1e-9)
            assert record["accuracy"] == pytest.approx(BARE[record["step"] - 1][1], abs=1e-12)
            assert record["samples_per_s"] > 0
            assert 0 <= record["data_wait"] <= 1
            assert record["peak_memory_mib"] > 10
            assert record["grad_norm"] > 0
        assert all(record["epoch"] == (record["step"] - 1) // 10 for record in life.records)
