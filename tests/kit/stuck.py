"""A recipe whose ranks get stuck on request: `--fault` says how, `--at-rank` where (-1: on every rank), `--at-step` after how many steps.

    stop     SIGSTOP to itself               sleep    Python sleeps
    wait     C code that has let the GIL go  hold     C code that holds the GIL
In the environment TIMEOUT_S is how long a collective may take after the first step, PATIENCE_S and ORPHANED_S how long a rank that was told
to end waits for a step."""

import ctypes
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from cases import classify, plain, vectors
from torch import nn

import ddp_kit
from ddp_kit import Data, Recipe
from ddp_kit.distributed.process_group import process_group
from ddp_kit.stopping import departure

if "TIMEOUT_S" in os.environ:
    process_group.__wrapped__.__kwdefaults__["timeout_s"] = float(os.environ["TIMEOUT_S"])  # type: ignore[attr-defined]  # contextmanager's
departure.PATIENCE_S = float(os.environ.get("PATIENCE_S", departure.PATIENCE_S))
departure.ORPHANED_S = float(os.environ.get("ORPHANED_S", departure.ORPHANED_S))


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Goes on until it is stuck."""

    global_batch: int = 8
    max_steps: int = 100_000
    log_every: int = 1
    device: Any = "cpu"
    lr: float = 0.1
    fault: str = ""
    at_rank: int = -1
    at_step: int = 3


def deadlock(library: ctypes.CDLL) -> NoReturn:
    """Locks a lock of C twice: no signal ends the wait."""
    lock = ctypes.create_string_buffer(64)
    while True:
        library.pthread_mutex_lock(lock)


class Stuck:
    """A callback."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.is_here = settings.at_rank in (-1, int(os.environ.get("RANK", "0")))

    def on_start(self, model: nn.Module) -> None:
        self.on_step(0)

    def on_step(self, step: int) -> None:
        if step != self.settings.at_step or not self.is_here:
            return
        print(f"rank {os.environ.get('RANK', '0')} is stuck in {self.settings.fault}", flush=True)
        match self.settings.fault:
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "sleep":
                time.sleep(1000)
            case "wait":
                deadlock(ctypes.CDLL(None))
            case "hold":
                deadlock(ctypes.PyDLL(None))

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nobody is stuck here."""

    def on_end(self, reason: str) -> None:
        """Nobody is stuck here."""


def recipe(settings: Settings) -> Recipe:
    return Recipe(
        model=plain,
        loss=classify,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=settings.lr),
        train_data=lambda: Data(vectors()),
        callbacks=[Stuck(settings)],
    )
