"""A recipe whose ends are odd: `--odd` says how. DISK is that of `sick_disk`."""

import contextlib
import os
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sick_disk
import torch
from cases import classify, plain, vectors
from torch import nn

import ddp_kit
from ddp_kit import Data, LossSum, Recipe
from ddp_kit.distributed.failure import Failure
from ddp_kit.distributed.failures import FailureReport
from ddp_kit.lifecycle import run_dir

AT_STEP = 4
ENDLESS = ("beats", "sleeps")
LEFT_OPEN = 24


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Six steps."""

    global_batch: int = 8
    max_steps: int = 6
    log_every: int = 1
    device: Any = "cpu"
    lr: float = 0.1
    odd: str = ""


class MuteError(Exception):
    """An error that cannot be told."""

    def __str__(self) -> str:
        return str(1 // 0)


class Odd:
    """A callback, and the loss that goes with it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.step = 0
        self.is_here = os.environ.get("RANK", "0") == "1"

    def on_start(self, model: nn.Module) -> None:
        if self.settings.odd == "beats":
            run_dir.BEAT_S = 0.05

    def on_step(self, step: int) -> None:
        self.step = step
        print(f"step {step} is done", flush=True)
        sick_disk.steps_done.append(step)
        if self.settings.odd in ENDLESS:
            time.sleep(0.1 if self.settings.odd == "beats" else 2.0 * (step >= 3))
        if self.is_here and step == AT_STEP and self.settings.odd == "mute":
            raise MuteError

        if self.is_here and step == AT_STEP + 1 and self.settings.odd == "raises":
            folder = Path(self.settings.run_dir) / "checkpoints"
            while not (folder / f"step-{AT_STEP:08d}").is_dir():
                time.sleep(0.01)
            raise ValueError("a fault of its own")

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing is odd here."""

    def on_end(self, reason: str) -> None:
        if self.settings.odd == "full":
            filler = Path(self.settings.run_dir) / "filler"
            descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
            with contextlib.suppress(OSError):
                while True:
                    os.write(descriptor, b"0" * 4096)
            os.close(descriptor)

    def loss(self, model: nn.Module, batch: Any) -> LossSum:
        result = classify(model, batch)
        if self.settings.odd == "nan" and self.is_here and self.step == AT_STEP:
            return LossSum(result.total * float("nan"), result.count)
        return result


def slow_to_tell(seconds: float) -> None:
    """The other ranks say first what has failed."""
    find_culprit = FailureReport.find_culprit

    def later(self: FailureReport, error: BaseException) -> Failure:
        time.sleep(seconds)
        return find_culprit(self, error)

    FailureReport.find_culprit = later  # type: ignore[method-assign]  # in this process of a rank


def recipe(settings: Settings) -> Recipe:
    if settings.odd == "nan" and os.environ.get("RANK", "0") == "1":
        slow_to_tell(0.5)
    sick_disk.install(os.environ.get("DISK", ""))
    if settings.odd == "few files":
        used = len(list(Path("/proc/self/fd").iterdir()))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + LEFT_OPEN, hard))
    odd = Odd(settings)
    endless = settings.odd in ENDLESS
    return Recipe(
        model=plain,
        loss=odd.loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=settings.lr),
        train_data=lambda: Data(vectors(100_000 if endless else 480)),
        callbacks=[odd],
    )
