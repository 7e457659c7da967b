"""A recipe that has every item of state there is, and that dies where it is told: `DEATHS="8:1 12:0:SIGTERM"` in the environment cuts a
life short after a step, by SIGKILL or another signal to one rank. `EVERY_STEP`: ranks agree on signals at every step, so two steps later."""

import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sick_disk
import torch
from cases import classify, vectors
from torch import nn
from torch.utils.data import IterableDataset

import ddp_kit
from ddp_kit import Data, Recipe, schedules
from ddp_kit.distributed import control_packet


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """3 epochs of 10 steps; batches that accumulate."""

    global_batch: int = 24
    micro_batch: int = 4
    epochs: int = 3
    device: Any = "cpu"
    log_every: int = 1
    eval_every: int = 4
    grad_clip: float = 0.5
    ema: float = 0.9
    lr: float = 0.05
    optimizer: str = "adamw"
    width: int = 512  # 3 x 512 x 512: several of DDP's buckets
    frozen: bool = False  # the middle is not trained
    counted: bool = False  # an iterable data set with a state of its own


class Net(nn.Module):
    """Layers in another order than they are used, BatchNorm, dropout, tied weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.last = nn.Linear(width, 4)
        self.middle = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.twice = self.middle[0]
        self.norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(0.2)
        self.first = nn.Linear(6, width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(inputs))
        for layer in reversed(self.middle):
            hidden = torch.tanh(layer(hidden))
        return self.last(self.drop(hidden))


def jitter(batch: Any, draws: Any) -> Any:
    inputs, labels = batch
    return inputs + torch.from_numpy(0.1 * draws.normal(inputs.shape[1]).astype(np.float32)), labels


class Death:
    """A callback that sends its rank a signal once a step is done."""

    def __init__(self, deaths: str) -> None:
        self.deaths = [(*death.split(":"), "SIGKILL")[:3] for death in deaths.split()]

    def on_start(self, model: nn.Module) -> None:
        """Nobody dies yet."""

    def on_step(self, step: int) -> None:
        print(f"step {step} is done")
        sick_disk.steps_done.append(step)
        for at, rank, name in self.deaths:
            if (at, rank) == (str(step), os.environ.get("RANK", "0")):
                os.kill(os.getpid(), getattr(signal, name))

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nobody dies here."""

    def on_end(self, reason: str) -> None:
        """Nobody dies any more."""


def built(settings: Settings) -> Net:
    net = Net(settings.width)
    net.middle.requires_grad_(not settings.frozen)
    return net


def recipe(settings: Settings) -> Recipe:
    sick_disk.install(os.environ.get("DISK", ""))
    if "EVERY_STEP" in os.environ:
        control_packet.INTERVAL_S = 0.0
    kinds = {
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=settings.lr / 10),
        "sgd": lambda parameters: torch.optim.SGD(
            parameters, lr=settings.lr, momentum=0.9, nesterov=True
        ),
    }
    return Recipe(
        model=lambda: built(settings),
        loss=classify,
        optimizer=lambda model: kinds[settings.optimizer](
            [p for p in model.parameters() if p.requires_grad]
        ),
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(optimizer, total_steps),
        train_data=lambda: Data(Counted() if settings.counted else vectors(), augment=jitter),
        eval_data=lambda: vectors(50),
        callbacks=[Death(os.environ.get("DEATHS", ""))],
    )


class Counted(IterableDataset[Any]):
    """Vectors in an order that only the data set's own state knows: how many were read, and by which stride."""

    def __init__(self) -> None:
        self.read, self.vectors = 0, vectors()

    def __iter__(self) -> Iterator[Any]:
        while self.read < len(self.vectors):
            self.read += 1
            yield self.vectors[(self.read * 7) % len(self.vectors)]
        self.read = 0

    def __len__(self) -> int:
        return len(self.vectors)

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read, "seen": (self.read // 2, float("inf"))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["seen"] == (state["read"] // 2, float("inf"))
        self.read = state["read"]
