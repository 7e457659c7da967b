"""Runs as their directories and SLURM show them: found, listed, cancelled, kept from each other."""

import dataclasses
import json
import os
import socket
from pathlib import Path

import pytest
from slurm_plans import submitted

from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.runs import cancel, jobs
from ddp_kit.launch.runs.found import FoundRun, is_of
from ddp_kit.launch.runs.lookup import find, runs_in
from ddp_kit.launch.slurm import cluster

pytestmark = pytest.mark.usefixtures("in_a_project")


def test_why_a_run_waits_is_cut_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted("a")
    why = "DependencyNeverSatisfied and other reasons " * 5
    monkeypatch.setattr(jobs, "_state", lambda *asked: ("waiting", why.strip()))
    assert jobs.main([str(run.folder.parent)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(why.strip())
    assert why not in jobs.table(jobs.rows([run], {}), width=80)


def test_a_run_is_found_by_folder_name_and_job() -> None:
    run = submitted("a")
    assert find("runs/a") == find("a") == find("17") == run
    assert list(runs_in(Path("runs"))) == [run]
    with pytest.raises(
        LaunchError, match=r"b: no run directory and no job of a run\. Newest in runs/: a"
    ):
        find("b")


def test_a_sweep_in_place_of_a_run_is_answered_with_its_runs() -> None:
    for number in (0, 1):
        run = submitted(f"grid/lr={number}")
        (run.folder / "launch" / "jobs.jsonl").write_text(
            json.dumps({"job": f"18_{number}", "time": 1, "folder": "x"}) + "\n"
        )
    Path("runs/grid/sweep.json").write_text("{}")
    with pytest.raises(
        LaunchError,
        match=r"grid: a sweep; name one of its runs, by its folder or job: 18_0, 18_1\. To end all .*: scancel 18",
    ):
        find("grid")


STRANGERS = {
    "of no run": {"folder": ""},
    "of another run": {"folder": "/home/me/runs/b"},
    "of another cluster": {"cluster": "two"},
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_strangers_job_of_the_same_number_is_none_of_the_runs(
    stranger: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted("a", cluster="one")
    known = [
        cluster.Job(
            **{
                "id": "17",
                "state": "RUNNING",
                "reason": "None",
                "folder": str(run.folder),
                "cluster": "one",
            }
        )
    ]
    monkeypatch.setattr("ddp_kit.launch.runs.found.has_slurm", lambda: True)
    monkeypatch.setattr("ddp_kit.launch.runs.jobs.has_slurm", lambda: True)
    monkeypatch.setattr(cluster, "jobs", lambda *, ids=(): known)
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(cluster, "ask", lambda *words: told.append(words) or "")
    assert run.jobs() == known
    with pytest.raises(LaunchError, match=r"job 17 \(running\) has it"):
        run.require_free()
    known[0] = dataclasses.replace(known[0], **STRANGERS[stranger])
    assert run.jobs() == []
    run.require_free()
    assert run.is_over()
    for now in (True, False):
        with pytest.raises(LaunchError, match="nothing of it waits or runs"):
            cancel.cancel(run, now=now)
    known[0] = dataclasses.replace(known[0], state="COMPLETED")
    assert jobs.main([]) == 0
    assert "completed" not in capsys.readouterr().out
    assert not told


def test_a_submission_of_an_earlier_version_and_a_sweeps_point_know_their_jobs() -> None:
    job = cluster.Job(id="17", state="RUNNING", reason="None", folder="/runs/grid", cluster="one")
    assert is_of(job, {"job": "17", "time": 1, "folder": "/runs/grid/launch"})
    element = dataclasses.replace(job, id="17_3")
    assert is_of(element, {"job": "17_3", "folder": "/runs/grid/launch", "cluster": "one"})
    assert is_of(element, {"job": "17_3", "folder": "/runs/grid/launch", "cluster": ""})
    assert not is_of(element, {"job": "17_2", "folder": "/runs/grid/launch", "cluster": "one"})


def test_of_several_runs_with_a_job_of_that_number_slurms_own_is_found_and_else_the_newest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = submitted("old", cluster="one")
    new = submitted("new", cluster="two", time=2)
    assert find("17") == new
    monkeypatch.setattr("ddp_kit.launch.runs.lookup.has_slurm", lambda: True)
    for run, name in ((old, "one"), (new, "two")):
        known = [
            cluster.Job(
                id="17", state="RUNNING", reason="None", folder=str(run.folder), cluster=name
            )
        ]
        monkeypatch.setattr(cluster, "jobs", lambda *, ids=(), known=known: known)
        assert find("17") == run


def test_a_lock_tells_a_living_process_from_a_later_one_of_its_number_and_from_one_elsewhere() -> (
    None
):
    run = submitted("a")
    start = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    own = {"host": socket.gethostname(), "pid": os.getpid(), "start": start, "job": ""}
    lock = run.folder / "run.lock"
    lock.write_text(json.dumps(own))
    assert run.holder() == socket.gethostname()
    with pytest.raises(LaunchError, match=r"has it\. Type another --run-dir"):
        run.require_free()
    lock.write_text(json.dumps(own | {"start": "1"}))
    assert run.holder() == ""
    run.require_free()
    lock.write_text(json.dumps(own | {"host": "other"}))
    assert run.holder() == "other"
    with pytest.raises(LaunchError, match="a live run on other has it"):
        run.require_free()
    with pytest.raises(LaunchError, match="it runs on other"):
        cancel.cancel(run, now=True)
    assert "it stops after this step" in cancel.cancel(run, now=False)
    assert (run.folder / "STOP").exists()
    os.utime(lock, (0, 0))
    assert run.holder() == ""


def test_a_run_that_died_without_a_word_is_gone_once_nobody_has_its_lock() -> None:
    run = submitted("a")
    (run.folder / "status.json").write_text('{"status": "running", "step": 3}')
    lock = run.folder / "run.lock"
    lock.write_text(
        json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "start": "of another process",
                "job": "17",
            }
        )
    )
    assert jobs.rows([run], {})[0][2::5] == ("gone", "no process has it any more")
    lock.write_text(json.dumps({"host": "other", "pid": 1, "start": "1", "job": "17"}))
    assert jobs.rows([run], {})[0][2] == "running"
    os.utime(lock, (0, 0))
    assert jobs.rows([run], {})[0][2] == "gone"


@pytest.mark.parametrize(
    "state", ["SPECIAL_EXIT", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "A_NEWER_SLURMS"]
)
def test_a_job_in_any_state_but_an_ended_one_keeps_its_run(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submitted("a")
    known = [cluster.Job(id="17", state=state, reason="None", folder="")]
    monkeypatch.setattr(FoundRun, "jobs", lambda self: known)
    with pytest.raises(LaunchError, match=rf"job 17 \({state.lower()}\) has it"):
        run.require_free()
    assert not run.is_over()
    known[0] = dataclasses.replace(known[0], state="OUT_OF_MEMORY")
    run.require_free()
    assert run.is_over()
