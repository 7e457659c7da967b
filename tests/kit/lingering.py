"""A recipe in which rank 1 takes its time in `on_end`: until a file `let-go` lies beside the run directory. `LINGER=killed`: it is killed there;
`WITHIN_S` is how long the others wait."""

import os
import signal
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
from ddp_kit.lifecycle import run

LONGEST_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Small."""

    global_batch: int = 8
    max_steps: int = 3
    device: Any = "cpu"
    lr: float = 0.1


class Lingers:
    """The callback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank = os.environ.get("RANK", "0")

    def on_start(self, model: nn.Module) -> None:
        """Nothing yet."""

    def on_step(self, step: int) -> None:
        """Nothing here."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing here."""

    def on_end(self, reason: str) -> None:
        (self.folder / f"end-{self.rank}").touch()
        if self.rank == "0":
            return
        if os.environ.get("LINGER") == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        end = time.monotonic() + LONGEST_S
        while not (self.folder / "let-go").exists() and time.monotonic() < end:
            time.sleep(0.02)


def recipe(settings: Settings) -> Recipe:
    run.ON_END_S = float(os.environ.get("WITHIN_S", run.ON_END_S))
    return Recipe(
        model=plain,
        loss=classify,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=settings.lr),
        train_data=lambda: Data(vectors()),
        callbacks=[Lingers(Path(settings.run_dir).parent)],
    )
