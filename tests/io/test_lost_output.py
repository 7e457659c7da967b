"""A run goes on to its end, with the exit code it would have had, though nobody can read what it says."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import KIT
from small_runs import MORTAL, SMALL

PACED = str(KIT / "paced.py")
PATIENT = str(KIT / "patient.py")
LIMIT_S = 60


def command(folder: Path, *flags: str, recipe: str = PACED) -> list[str]:
    return [sys.executable, "-m", "ddp_kit.train", recipe, "--run-dir", str(folder / "run"), *flags]


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "status.json").read_text())
    return found


def shell(line: str, folder: Path, *, recipe: str = PACED) -> int:
    """Runs a line of bash in which "$@" is the training command. Returns: its exit code."""
    words = ["bash", "-c", line, "bash", *command(folder, recipe=recipe)]
    return subprocess.run(
        words, cwd=folder, timeout=LIMIT_S, check=False, capture_output=True
    ).returncode


def stepping(folder: Path, ranks: "subprocess.Popen[Any]") -> None:
    """Waits for the first records."""
    end = time.monotonic() + LIMIT_S
    records = folder / "run" / "metrics.jsonl"
    while not (records.exists() and '"step": 2' in records.read_text()) and time.monotonic() < end:
        assert ranks.poll() is None, ranks.returncode
        time.sleep(0.05)


@pytest.mark.parametrize(
    "line",
    [
        '"$@" | head -2; exit ${PIPESTATUS[0]}',
        '"$@" >&- 2>&-',
        '"$@" >/dev/full 2>/dev/full',
        pytest.param('"$@" 2>&1 | head -1; exit ${PIPESTATUS[0]}', marks=pytest.mark.slow),
        pytest.param('PYTHONUNBUFFERED=1 "$@" >/dev/full 2>&-', marks=pytest.mark.slow),
    ],
)
def test_a_run_finishes_though_its_output_goes_nowhere(line: str, tmp_path: Path) -> None:
    assert shell(line, tmp_path) == 0
    assert (status(tmp_path)["status"], status(tmp_path)["step"]) == ("finished", 20)


@pytest.mark.parametrize(
    "line",
    ['"$@" >/dev/full 2>/dev/full', pytest.param('"$@" >&- 2>&-', marks=pytest.mark.slow)],
)
def test_a_failure_keeps_its_exit_code_and_status_though_nobody_hears_of_it(
    line: str, tmp_path: Path
) -> None:
    assert shell(f"ACT=raise {line}", tmp_path, recipe=PATIENT) == 1
    assert (status(tmp_path)["status"], status(tmp_path)["exit_code"]) == ("failed", 1)


def test_a_run_finishes_after_its_terminal_is_gone(tmp_path: Path) -> None:
    """It is not the terminal that controls it: no signal comes, but every line fails."""
    ours, its = pty.openpty()
    env = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(
        command(tmp_path, "--pace-s", "0.1"),
        stdout=its,
        stderr=its,
        env=env,
        start_new_session=True,
    ) as run:
        os.close(its)
        stepping(tmp_path, run)
        os.close(ours)
        assert run.wait(LIMIT_S) == 0
    assert status(tmp_path)["status"] == "finished"


def test_a_log_whose_disk_is_full_costs_no_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "rank-0.log").symlink_to("/dev/full")
    done = subprocess.run(
        command(tmp_path, *SMALL, recipe=MORTAL),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Logging error" not in done.stderr
    assert status(tmp_path)["status"] == "finished"


@pytest.fixture
def hears_hangups() -> Iterator[None]:
    """Starts processes that do not ignore SIGHUP, though the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hears_hangups")
def test_a_hangup_saves_and_ends_as_sigterm_does(tmp_path: Path) -> None:
    with subprocess.Popen(command(tmp_path, "--pace-s", "0.2"), stdout=subprocess.DEVNULL) as run:
        stepping(tmp_path, run)
        run.send_signal(signal.SIGHUP)
        run.send_signal(signal.SIGHUP)  # from the kernel, and from the shell
        assert run.wait(LIMIT_S) == 143
    ended = status(tmp_path)
    assert (ended["status"], ended["exit_code"]) == ("preempted", 143)
    assert (tmp_path / "run" / "checkpoints" / f"step-{ended['step']:08d}").is_dir()


@pytest.mark.parametrize(
    "launcher", [[], [sys.executable, "-m", "ddp_kit.launch.local.run", "--nproc-per-node", "2"]]
)
def test_under_nohup_a_run_goes_on_after_a_hangup(launcher: list[str], tmp_path: Path) -> None:
    own = command(tmp_path, "--pace-s", "0.1")
    words = [*launcher, *own[3:]] if launcher else own
    with subprocess.Popen(
        ["nohup", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        stepping(tmp_path, run)
        run.send_signal(signal.SIGHUP)
        assert run.wait(LIMIT_S) == 0
    assert status(tmp_path)["status"] == "finished"


@pytest.mark.usefixtures("hears_hangups")
def test_a_hangup_of_the_launcher_stops_its_ranks_after_a_save(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "ddp_kit.launch.local.run",
        "--nproc-per-node",
        "2",
        *command(tmp_path, "--pace-s", "0.2")[3:],
    ]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as run:
        stepping(tmp_path, run)
        run.send_signal(signal.SIGHUP)
        assert run.wait(LIMIT_S) == 143
    assert status(tmp_path)["status"] == "preempted"
