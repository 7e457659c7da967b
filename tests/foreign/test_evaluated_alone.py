"""A checkpoint is evaluated alone as its run has evaluated it: with attributes and extra state, each micro-batch for itself."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from ddp_kit import run
from ddp_kit.evaluate import main
from ddp_kit.recipe import load_recipe
from ddp_kit.testing import run_ranks

RECIPE = '''
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import ddp_kit
from ddp_kit import LossSum, Recipe


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    epochs: int = 1
    lr: float = 0.01


class Told(nn.Module):
    """Has a scale that training changes, in its extra state alone."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(1)

    def forward(self, inputs):
        if self.training:
            self.scale = self.scale * 1.1
        return inputs * self.scale

    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]


class Model(nn.Module):
    """Anneals by a count of its calls; an evaluation adds to a buffer that it reads."""

    def __init__(self):
        super().__init__()
        self.told = Told()
        self.last = nn.Linear(6, 4)
        self.calls = 0
        self.register_buffer("looked", torch.zeros(()))

    def forward(self, inputs):
        if self.training:
            self.calls += 1
        else:
            self.looked += 1
        return self.last(self.told(inputs)) * (1 + self.calls) + 3 * self.looked * inputs[:, :4]


def vectors(size, seed):
    drawn = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(size, 6, generator=drawn), torch.arange(size) % 4)


def loss(model, batch):
    return LossSum(cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1]))


def recipe(settings):
    return Recipe(
        model=Model,
        loss=loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=settings.lr),
        train_data=lambda: vectors(96, 1),
        eval_data=lambda: vectors(40, 2),
        test_data=lambda: vectors(24, 3),
    )
'''


def ran(folder: Path) -> tuple[list[str], list[dict[str, float]]]:
    """Trains. Returns what to type to evaluate it, and its records of evaluations."""
    path = folder / "annealed.py"
    path.write_text(RECIPE, encoding="utf-8")
    source = load_recipe(str(path))
    directory = folder / "run"
    given: dict[str, Any] = {"epochs": 0, "max_steps": 8, "eval_every": 2, "save_every": 2}
    given |= {"device": "cpu", "global_batch": 8, "run_dir": str(directory)}
    settings = source.settings(**given)
    run(source.build(settings), settings)
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    args = [str(path), "--from", str(directory), "--device", "cpu", "--global-batch", "8"]
    return args, [found for found in records if found["kind"] in ("eval", "test")]


def evaluated(args: list[str]) -> dict[str, float]:
    """Returns the losses that the command prints for scripts, on rank 0."""
    out = StringIO()
    with redirect_stdout(out):
        assert main(args) == 0
    found = [json.loads(line) for line in out.getvalue().splitlines() if line.startswith("{")]
    return {record["kind"]: record["loss"] for record in found}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_gives_the_metrics_that_its_run_has_reported(
    world_size: int, tmp_path: Path
) -> None:
    args, records = ran(tmp_path)
    found = run_ranks(evaluated, world_size, args, group=False)[0]
    *_, before, last, _ = [record["loss"] for record in records]
    assert found["eval"] == pytest.approx(last)
    assert abs(before - last) > 1e-3


def test_the_best_checkpoint_is_tested_with_its_own_attributes(tmp_path: Path) -> None:
    args, records = ran(tmp_path)
    losses = [record["loss"] for record in records if record["kind"] == "eval"]
    # The model gets worse as it anneals: the best one has other attributes than the last.
    assert losses[0] == min(losses)
    assert evaluated([*args, "--best"])["test"] == pytest.approx(records[-1]["loss"])
    assert records[-1]["loss"] != pytest.approx(evaluated(args)["test"])
