"""A recipe that takes its time, and that is asked to stop where it is told: `--act` says by what, `--at-step`, `--at-rank` and `--at-look`
(the n-th micro-batch of an evaluation at that step) say where. Each rank leaves its pid beside the run directory."""

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


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Steps of a chosen length."""

    global_batch: int = 24
    micro_batch: int = 12
    max_steps: int = 8
    save_every: int = 1000
    log_every: int = 1
    device: Any = "cpu"
    lr: float = 0.1
    step_s: float = 0.02
    look_s: float = 0.0
    act: str = ""
    at_step: int = 3
    at_rank: int = 0
    at_look: int = 0
    end_s: float = 0.0  # that rank 0's tracker takes at the end
    tests: bool = False


class Asks:
    """A callback that acts, and the losses that give it the time to."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.step, self.looks, self.rank = settings, 0, 0, int(os.environ.get("RANK", "0"))
        self.run_dir = Path(settings.run_dir)
        self.pid_of(self.rank).write_text(str(os.getpid()))

    def pid_of(self, rank: int) -> Path:
        return self.run_dir.with_name(f"pid-{rank}")

    def act(self) -> None:
        if self.rank != self.settings.at_rank or self.step != self.settings.at_step or self.looks != self.settings.at_look:
            return
        print(f"acts at step {self.step}, look {self.looks}")
        for what in self.settings.act.split():
            if what in ("STOP", "SAVE"):
                (self.run_dir / what).touch()
            elif what == "raise":
                raise ValueError("a fault of its own")
            elif what == "wait":  # until what was asked for has been done
                while (self.run_dir / "SAVE").exists():
                    time.sleep(0.05)
            elif what.startswith("peer:"):
                os.kill(int(self.pid_of(1 - self.rank).read_text()), getattr(signal, what[5:]))
            else:
                os.kill(os.getpid(), getattr(signal, what))

    def on_start(self, model: nn.Module) -> None:
        """Nobody asks yet."""

    def on_step(self, step: int) -> None:
        self.step, self.looks = step, 0
        self.act()

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nobody asks here."""

    def on_end(self, reason: str) -> None:
        print(f"ended after step {self.step}, look {self.looks}: {reason}")

    def loss(self, model: nn.Module, batch: Any) -> LossSum:
        if model.training:
            time.sleep(self.settings.step_s)
        elif self.step:
            time.sleep(self.settings.look_s)
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
        time.sleep(self.settings.end_s)
        Path(self.settings.run_dir).with_name("tracker-has-ended").touch()


def recipe(settings: Settings) -> Recipe:
    sick_disk.install(os.environ.get("DISK", ""))
    asks = Asks(settings)
    return Recipe(
        model=normed,
        loss=asks.loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9),
        train_data=lambda: Data(vectors()),
        eval_data=lambda: vectors(120),
        test_data=(lambda: vectors(96)) if settings.tests else None,
        callbacks=[asks],
        trackers=[Slow(settings)],
    )
