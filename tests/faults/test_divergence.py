"""Ranks that hold other weights, or run other programs: the first tensor and the rank are named within steps, and nothing more is saved."""

import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_runs import Ended, Fault, trained_as
from cases import Counting, Settings, normed, plain, recipe, vectors
from torch import nn

from ddp_kit import LossSum
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import steps
from ddp_kit.distributed.topology import read_topology
from ddp_kit.testing import run_ranks
from ddp_kit.training import loop

SLOW = [pytest.mark.slow, pytest.mark.steady]
BASE = Settings(max_steps=24, micro_batch=8, precision="fp32", check_every=2, save_every=5)


class Drift(Fault):
    """A callback that changes one number of the model on one rank, after a step."""

    def __init__(self, how: str, rank: int, after: int) -> None:
        super().__init__()
        self.how, self.at, self.after = how, rank, after

    def on_start(self, model: nn.Module) -> None:
        self.model = model

    def on_step(self, step: int) -> None:
        super().on_step(step)
        if step == self.after and read_topology().rank == self.at:
            with torch.no_grad():
                CHANGES[self.how][1](self.model)


def drift(model: Any) -> None:
    model[2].weight[1, 3] += 1e-6


def bit(model: Any) -> None:
    model[0].bias.view(torch.int32)[5] ^= 1


def buffer(model: Any) -> None:
    model.still[1] += 1e-6


CHANGES = {
    "drift": (plain, drift, "2.weight"),
    "bit": (normed, bit, "0.bias"),
    "buffer": (Counting, buffer, "still"),
}


def drifting(settings: Settings, how: str, rank: int, after: int) -> Ended:
    fault = Drift(how, rank, after)
    # One epoch: a save at its end would compare too.
    made = recipe(
        settings,
        model=CHANGES[how][0],
        loss=fault.loss,
        callbacks=[fault],
        train_data=lambda: vectors(24 * settings.max_steps),
    )
    return trained_as(made, settings, fault, [])


@pytest.mark.parametrize(
    ("how", "world_size", "rank", "strategy"),
    [
        ("drift", 3, 2, "ddp"),
        pytest.param("bit", 2, 1, "ddp", marks=SLOW),
        pytest.param("buffer", 3, 0, "zero1", marks=SLOW),
    ],
)
def test_a_rank_that_drifts_is_named_between_saves_and_nothing_more_is_saved(
    tmp_path: Path, how: str, world_size: int, rank: int, strategy: str
) -> None:
    settings = replace(BASE, run_dir=str(tmp_path), strategy=strategy, save_every=0)
    settings = replace(settings, max_steps=3000)
    found = run_ranks(drifting, world_size, settings, how, rank, 8, group=False)
    who = f"rank {rank} differs from the others" if world_size == 3 else "ranks 0, 1 differ"
    for end in found:
        assert end.error.startswith("DIVERGED at step "), end.error
        assert f": {who} in " in end.error
        assert "; last agreed at step " in end.error
    at = int(found[0].error.split("DIVERGED at step ")[1].split(":")[0])
    last = int(found[0].error.split("last agreed at step ")[1].split(".")[0])
    # Steps are milliseconds here: one digest is on its way at a time.
    assert last <= 8 <= at < found[0].seen[-1] < 3000
    assert at % 2 == 0
    assert steps(LocalDisk(tmp_path / "checkpoints")) == []
    assert found[0].of("failure")[0]["message"].count("DIVERGED") == 1


def quietly(settings: Settings) -> list[int]:
    """Trains without a fault. Returns the steps at which the digests of all ranks were found to agree."""
    agreed: list[int] = []

    class Noting(loop.Sentinel):
        def look(self, *, is_compared: bool) -> None:
            super().look(is_compared=is_compared)
            agreed.append(self._training.agreed_step)

    loop.Sentinel = Noting  # type: ignore[misc]  # in this forked process alone
    fault = Fault()

    def slow(model: nn.Module, batch: Any) -> LossSum:
        # Of short steps several lie between two packets.
        time.sleep(0.11)
        return fault.loss(model, batch)

    made = recipe(settings, model=normed, loss=slow, callbacks=[fault])
    ended = trained_as(made, settings, fault, [])
    assert ended.error == ""
    return agreed


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=SLOW)])
def test_ranks_that_agree_are_seen_to_agree_beside_training(tmp_path: Path, strategy: str) -> None:
    settings = replace(BASE, run_dir=str(tmp_path), save_every=100, eval_every=100)
    settings = replace(settings, strategy=strategy, max_steps=9, epochs=0)
    first, second = run_ranks(quietly, 2, settings, group=False)
    assert first == second
    assert first[-2] >= 2  # before the save of the last step
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert ("no rank has a copy that could be compared" in log) == (strategy == "fsdp")


def apart(settings: Settings, what: str) -> str:
    """Starts a run in which rank 1 is otherwise."""
    fault = Fault()
    with pytest.MonkeyPatch.context() as patched:
        if read_topology().rank == 1:
            if what.isupper():
                patched.setenv(what, "passive" if what == "OMP_WAIT_POLICY" else "0")
            elif what == "torch":
                patched.setattr(torch, "__version__", "2.0.0")
            elif what == "Python":
                patched.setattr(sys, "version_info", (3, 8, 1, "final", 0))
            else:
                patched.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NO AVX")
        return trained_as(recipe(settings, loss=fault.loss), settings, fault, []).error


@pytest.mark.parametrize(
    ("what", "exact", "refusal"),
    [
        (
            "NVIDIA_TF32_OVERRIDE",
            False,
            "compute differently: NVIDIA_TF32_OVERRIDE is not set on rank 0, 0 on rank 1",
        ),
        pytest.param(
            "torch",
            False,
            "run different programs: torch is .* on rank 0, 2.0.0 on rank 1",
            marks=SLOW,
        ),
        pytest.param(
            "Python",
            False,
            "run different programs: Python is .* on rank 0, 3.8 on rank 1",
            marks=SLOW,
        ),
        pytest.param(
            "capability",
            True,
            "--exact: the ranks' machines differ: torch's CPU capability is .*NO AVX on rank 1",
            marks=SLOW,
        ),
        ("capability", False, ""),
        pytest.param("OMP_WAIT_POLICY", True, "", marks=SLOW),
    ],
)
def test_ranks_of_other_programs_or_environments_are_refused_or_told(
    tmp_path: Path, what: str, exact: bool, refusal: str
) -> None:
    settings = replace(BASE, run_dir=str(tmp_path), exact=exact, max_steps=2, micro_batch=6)
    for error in run_ranks(apart, 2, settings, what, group=False):
        assert bool(error) == bool(refusal)
        assert re.search(refusal, error)
    if not refusal:
        log = (tmp_path / "logs" / "rank-0.log").read_text()
        assert "note: the ranks' " in log
        assert "on rank 1" in log
