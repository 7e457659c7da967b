"""A recipe that hangs on request: `--hang-in` says where (everywhere: once in each place that may take long), `--how` in which way,
`--at-rank` on which rank (12: on 1 and 2, -1: on all); PACE_S in the environment is how long each step takes, LOOK_S a micro-batch of an evaluation."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from cases import classify, plain, vectors
from torch import nn
from torch.utils.data import Dataset, get_worker_info

import ddp_kit
from ddp_kit import Data, LossSum, Recipe
from ddp_kit.checkpoint.format import storage

LONG_S = 1000.0


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Hangs in step 3."""

    global_batch: int = 8
    max_steps: int = 6
    log_every: int = 1
    eval_every: int = 2
    save_every: int = 2
    device: Any = "cpu"
    lr: float = 0.1
    hang_in: str = ""
    how: str = "sleep"
    at_rank: int = 1
    seconds: float = LONG_S


def spin() -> None:
    while True:
        pass


def collective(kind: str) -> None:
    """Enters one that the others do not."""
    numbers = torch.ones(1 if kind == "same" else 100_000)
    if kind == "order":
        dist.broadcast(numbers, 0)
    else:
        dist.all_reduce(numbers)


class Trouble(Dataset[Any]):
    """The parts of the recipe that may hang: data set, loss, optimizer and callback."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.step = settings, 0
        rank = os.environ.get("RANK", "0")
        self.is_here = settings.at_rank == -1 or rank in str(settings.at_rank)
        self.vectors = vectors()
        self.read = 0
        self.hung: set[str] = set()

    def hang(self) -> None:
        how = self.settings.how
        ways: dict[str, Callable[[], object]] = {
            "sleep": partial(time.sleep, self.settings.seconds),
            "spin": spin,
            # A call in C that keeps the interpreter's lock.
            "gil": partial(ctypes.PyDLL(None).sleep, int(self.settings.seconds)),
            "stop": partial(os.kill, os.getpid(), signal.SIGSTOP),
        }
        if how in ways:
            ways[how]()
        else:
            collective(how)

    def maybe(self, place: str, *, step: int = 2) -> None:
        is_place = self.settings.hang_in == place and self.step == step
        if self.settings.hang_in == "everywhere":
            is_place = True
        if is_place and self.is_here and place not in self.hung:
            self.hung.add(place)
            self.hang()

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int) -> Any:
        worker = get_worker_info()
        self.read += 1
        hangs = self.settings.hang_in == "worker" and self.is_here and self.read == 3
        if hangs and worker is not None and worker.id == 1:
            self.hang()
        if self.settings.hang_in == "data":
            self.maybe("data")
        return self.vectors[index]

    def loss(self, model: nn.Module, batch: Any) -> LossSum:
        time.sleep(float(os.environ.get("PACE_S" if model.training else "LOOK_S", "0")))
        if not model.training:
            self.maybe("evaluation")
            return classify(model, batch)
        if self.settings.hang_in != "everywhere" or self.step == 0:
            # The first step of all may take long, the others may not.
            self.maybe("forward")
        result = classify(model, batch)
        if self.settings.hang_in == "backward" and self.step == 2:
            result.total.register_hook(lambda gradient: self.maybe("backward"))
        return result

    def on_start(self, model: nn.Module) -> None:
        self.maybe("start", step=0)

    def on_step(self, step: int) -> None:
        self.step = step
        self.maybe("callback")

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.settings.hang_in == "on_evaluation":
            self.maybe("on_evaluation")

    def on_end(self, reason: str) -> None:
        self.maybe("end", step=self.settings.max_steps)


def optimizer(model: nn.Module, trouble: Trouble) -> torch.optim.Optimizer:
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    if trouble.settings.hang_in == "optimizer":
        made.register_step_pre_hook(lambda *_: trouble.maybe("optimizer"))
    return made


def recipe(settings: Settings) -> Recipe:
    trouble = Trouble(settings)
    if settings.hang_in in ("save", "everywhere"):
        written = storage.LocalDisk.write

        def write(*args: Any, **kwargs: Any) -> Any:
            trouble.maybe("save")
            return written(*args, **kwargs)

        storage.LocalDisk.write = write  # type: ignore[method-assign]
    return Recipe(
        model=plain,
        loss=trouble.loss,
        optimizer=lambda model: optimizer(model, trouble),
        train_data=lambda: Data(trouble),
        eval_data=lambda: vectors(16),
        callbacks=[trouble],
    )
