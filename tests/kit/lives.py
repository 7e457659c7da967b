"""Whole runs for the tests: `live` trains a recipe on this rank and returns what a user would see of it."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from cases import Settings

from ddp_kit import Recipe
from ddp_kit.checkpoint.find import Origin, best_of, find, weights_of
from ddp_kit.distributed.failures import FailureReport
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import Topology, read_topology
from ddp_kit.testing import run_ranks
from ddp_kit.train import run


@dataclass
class Life:
    """What a run left on one rank: records, samples (rank 0 only), a callback's calls, the ending, last and left weights."""

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
    """Runs `make(settings)` from start to end, alone or as one rank of several, with a run directory that is removed at the end."""
    if settings.run_dir:
        return _live(make, settings)
    with tempfile.TemporaryDirectory() as folder:
        return _live(make, replace(settings, run_dir=f"{folder}/run"))


def _live(make: Callable[[Settings], Recipe], settings: Settings) -> Life:
    life = Life(rank=read_topology().rank)
    notes = Notes(life)
    outcome = run(replace(make(settings), trackers=[notes], callbacks=[notes]), settings)
    life.reason, life.step, life.metrics = outcome.reason, outcome.step, dict(outcome.metrics)
    life.state = {
        name: tensor.detach().clone() for name, tensor in outcome.model.state_dict().items()
    }
    life.files = left(outcome.run_dir)
    return life


def alone() -> Group:
    """This process, as what all ranks call together wants it."""
    return Group(
        topology=Topology(),
        device=torch.device("cpu"),
        failure_report=FailureReport(rank=0, world_size=1),
    )


def left(run_dir: Path) -> dict[str, torch.Tensor]:
    """Returns the weights that a run leaves: those of its best checkpoint, as they were evaluated, else of the newest."""
    origin = Origin(run_dir / "checkpoints")
    best = best_of(origin.storage)
    opened = find(replace(origin, step=best.step if best else None), group=alone())
    assert opened is not None
    return weights_of(opened)


def lives(make: Callable[[Settings], Recipe], settings: Settings, *, world_size: int) -> list[Life]:
    """Returns the `Life` of each rank of a run on `world_size` ranks; `make` is at the top level of a module."""
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(
            live, world_size, make, replace(settings, run_dir=f"{folder}/run"), group=False
        )
