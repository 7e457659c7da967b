"""A recipe that takes its time, and that is asked to stop where it is told: in the environment ACT says by what, AT_STEP, AT_RANK and AT_LOOK
(the n-th micro-batch of evaluations at that step) say where, STEP_S, LOOK_S and END_S how long a step, such a micro-batch and the end take.
Each rank leaves its pid beside the run directory."""

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sick_disk
import torch
from cases import classify, normed, vectors
from torch import nn

import ddp_kit
from ddp_kit import Data, LossSum, Recipe
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import steps
from ddp_kit.io.polling import wait_until
from ddp_kit.stopping import stop_watcher


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """500 steps an epoch."""

    global_batch: int = 24
    micro_batch: int = 12
    max_steps: int = 8
    save_every: int = 1000
    log_every: int = 1
    device: Any = "cpu"
    lr: float = 0.1
    tests: bool = False


def given(name: str, default: float) -> float:
    return float(os.environ.get(name, default))


class Asks:
    """A callback that acts, and the losses that give it the time to."""

    def __init__(self, settings: Settings) -> None:
        self.step, self.looks, self.rank = 0, 0, int(os.environ.get("RANK", "0"))
        self.run_dir = Path(settings.run_dir)
        self.pid_of(self.rank).write_text(str(os.getpid()))

    def pid_of(self, rank: int) -> Path:
        return self.run_dir.with_name(f"pid-{rank}")

    def act(self) -> None:
        if (self.rank, self.step, self.looks) != (
            given("AT_RANK", 0),
            given("AT_STEP", 3),
            given("AT_LOOK", 0),
        ):
            return
        print(f"acts at step {self.step}, look {self.looks}")
        for what in os.environ.get("ACT", "").split():
            if what in ("STOP", "SAVE"):
                (self.run_dir / what).touch()
            elif what == "saved":
                self.wait_for_a_checkpoint()
            elif what == "raise":
                raise ValueError("a fault of its own")
            elif what.startswith("peer:"):
                os.kill(int(self.pid_of(1 - self.rank).read_text()), getattr(signal, what[5:]))
            else:
                os.kill(os.getpid(), getattr(signal, what))

    def wait_for_a_checkpoint(self) -> None:
        """A save goes on behind the steps: it may still be under way when the next step is done."""
        disk = LocalDisk(self.run_dir / "checkpoints")
        assert wait_until(lambda: bool(steps(disk)), within_s=20, pause_s=0.01)

    def on_start(self, model: nn.Module) -> None:
        self.act()

    def on_step(self, step: int) -> None:
        self.step, self.looks = step, 0
        self.act()

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nobody asks here."""

    def on_end(self, reason: str) -> None:
        print(f"ended after step {self.step}, look {self.looks}: {reason}")

    def loss(self, model: nn.Module, batch: Any) -> LossSum:
        if model.training:
            time.sleep(given("STEP_S", 0.02))
        elif self.step:
            time.sleep(given("LOOK_S", 0))
            self.looks += 1
            self.act()
        return classify(model, batch)


class Slow:
    """A tracker that has much to do at the end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def start(self, info: Any) -> None: ...

    def log(self, record: Mapping[str, Any]) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None: ...

    def sample(self, name: str, value: Any, *, step: int) -> None: ...

    def finish(self, status: Mapping[str, Any]) -> None:
        time.sleep(given("END_S", 0))
        Path(self.settings.run_dir).with_name("tracker-has-ended").touch()


def recipe(settings: Settings) -> Recipe:
    sick_disk.install(os.environ.get("DISK", ""))
    stop_watcher.POLL_S = 0.1
    stop_watcher.MARGIN_S = stop_watcher.UNKNOWN_S = 1.0
    if "ACT_AT_ONCE" in os.environ:
        os.kill(os.getpid(), getattr(signal, os.environ["ACT_AT_ONCE"]))
    asks = Asks(settings)
    return Recipe(
        model=normed,
        loss=asks.loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9),
        train_data=lambda: Data(vectors(12_000)),
        eval_data=lambda: vectors(120),
        test_data=(lambda: vectors(96)) if settings.tests else None,
        callbacks=[asks],
        trackers=[Slow(settings)],
    )
