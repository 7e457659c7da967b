"""What a run has said: lines of several files in order, each once."""

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from slurm_plans import submitted

from ddp_kit.launch.runs import log_lines, logs
from ddp_kit.launch.runs.found import FoundRun
from ddp_kit.launch.slurm import cluster

pytestmark = pytest.mark.usefixtures("in_a_project")


def test_logs_are_merged_by_time_over_ranks_and_lives(capsys: pytest.CaptureFixture[str]) -> None:
    run = submitted("a")
    (run.folder / "logs").mkdir()
    (run.folder / "logs" / "rank-0.log").write_text(
        "2026-01-01 00:00:01,000 INFO first\n  of rank 0\n2026-01-01 00:00:03,000 INFO third\n"
    )
    (run.folder / "logs" / "rank-1.log").write_text(
        "2026-01-01 00:00:02,000 INFO second\nunfinished line"
    )
    (run.folder / "launch" / "17_1_log.err").write_text("early\n")
    assert logs.main(["a"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in shown] == ["first", "0", "second", "third", "early"]
    assert logs.main(["17", "--rank", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "[rank 1] 2026-01-01 00:00:02,000 INFO second",
        "[task 1 stderr] early",
    ]


def test_what_a_recipe_prints_is_shown_among_the_lines_of_its_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = submitted("a")
    (run.folder / "logs").mkdir()
    log, out = run.folder / "logs" / "rank-0.log", run.folder / "launch" / "17_0_log.out"
    log.write_text(
        "".join(
            f"2026-01-01 00:0{life}:0{at},000 INFO {text}\n"
            for life in (0, 1)
            for at, text in ((1, "begins"), (9, "ends"))
        )
    )
    submitits = (
        "submitit INFO (2026-01-01 00:0{}:00,500) - Starting with JobEnvironment(job_id=17)\n"
    )
    out.write_text(
        "".join(f"{submitits.format(life)}begins\nprint in life {life}\nends\n" for life in (0, 1))
    )
    assert logs.main(["a"]) == 0
    shown = [re.sub("2026.* INFO ", "", line) for line in capsys.readouterr().out.splitlines()]
    once = ("[rank 0] begins", "[task 0 stdout] print in life {}", "[rank 0] ends")
    assert shown == [text.format(life) for life in (0, 1) for text in once]


def test_a_run_that_waits_says_so_and_is_followed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted("a")
    job = cluster.Job(id="17", state="PENDING", reason="Priority", folder="")
    monkeypatch.setattr(FoundRun, "jobs", lambda self: [job])
    assert logs.main(["a"]) == 0
    assert (
        capsys.readouterr().err
        == f"{run.folder}: nothing has been said yet. Job 17 waits: Priority.\n"
    )
    monkeypatch.setattr(logs, "ASK_S", 0.0)
    monkeypatch.setattr(logs, "POLL_S", 0.01)

    def is_over(self: FoundRun) -> bool:
        (run.folder / "logs").mkdir(exist_ok=True)
        (run.folder / "logs" / "rank-0.log").write_text("at last\n")
        return True

    monkeypatch.setattr(FoundRun, "is_over", is_over)
    assert logs.main(["a", "--rank", "0", "-f"]) == 0
    assert capsys.readouterr().out == "[rank 0] at last\n"
    assert logs.main(["a", "--rank", "3"]) == 2
    assert "--rank 3: the run has ranks 0 to 0" in capsys.readouterr().err


def test_following_the_logs_ends_with_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted("a")
    lock, log = run.folder / "run.lock", run.folder / "logs" / "rank-0.log"
    log.parent.mkdir()
    log.write_text("first\n")
    start = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    lock.write_text(
        json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": start, "job": ""})
    )
    monkeypatch.setattr(logs, "ASK_S", 0.2)
    monkeypatch.setattr(logs, "POLL_S", 0.05)
    looks: list[bool] = []

    def is_over(self: FoundRun, ask: Any = FoundRun.is_over) -> bool:
        looks.append(ask(self))
        if len(looks) == 3:
            log.write_text("first\nlast\n")
            lock.unlink()
        return looks[-1]

    monkeypatch.setattr(FoundRun, "is_over", is_over)
    assert logs.main(["a", "-f"]) == 0
    assert looks == [False, False, False, True, True]
    assert capsys.readouterr().out.splitlines() == ["[rank 0] first", "[rank 0] last"]
    lock.write_text(json.dumps({"host": "other", "pid": 1, "start": "1", "job": "17"}))
    assert not run.is_over()
    os.utime(lock, (0, 0))
    assert run.is_over()


def test_what_several_ranks_say_alike_is_shown_once() -> None:
    said = [
        (1.0, "rank 0", "start"),
        (1.1, "rank 1", "start"),
        (1.2, "rank 2", "start"),
        (2.0, "rank 1", "own"),
        (9.0, "rank 0", "start"),
    ]
    lines = [
        log_lines.Line(at, label, f"2026-01-01 00:00:0{int(at)},000 INFO {text}")
        for at, label, text in said
    ]
    assert [line.split("2026")[0] for line in log_lines.merged(lines)] == [
        "[ranks 0-2] ",
        "[rank 1] ",
        "[rank 0] ",
    ]
    assert (
        len(
            list(
                log_lines.merged(
                    [log_lines.Line(0.0, "rank 0", "print"), log_lines.Line(0.0, "rank 1", "print")]
                )
            )
        )
        == 2
    )  # no time: perhaps not alike
