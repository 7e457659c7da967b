"""Whole runs with steps that go bad: in the data, or once only by a fault of one rank; and runs that never saw these steps."""

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cases import Settings, normed, recipe, vectors
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import TensorDataset

from ddp_kit import LossSum, Recipe
from ddp_kit.data.seeding import permutation
from ddp_kit.errors import DdpKitError
from ddp_kit.setup import watch
from ddp_kit.train import run
from ddp_kit.training.bad_steps import BadSteps

BAD = 9  # a label that stands for a bad sample
BATCH, PER_EPOCH = 24, 10


def bad_data(steps: Sequence[int]) -> TensorDataset:
    """Returns data of which these steps (from 1) end with a bad sample."""
    return bad_places(dict.fromkeys(steps, BATCH - 1))


def bad_places(places: Mapping[int, int]) -> TensorDataset:
    """Returns data of which steps (from 1) have a bad sample at a place of the global batch."""
    inputs, labels = vectors().tensors
    labels = labels.clone()
    for step, at in places.items():
        assert step <= PER_EPOCH, "in a later epoch the sample would have been seen before"
        labels[permutation(0, 0, 240)[(step - 1) * BATCH + at]] = BAD
    return TensorDataset(inputs, labels)


def spoilt(kind: str, model: nn.Module, batch: Any, *, rows: torch.Tensor) -> LossSum:
    """Returns a loss in which some rows are bad in a way: its value nan or inf, or its gradient alone, or large."""
    inputs, labels = batch
    logits = model(inputs)
    total = cross_entropy(logits, labels % BAD, reduction="sum")
    if bool(rows.any()):
        total = total + WORSE[kind](logits[rows])
    return LossSum(total.to(torch.promote_types(total.dtype, torch.float32)), len(labels))


WORSE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nan": lambda logits: logits.sum() * torch.nan,
    "inf": lambda logits: logits.sum().abs() * torch.inf,
    "gradient": lambda logits: (logits.sum() * 0).abs().sqrt(),
    "spike": lambda logits: logits.square().sum() * 1e5,
}


@dataclass
class Fault:
    """A loss that is bad on one rank, in one step, once; and a callback that may kill its rank when a step is seen for the nth time."""

    kind: str = "nan"
    rank: int = -1  # -1: what the data say
    step: int = 0
    deaths: Mapping[tuple[int, int], int] = field(default_factory=dict)  # (step, time): rank
    now: int = 0
    has_struck: bool = False
    seen: list[int] = field(default_factory=list)

    def on_start(self, model: nn.Module) -> None: ...

    def on_step(self, step: int) -> None:
        self.now = step
        self.seen.append(step)
        victim = self.deaths.get((step, self.seen.count(step)))
        if victim is not None and victim == int(os.environ.get("RANK", "0")):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def on_end(self, reason: str) -> None: ...

    def loss(self, model: nn.Module, batch: Any) -> LossSum:
        rows = batch[1] == BAD
        is_here = self.rank == int(os.environ.get("RANK", "0")) and self.now == self.step - 1
        if is_here and not self.has_struck and model.training and self.now:
            self.has_struck = True
            rows = torch.ones_like(rows)
        kinds = self.kind.split()  # "nan gradient": first the one, later the other
        return spoilt(kinds[0 if self.now < 5 else -1], model, batch, rows=rows)


@dataclass(frozen=True)
class Ended:
    """What a run left: its weights (or an error's text), the steps that its callbacks saw, events and records."""

    digest: str
    error: str
    seen: list[int]
    events: list[dict[str, Any]]
    records: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


def scheduled(optimizer: Optimizer, total: int) -> ExponentialLR:
    return ExponentialLR(optimizer, gamma=0.9)


def trained(
    settings: Settings,
    fault: Fault,
    bad: Sequence[int] = (),
    unseen: Sequence[int] = (),
    model: Any = normed,
    data: Any = None,
) -> Ended:
    """Trains on this rank, on data of which some steps are bad; some others are left out from the beginning."""

    made = recipe(
        settings,
        model=model,
        loss=fault.loss,
        train_data=data or (lambda: bad_data(bad)),
        scheduler=scheduled,
        callbacks=[fault],
    )
    return trained_as(made, settings, fault, unseen)


def trained_as(made: Recipe, settings: Settings, fault: Fault, unseen: Sequence[int]) -> Ended:
    """Trains a recipe, some steps left out from the beginning."""

    class Knowing(BadSteps):
        def __init__(self, **given: Any):
            super().__init__(**given)
            self.left_out = set(unseen)

    if unseen:
        watch.BadSteps = Knowing  # type: ignore[misc]  # in this forked process alone
    digest = error = ""
    try:
        digest = run(made, settings).weights_sha256
    except DdpKitError as raised:
        error = str(raised)
    folder = Path(settings.run_dir)
    return Ended(
        digest, error, fault.seen, lines(folder / "events.jsonl"), lines(folder / "metrics.jsonl")
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
