"""Whole runs for the tests: `live` trains a recipe on this rank and returns what a user would see of it."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from cases import Settings

from ddp_kit import Recipe
from ddp_kit.testing import run_ranks
from ddp_kit.train import run


@dataclass
class Life:
    """What a run left on one rank: records, samples (rank 0 only), the calls of a callback, the ending and the last weights."""

    rank: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[str, Any, int]] = field(default_factory=list)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    reason: str = ""
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    files: dict[str, torch.Tensor] = field(default_factory=dict)

    def of(self, kind: str, name: str) -> list[float]:
        """Returns a metric of all records of a kind."""
        return [record[name] for record in self.records if record["kind"] == kind]


class Notes:
    """A tracker and a callback that writes down what it is told."""

    def __init__(self, life: Life):
        self.life = life

    def start(self, info: Any) -> None:
        assert self.life.rank == 0

    def log(self, record: Mapping[str, Any]) -> None:
        self.life.records.append(dict(record))

    def event(self, event: Mapping[str, Any]) -> None:
        pass

    def sample(self, name: str, value: Any, *, step: int) -> None:
        self.life.samples.append((name, value, step))

    def finish(self, status: Mapping[str, Any]) -> None:
        pass

    def on_start(self, model: torch.nn.Module) -> None:
        self.life.calls.append(("start", type(model).__name__))

    def on_step(self, step: int) -> None:
        self.life.calls.append(("step", step))

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.life.calls.append(("evaluation", step, dict(metrics)))

    def on_end(self, reason: str) -> None:
        self.life.calls.append(("end", reason))


def live(make: Callable[[Settings], Recipe], settings: Settings) -> Life:
    """Runs `make(settings)` from start to end in a directory of its own. Every rank calls it."""
    from safetensors.torch import load_file

    from ddp_kit.topology import read_topology

    life = Life(rank=read_topology().rank)
    notes = Notes(life)
    with tempfile.TemporaryDirectory() as folder:
        recipe = make(settings)
        outcome = run(replace(recipe, trackers=[notes], callbacks=[notes]), replace(settings, run_dir=f"{folder}/run"))
        if life.rank == 0:
            life.files = load_file(Path(folder) / "run" / "model.safetensors")
    life.reason, life.step, life.metrics = outcome.reason, outcome.step, dict(outcome.metrics)
    life.state = {name: tensor.detach().clone() for name, tensor in outcome.model.state_dict().items()}
    return life


def lives(make: Callable[[Settings], Recipe], settings: Settings, *, world_size: int) -> list[Life]:
    """Returns the `Life` of each rank of a run on `world_size` ranks."""
    return run_ranks(live, world_size, make, settings, group=False)
