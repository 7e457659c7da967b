"""A recipe whose steps take `--pace-s` each, so that a test can stop it in the middle; `--fails-at` raises on rank 1; the first
life waits `--starts-s` before its first step."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import classify, plain, vectors
from torch import nn

import ddp_kit
from ddp_kit import Data, Recipe


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Eight micro-batches: any of 1, 2, 4 and 8 ranks can be exact."""

    global_batch: int = 8
    micro_batch: int = 1
    max_steps: int = 20
    log_every: int = 1
    device: Any = "cpu"
    lr: float = 0.1
    pace_s: float = 0.0
    fails_at: int = -1
    starts_s: float = 0.0


class Cadence:
    """Waits after each step; a callback."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.rank = (
            settings,
            os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")),
        )

    def on_start(self, model: nn.Module) -> None:
        """Nothing is to be done."""

    def on_step(self, step: int) -> None:
        print(f"step {step} is done", flush=True)
        time.sleep(self.settings.pace_s)
        if step == self.settings.fails_at and self.rank == "1":
            raise ValueError("the recipe's own fault")

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing is to be done."""

    def on_end(self, reason: str) -> None:
        """Nothing is to be done."""


def recipe(settings: Settings) -> Recipe:
    if settings.starts_s:
        life = os.environ.get("SLURM_RESTART_COUNT", "0")
        (Path(settings.run_dir) / f"begins-{life}").touch()
        time.sleep(settings.starts_s if life == "0" else 0)
    return Recipe(
        model=plain,
        loss=classify,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9),
        train_data=lambda: Data(vectors()),
        eval_data=vectors,
        callbacks=[Cadence(settings)],
    )
