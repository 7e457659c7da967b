"""A loop of one's own survives too: `should_stop`, `save` and `restore`."""

import os
import runpy
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from bad_steps import fused, inf_at_9, with_bad_sample
from cases import Settings, recipe
from paths import ROOT

from ddp_kit import process_group, should_stop, train_step
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.own_loop import save
from ddp_kit.checkpoint.retention import steps
from ddp_kit.checkpoint.weights import weights_sha256
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import NonFiniteError
from ddp_kit.setup.build import build
from ddp_kit.stopping.signals import Stop, StopFlag
from ddp_kit.testing import start_ranks

OWN_LOOP = str(ROOT / "recipes" / "own_loop.py")


def own_loop(folder: str, death: int, number: int) -> tuple[int, str, int]:
    """Runs the recipe on this rank; rank 1 gets a signal after a step.

    Returns: the step and the weights at the end, and the steps of this attempt.
    """
    import ddp_kit
    from ddp_kit.distributed import control_packet

    control_packet.INTERVAL_S = 0.0
    kept: list[Any] = []
    done: list[int] = []
    step = ddp_kit.train_step
    wrap = ddp_kit.wrap

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


def test_a_loop_of_ones_own_reaches_the_same_weights_through_sigkill_and_sigterm(
    tmp_path: Path,
) -> None:
    def attempt(folder: str, death: int = -1, number: int = 0) -> list[Any]:
        with start_ranks(
            own_loop, 2, str(tmp_path / folder), death, number, group=False, deadline_s=60
        ) as ranks:
            if number != signal.SIGKILL:
                return ranks.values()
            assert -signal.SIGKILL in [report.exit_code for report in ranks.wait()]
            return []

    whole = attempt("whole")
    assert [(step, steps) for step, _, steps in whole] == [(250, 250)] * 2
    attempt("cut", 150, signal.SIGKILL)
    assert steps(LocalDisk(tmp_path / "cut")) == [100]
    stopped = attempt("cut", 170, signal.SIGTERM)
    # the flag was set before that step's boundary: all agreed at the next one
    assert [(step, steps) for step, _, steps in stopped] == [(171, 71)] * 2
    assert steps(LocalDisk(tmp_path / "cut")) == [171, 100]  # no step is lost
    last = attempt("cut")
    assert [ended[:2] for ended in last] == [ended[:2] for ended in whole]
    assert [ended[2] for ended in last] == [79, 79]


def test_a_loop_of_ones_own_hears_of_its_last_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level("WARNING"), process_group(device="cpu") as group:
        training = build(recipe(Settings()), Settings(), group).training
        save(training, tmp_path / "file")
        training.control_packet.close()
    assert "Not a directory" in caplog.text


def ends_badly(group: Group, folder: Path, *, way: str) -> None:
    """Takes three steps, the last of which is not finite and whose verdict waits, and goes on."""
    settings = Settings()
    parts: dict[str, Any] = {
        "optimizer": fused("SGD"),
        "train_data": lambda: with_bad_sample(2 * 24 + 23),
    }
    made = build(recipe(settings, loss=inf_at_9, **parts), settings, group)
    made.training.objectives[0].is_deferred = True
    for batch in made.feed.batches(start=0, end=3):
        train_step(made.training, batch)
    if way == "save":
        save(made.training, folder)
    elif way == "should_stop":
        flag = StopFlag()
        flag.ask(Stop.SIGTERM)
        while not should_stop(made.training, flag):
            pass
        save(made.training, folder)
    made.training.control_packet.close()


def in_a_loop_of_ones_own(folder: str, way: str) -> str:
    """Returns what the loop was ended by."""
    with pytest.raises(NonFiniteError) as raised, process_group(device="cpu") as group:
        ends_badly(group, Path(folder), way=way)
    assert not list(Path(folder).glob("step-*"))
    return str(raised.value)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("way", ["save", "should_stop", "end"])
def test_a_last_step_that_was_not_finite_ends_a_loop_of_ones_own_before_it_is_saved(
    way: str, ranks: int, tmp_path: Path
) -> None:
    """Its verdict is read one step later on CUDA, and there is no such step."""
    if ranks == 1:
        found = [in_a_loop_of_ones_own(str(tmp_path), way)]
    else:
        with start_ranks(
            in_a_loop_of_ones_own, ranks, str(tmp_path), way, group=False, deadline_s=60
        ) as started:
            found = started.values()
    assert all("the loss of step 3 is not finite" in message for message in found)


def test_another_error_than_a_last_step_that_was_not_finite_is_not_hidden_by_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyError, match="the user's own"), process_group(device="cpu") as group:
        ends_badly(group, tmp_path, way="error")
        raise KeyError("the user's own")
