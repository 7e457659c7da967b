"""A loop of one's own survives too: `should_stop`, `save` and `restore`."""

import os
import runpy
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from cases import Settings, recipe

from ddp_kit import process_group
from ddp_kit.checkpoint.retention import steps
from ddp_kit.checkpoint.storage import LocalDisk
from ddp_kit.compose import compose
from ddp_kit.saving import save
from ddp_kit.testing import start_ranks
from ddp_kit.weights import weights_sha256

OWN_LOOP = str(Path(__file__).parents[1] / "recipes" / "own_loop.py")


def own_loop(folder: str, death: int, number: int) -> tuple[int, str, int]:
    """Runs the recipe on this rank; rank 1 gets a signal after a step. Returns the step and weights at the end, and steps of this life."""
    import ddp_kit
    from ddp_kit import control

    control.INTERVAL_S = 0.0
    kept: list[Any] = []
    done: list[int] = []
    step, wrap = ddp_kit.train_step, ddp_kit.wrap

    def mortal_step(training: Any, batch: Any) -> Any:
        sums = step(training, batch)
        done.append(training.step)
        if training.step == death and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)
        return sums

    def wrapped(*args: Any, **more: Any) -> Any:
        kept.append(wrap(*args, **more))
        return kept[0]

    with patch.object(ddp_kit, "train_step", mortal_step), patch.object(ddp_kit, "wrap", wrapped):
        runpy.run_path(OWN_LOOP)["main"](steps=250, folder=folder)
    return kept[0].step, weights_sha256(kept[0].model), len(done)


def test_a_loop_of_ones_own_reaches_the_same_weights_through_sigkill_and_sigterm(tmp_path: Path) -> None:
    def life(folder: str, death: int = -1, number: int = 0) -> list[Any]:
        with start_ranks(own_loop, 2, str(tmp_path / folder), death, number, group=False, deadline_s=60) as ranks:
            if number != signal.SIGKILL:
                return ranks.values()
            assert -signal.SIGKILL in [report.exit_code for report in ranks.wait()]
            return []

    whole = life("whole")
    assert [(step, steps) for step, _, steps in whole] == [(250, 250)] * 2
    life("cut", 150, signal.SIGKILL)
    assert steps(LocalDisk(tmp_path / "cut")) == [100]
    stopped = life("cut", 170, signal.SIGTERM)
    assert [(step, steps) for step, _, steps in stopped] == [
        (171, 71)
    ] * 2  # the flag was set before that step's boundary: all agreed at the next one
    assert steps(LocalDisk(tmp_path / "cut")) == [171, 100]  # no step is lost
    last = life("cut")
    assert [ended[:2] for ended in last] == [ended[:2] for ended in whole]
    assert [ended[2] for ended in last] == [79, 79]


def test_a_loop_of_ones_own_hears_of_its_last_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level("WARNING"), process_group(device="cpu") as group:
        training = compose(recipe(Settings()), Settings(), group).training
        save(training, tmp_path / "file")
        training.control.close()
    assert "Not a directory" in caplog.text
