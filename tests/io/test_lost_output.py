"""A run goes on to its end, with the exit code it would have had, though nobody can read what it says."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from paths import KIT
from small_runs import MORTAL, SMALL
from warm import LAUNCHER, LIMIT_S, TRAIN, Started, started

PACED = str(KIT / "paced.py")
PATIENT = str(KIT / "patient.py")
FULL = {"stdout": "/dev/full", "stderr": "/dev/full"}
CLOSED = {"stdout": "", "stderr": ""}


def one_rank(
    folder: Path, *flags: str, recipe: str = PACED, **surroundings: Any
) -> AbstractContextManager[Started]:
    """`python -m ddp_kit.train`, alone."""
    words = [recipe, "--run-dir", str(folder / "run"), *flags]
    return started(TRAIN, *words, folder=folder, **surroundings)


def two_ranks(folder: Path, *flags: str, **surroundings: Any) -> AbstractContextManager[Started]:
    """`ddp-kit run`."""
    words = ["--nproc-per-node", "2", PACED, "--run-dir", str(folder / "run"), *flags]
    return started(LAUNCHER, *words, folder=folder, **surroundings)


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "status.json").read_text())
    return found


def has_begun(folder: Path) -> bool:
    """Whether there are records."""
    records = folder / "run" / "metrics.jsonl"
    return records.exists() and '"step": 2' in records.read_text()


@pytest.mark.parametrize("where", [FULL, CLOSED], ids=["a full disk", "closed"])
def test_a_run_finishes_though_its_output_goes_nowhere(
    where: dict[str, str], tmp_path: Path
) -> None:
    with one_rank(tmp_path, **where) as run:
        assert run.ended() == 0
    assert (status(tmp_path)["status"], status(tmp_path)["step"]) == ("finished", 20)


def test_a_run_finishes_though_its_reader_leaves_after_a_line(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def read_a_line() -> None:
        with pipe.open() as file:
            assert file.readline()

    reader = threading.Thread(target=read_a_line)
    reader.start()
    with one_rank(tmp_path, stdout=str(pipe)) as run:
        assert run.ended() == 0, run.output
    reader.join(LIMIT_S)
    assert (status(tmp_path)["status"], status(tmp_path)["step"]) == ("finished", 20)


@pytest.mark.parametrize(
    "line",
    [
        '"$@" >/dev/full 2>/dev/full',
        pytest.param(
            'PYTHONUNBUFFERED=1 "$@" >/dev/full 2>&-', marks=[pytest.mark.slow, pytest.mark.steady]
        ),
    ],
)
def test_a_failure_keeps_its_exit_code_and_status_though_nobody_hears_of_it(
    line: str, tmp_path: Path
) -> None:
    """With an interpreter of its own, which has something to say when it cannot flush what is left."""
    command = [sys.executable, "-m", TRAIN, PATIENT, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        ["bash", "-c", line, "bash", *command],
        cwd=tmp_path,
        env=os.environ | {"ACT": "raise", "OMP_NUM_THREADS": "1"},
        timeout=LIMIT_S,
        check=False,
        capture_output=True,
    )
    assert done.returncode == 1
    assert (status(tmp_path)["status"], status(tmp_path)["exit_code"]) == ("failed", 1)


def test_a_run_finishes_after_its_terminal_is_gone(tmp_path: Path) -> None:
    """It is not the terminal that controls it: no signal comes, but every line fails."""
    ours, its = pty.openpty()
    place = os.ttyname(its)
    with one_rank(
        tmp_path, "--pace-s", "0.05", stdout=place, stderr=place, env={"TERM": "xterm"}
    ) as run:
        run.until(lambda: has_begun(tmp_path))
        os.close(its)
        os.close(ours)
        assert run.ended() == 0
    assert status(tmp_path)["status"] == "finished"


def test_a_log_whose_disk_is_full_costs_no_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "rank-0.log").symlink_to("/dev/full")
    with one_rank(tmp_path, *SMALL, recipe=MORTAL) as run:
        assert run.ended() == 0, run.output
    assert "Logging error" not in run.output
    assert status(tmp_path)["status"] == "finished"


def test_a_hangup_saves_and_ends_as_sigterm_does(tmp_path: Path) -> None:
    with one_rank(tmp_path, "--pace-s", "0.5") as run:
        run.until(lambda: has_begun(tmp_path))
        run.send(signal.SIGHUP)
        # one from the kernel, and one from the shell; at once they would be one
        time.sleep(0.2)
        run.send(signal.SIGHUP)
        assert run.ended() == 143, run.output
    ended = status(tmp_path)
    assert (ended["status"], ended["exit_code"]) == ("preempted", 143)
    assert (tmp_path / "run" / "checkpoints" / f"step-{ended['step']:08d}").is_dir()


@pytest.mark.parametrize("start", [one_rank, two_ranks])
def test_under_nohup_a_run_goes_on_after_a_hangup(start: Any, tmp_path: Path) -> None:
    with start(tmp_path, "--pace-s", "0.05", nohup=True) as run:
        run.until(lambda: has_begun(tmp_path))
        run.send(signal.SIGHUP)
        assert run.ended() == 0, run.output
    assert status(tmp_path)["status"] == "finished"
