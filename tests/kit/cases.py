"""Recipes for the tests: small enough to run in milliseconds, each with one difficulty."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import ddp_kit
from ddp_kit import Data, LossSum, Recipe
from ddp_kit.distributed.local_shard import whole
from ddp_kit.distributed.process_group import Group
from ddp_kit.setup.build import Built, build
from ddp_kit.training.step import train_step


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Float64 unless a test says otherwise: sums may then only differ by their order."""

    global_batch: int = 24
    max_steps: int = 3
    precision: ddp_kit.settings.Precision = "fp64"
    device: Any = "cpu"
    lr: float = 0.1
    momentum: float = 0.9


def vectors(count: int = 240, *, features: int = 6, classes: int = 4) -> TensorDataset:
    """Returns inputs and labels that a linear map relates."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(count, features, generator=generator)
    return TensorDataset(
        inputs, (inputs @ torch.randn(features, classes, generator=generator)).argmax(1)
    )


def classify(model: nn.Module, batch: Any) -> LossSum:
    inputs, labels = batch
    logits = model(inputs)
    right = (logits.argmax(1) == labels).sum()
    return LossSum(
        cross_entropy(logits, labels, reduction="sum"),
        len(labels),
        metrics={"accuracy": (right, len(labels))},
    )


def weighted(model: nn.Module, batch: Any) -> LossSum:
    """A loss whose count varies with the samples: class weights, as tokens would."""
    inputs, labels = batch
    weights = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=inputs.dtype)
    losses = cross_entropy(model(inputs), labels, reduction="none") * weights[labels]
    return LossSum(losses.sum(), weights[labels].sum()).plus_mean(
        0.01 * sum(p.square().sum() for p in model.parameters())
    )


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def normed() -> nn.Module:
    """BatchNorm and dropout: layers that see a micro-batch at a time."""
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4)
    )


def recipe(
    settings: Settings,
    *,
    model: Callable[[], nn.Module] = plain,
    loss: Any = classify,
    **parts: Any,
) -> Recipe:
    """Returns a recipe with SGD; `parts` replace or add others."""
    given: dict[str, Any] = {
        "model": model,
        "loss": loss,
        "optimizer": lambda m: torch.optim.SGD(
            m.parameters(), lr=settings.lr, momentum=settings.momentum
        ),
        "train_data": lambda: Data(vectors()),
    }
    return Recipe(**(given | parts))


@dataclass
class Trace:
    """What a run did: the loss and the samples of each global batch, the gradient of the first step, the last weights."""

    losses: list[float]
    gradient: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    samples: list[list[int]]


def trace(group: Group, recipe: Recipe, settings: Settings) -> Trace:
    """Runs a recipe's steps on this rank and returns what happened, losses and samples over all ranks."""
    from ddp_kit.distributed.collectives import gather_rows, sum_by_name
    from ddp_kit.metrics import tensor_of

    made: Built = build(recipe, settings, group)
    gradient, losses, samples = {}, [], []
    for batch in made.feed.batches(start=0, end=made.cadence.end):
        sums = train_step(made.training, batch)
        if not samples:
            gradient = {
                name: whole(p.grad).clone()
                for name, p in made.training.model.named_parameters()
                if p.grad is not None
            }
        numbers = range(sums.first, sums.first + sums.size)
        own = tensor_of(sums.rows(), ["loss"], device=group.device)
        total, count = sum_by_name(group, own, names=["loss"], order=numbers)["loss"]
        losses.append(total / count)
        samples.append(
            torch.cat(
                gather_rows(
                    group,
                    torch.from_numpy(
                        np.concatenate([part.request.indices for part in batch.micro_batches])
                    ),
                )
            ).tolist()
        )
    made.training.control_packet.close()
    state = {
        name: whole(tensor).clone() for name, tensor in made.training.model.state_dict().items()
    }
    return Trace(losses, gradient, state, samples)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Returns the norm of the difference over the norm of b."""
    assert a.keys() == b.keys()
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in a)
    return (difference / sum(float(b[name].double().square().sum()) for name in b)) ** 0.5


class Counting(nn.Module):
    """Changes two buffers in training: one in place, one by assigning to it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("still", torch.ones(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += inputs.sum(0)
            self.mean = 0.5 * self.mean + 0.5 * inputs.mean(0)
        return self.linear(inputs)
