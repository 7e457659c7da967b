"""A recipe that goes wrong on request: `--fault` says how, `--at-rank` where (-1: on every rank), `--at-step` after how many steps."""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cases import classify, plain, vectors
from torch import nn
from torch.utils.data import Dataset, TensorDataset, get_worker_info

import ddp_kit
from ddp_kit import Data, LossSum, Recipe


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Small enough to fail within milliseconds."""

    global_batch: int = 8
    max_steps: int = 6
    log_every: int = 1
    device: Any = "cpu"
    lr: float = 0.1
    fault: str = ""
    at_rank: int = -1
    at_step: int = 3


class Trouble:
    """Knows when the fault is due, and causes those that are not a part of the recipe; a callback."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.step = settings, -1
        self.is_here = settings.at_rank in (-1, int(os.environ.get("RANK", "0")))

    def is_due(self, fault: str) -> bool:
        return self.settings.fault == fault and self.is_here and self.step == self.settings.at_step

    def on_start(self, model: nn.Module) -> None:
        self.on_step(0)

    def on_step(self, step: int) -> None:
        self.step = step
        if self.is_due("callback"):
            raise ValueError("the callback's own fault")
        if self.settings.fault.startswith("SIG") and self.is_due(self.settings.fault):
            for name in self.settings.fault.split():
                os.kill(os.getpid(), getattr(signal, name))

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing goes wrong here."""

    def on_end(self, reason: str) -> None:
        print(f"ended after step {self.step}: {reason}")

    def loss(self, model: nn.Module, batch: Any) -> LossSum:
        if self.is_due("loss"):
            raise ValueError("the loss's own fault")
        if self.is_due("evaluation") and not model.training:
            raise ValueError("the evaluation's own fault")
        result = classify(model, batch)
        return LossSum(result.total * float("nan"), result.count) if self.is_due("nan") else result


class Worn(Dataset[Any]):
    """Vectors that a loader worker cannot read."""

    def __init__(self, trouble: Trouble) -> None:
        self.trouble, self.vectors = trouble, vectors()

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None and self.trouble.is_here:
            raise ValueError("the worker's own fault")
        return self.vectors[index]


class Partly(nn.Sequential):
    """A model with a layer that not every forward pass uses."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(*plain())
        self.idle, self.trouble = nn.Linear(6, 1), trouble

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self[2](self[1](self[0](inputs)))
        is_idle = self.trouble.settings.fault == "unused" or self.trouble.is_due("unused later")
        return logits if is_idle else logits + self.idle(inputs)


def recipe(settings: Settings) -> Recipe:
    trouble = Trouble(settings)
    fault = settings.fault
    if fault == "recipe" and trouble.is_here:
        raise ValueError("the recipe's own fault")
    data = {
        "worker": lambda: Worn(trouble),
        "empty": lambda: vectors(0),
        "small": lambda: vectors(7),
        "labels": lambda: TensorDataset(vectors().tensors[0], vectors().tensors[1] + 1),
    }.get(fault, lambda: Data(vectors()))

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        own = list(model.parameters())
        held = {
            "no parameters": own[:1],
            "foreign": list(plain().parameters()),
            "extra": [*own, *plain().parameters()],
            "part": own[:-1],
        }
        made = torch.optim.SGD(held.get(fault, own), lr=settings.lr)
        if fault == "no parameters":
            made.param_groups.clear()
        return made

    return Recipe(
        model=(lambda: Partly(trouble)) if "unused" in fault else plain,
        loss=trouble.loss,
        optimizer=optimizer,
        train_data=data,
        eval_data=lambda: vectors(0 if fault == "empty evaluation" else 16),
        summarize=(lambda means, rows: {"auc": 0.5}) if fault == "summary" else None,
        callbacks=[trouble],
    )
