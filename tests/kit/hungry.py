"""A recipe in which one rank, or a loader worker of it, eats memory until it is stopped: `EATER="1:3"` is rank 1 after step 3, `EATER=worker` the
worker of rank 1."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cases import classify, plain, vectors
from torch import nn
from torch.utils.data import Dataset, get_worker_info

import ddp_kit
from ddp_kit import Data, Recipe

MIB = 2**20
MOST_MIB = 1024


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Small."""

    global_batch: int = 8
    max_steps: int = 6
    log_every: int = 1
    device: Any = "cpu"
    lr: float = 0.1


def eat() -> None:
    """Takes memory, and touches it."""
    eaten = [bytearray(os.urandom(1) * (16 * MIB)) for _ in range(MOST_MIB // 16)]
    raise AssertionError(f"{len(eaten)} pieces fit")


class Eater:
    """A callback that eats."""

    def __init__(self) -> None:
        self.where = os.environ.get("EATER", "")

    def on_start(self, model: nn.Module) -> None:
        """Not yet."""

    def on_step(self, step: int) -> None:
        if self.where == f"{os.environ['RANK']}:{step}":
            eat()

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Not here."""

    def on_end(self, reason: str) -> None:
        """Not any more."""


class Vectors(Dataset[Any]):
    """Data that cost a worker all memory."""

    def __init__(self) -> None:
        self.vectors = vectors()

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int) -> Any:
        is_eater = os.environ.get("EATER") == "worker" and os.environ["RANK"] == "1"
        if is_eater and get_worker_info() is not None:
            eat()
        return self.vectors[index]


def recipe(settings: Settings) -> Recipe:
    return Recipe(
        model=plain,
        loss=classify,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=settings.lr),
        train_data=lambda: Data(Vectors()),
        callbacks=[Eater()],
    )
