"""A rank that lives and does not move ends nobody else's time: it is told apart from a dead one, and all are gone in the end."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from paths import KIT
from warm import LAUNCHER, Started, started

STUCK = str(KIT / "stuck.py")
PACED = str(KIT / "paced.py")
LONG = ("--max-steps", "100000", "--pace-s", "0.02")
# generous: two cores, shared by other tests
ALL_GONE_S = 40.0


@contextmanager
def launched(
    folder: Path,
    *flags: str,
    recipe: str = STUCK,
    ranks: int = 2,
    patience_s: float = 0.5,
    **env: str,
) -> Iterator[Started]:
    """`ddp-kit run`; at the end nothing of it is left."""
    words = ["--nproc-per-node", str(ranks), recipe, *flags, "--run-dir", str(folder / "run")]
    pids: list[int] = []
    with started(
        LAUNCHER, *words, folder=folder, env={"EVERY_STEP": "1"} | env, patience_s=patience_s
    ) as run:
        run.until(lambda: len(run.children) == ranks)
        pids += run.children
        yield run
    assert are_gone(pids)
    left = [path.name for path in (folder / "run").rglob("*") if path.name.endswith(".tmp")]
    assert not left


def are_gone(pids: list[int]) -> bool:
    end = time.monotonic() + ALL_GONE_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "status.json").read_text())
    return found


def stuck(fault: str, rank: int) -> list[str]:
    return ["--fault", fault, "--at-rank", str(rank)]


@pytest.mark.parametrize(
    ("fault", "rank", "words"),
    [
        ("stop", 0, r"stopped from outside: rank 0 (pid"),
        ("stop", 1, r"stopped from outside: rank 1 (pid"),
        ("sleep", 1, "every rank's process lives"),
        pytest.param(
            "hold", 0, "every rank's process lives", marks=[pytest.mark.slow, pytest.mark.steady]
        ),
    ],
)
def test_a_rank_that_does_not_move_is_no_dead_one_and_its_peers_end_after_their_timeout(
    fault: str, rank: int, words: str, tmp_path: Path
) -> None:
    with launched(tmp_path, *stuck(fault, rank), TIMEOUT_S="2") as run:
        assert run.ended() == 124, run.output
    assert "a peer is gone" not in run.output
    told = status(tmp_path)
    assert (told["status"], told["exit_code"]) == ("failed", 124)
    assert told["reason"].startswith("no progress: a collective was not completed in time")
    assert words in told["reason"]
    assert words in run.output


@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        ("wait", -1),
        ("sleep", 1),
        ("hold", 1),
        pytest.param("wait", 0, marks=[pytest.mark.slow, pytest.mark.steady]),
        pytest.param("stop", 0, marks=[pytest.mark.slow, pytest.mark.steady]),
    ],
)
def test_a_stuck_rank_does_not_defeat_sigterm(fault: str, rank: int, tmp_path: Path) -> None:
    with launched(tmp_path, *stuck(fault, rank), PATIENCE_S="1") as run:
        run.says(f"is stuck in {fault}")
        run.send(signal.SIGTERM)
        assert run.ended() == 124, run.output
    told = status(tmp_path)
    assert (told["status"], told["exit_code"]) == ("failed", 124)
    if (fault, rank) != ("stop", 0):
        assert told["reason"].startswith("SIGTERM came ")
        assert "no step has ended since: this rank is in " in told["reason"]


@pytest.mark.parametrize("fault", ["wait", "hold"])
def test_ranks_in_c_code_leave_once_their_launcher_has_gone(fault: str, tmp_path: Path) -> None:
    with launched(tmp_path, *stuck(fault, -1), ORPHANED_S="1") as run:
        run.says("rank 0 is stuck")
        run.says("rank 1 is stuck")
        pids = run.children
        run.send(signal.SIGKILL)
        assert are_gone(pids)
    if fault == "wait":
        assert status(tmp_path)["status"] == "failed"


@pytest.mark.parametrize(
    ("number", "ranks", "victim"),
    [
        (signal.SIGKILL, 1, 0),
        (signal.SIGSEGV, 2, 1),
        pytest.param(signal.SIGABRT, 2, 0, marks=[pytest.mark.slow, pytest.mark.steady]),
    ],
)
def test_the_signal_that_ended_a_rank_is_the_exit_code_in_status_json_too(
    number: signal.Signals, ranks: int, victim: int, tmp_path: Path
) -> None:
    with launched(tmp_path, *LONG, recipe=PACED, ranks=ranks) as run:
        run.says("step 3/")
        os.kill(run.children[victim], number)
        assert run.ended() == 128 + number, run.output
    told = status(tmp_path)
    assert (told["status"], told["exit_code"]) == ("failed", 128 + number)
    assert told["reason"] == f"rank {victim} was ended by {number.name}"
    assert told["step"] >= 0


IMPORTS = """\
import os, signal, time
print("imports", os.environ["RANK"], flush=True)
if os.environ["RANK"] == "1":
    {what}
from paced import *
from paced import recipe, Settings
"""


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("os._exit(7)", 7),
        pytest.param(
            "raise ValueError('of its own')", 2, marks=[pytest.mark.slow, pytest.mark.steady]
        ),
    ],
)
def test_a_rank_that_ends_in_its_import_ends_the_run(what: str, code: int, tmp_path: Path) -> None:
    recipe = tmp_path / "importing.py"
    recipe.write_text(IMPORTS.format(what=what))
    with launched(tmp_path, recipe=str(recipe)) as run:
        assert run.ended() == code, run.output


def test_sigterm_during_an_import_leaves_promptly_on_all_ranks(tmp_path: Path) -> None:
    """Rank 0 waits for the other one in C code by then."""
    recipe = tmp_path / "importing.py"
    recipe.write_text(IMPORTS.format(what="time.sleep(1000)"))
    with launched(tmp_path, recipe=str(recipe), patience_s=60.0) as run:
        run.says("imports 0")
        run.says("imports 1")
        time.sleep(1.0)
        begin = time.monotonic()
        run.send(signal.SIGTERM)
        assert run.ended() == 143, run.output
        assert time.monotonic() - begin < 30
