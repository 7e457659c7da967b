"""A recipe whose steps, or whose micro-batches of an evaluation, are short at first and become slow: from `--slow-from` on each takes
`--slow-s`. Rank `--at-rank` sends itself SIGTERM two later. Packets lie 5 s apart, as short steps are counted."""

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cases import classify, plain, vectors
from torch import nn

import ddp_kit
from ddp_kit import Data, LossSum, Recipe
from ddp_kit.distributed import control_packet

control_packet.INTERVAL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Goes on for long."""

    global_batch: int = 8
    micro_batch: int = 4
    max_steps: int = 100_000
    log_every: int = 1000
    eval_every: int = 100_000
    device: Any = "cpu"
    lr: float = 0.1
    slow_from: int = 100
    slow_s: float = 0.2
    at_rank: int = 1
    looks: bool = False


class Slowing:
    """A callback, and a loss that counts."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rank = int(os.environ.get("RANK", "0"))
        self.has_trained = False
        self.looks = 0

    def on_start(self, model: nn.Module) -> None:
        """Nothing is slow yet."""

    def on_step(self, step: int) -> None:
        self.has_trained = True
        if not self.settings.looks:
            self.count(step)

    def count(self, done: int) -> None:
        if done >= self.settings.slow_from:
            # ranks need not be alike
            time.sleep(self.settings.slow_s * (1 + 0.5 * self.rank))
        if done == self.settings.slow_from + 2 and self.rank == self.settings.at_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Not reached."""

    def on_end(self, reason: str) -> None:
        print(f"ended after {self.looks} looks: {reason}")

    def loss(self, model: nn.Module, batch: Any) -> LossSum:
        if not model.training and self.has_trained:
            self.looks += 1
            self.count(self.looks)
        return classify(model, batch)


def recipe(settings: Settings) -> Recipe:
    slowing = Slowing(settings)
    return Recipe(
        model=plain,
        loss=slowing.loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=settings.lr),
        train_data=lambda: Data(vectors(1_000_000)),
        eval_data=lambda: vectors(16_000),
        callbacks=[slowing],
    )
