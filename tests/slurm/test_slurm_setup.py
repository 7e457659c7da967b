"""Whatever the user's lines of --setup do, the batch script does its own work: on a real SLURM, with a stand-in for the ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import Cluster, becomes
from slurm_jobs import PACED, Submitted

from ddp_kit.launch.slurm.submit import planned, submit

# In place of Python, called as `python -u -m submitit.core._submit FOLDER`. LIVES says for each life how it ends.
STAND_IN = """#!/bin/bash
life=${SLURM_RESTART_COUNT:-0}
run=$(dirname "$4")
stop() { touch "$run/requeue"; exit 75; }
trap stop TERM
lives=($LIVES)
touch "$run/life-$life"
case ${lives[$life]} in
  ends) touch "$4/$SLURM_JOB_ID.$life.ended" ;;
  saves) stop ;;
  vanishes) exit 0 ;;
  fails) echo 9 > "$4/$SLURM_JOB_ID.$life.failed"; exit 9 ;;
  sleeps) for second in {1..100}; do sleep 1; done ;;
esac
"""
OWN_NAMES = [
    f"{name}=/data"
    for name in (
        "job",
        "life",
        "run",
        "folder",
        "told",
        "rc",
        "first",
        "failed",
        "max_requeues",
        "step",
    )
]
HOSTILE = {
    "trap": ["trap 'echo mine' TERM EXIT", "trap '' TERM USR1"],
    "exit trap": ["trap 'exit 0' EXIT"],
    "options": ["set -e", "set -o pipefail", "set -u", "set -Cf"],
    "shopt": [
        "shopt -s extglob failglob expand_aliases",
        "alias say=false kill=false",
        "true !(x*)",
    ],
    "names and folder": [*OWN_NAMES, "cd /", "IFS=/", "set -- a b c"],
    "readonly": [f"readonly {' '.join(OWN_NAMES)}"],
    "functions": [
        "say() { exit 3; }; wait() { exit 3; }; kill() { exit 3; }; scontrol() { exit 3; }"
    ],
    "sourced": ["source {folder}/mine.sh"],
    "no option of sbatch": ["#SBATCH --comment=mine", "#SBATCH --no-requeue"],
}
MINE = "set -eu\ntrap 'echo mine' TERM EXIT\njob=3 run=/data folder=/data\ncd /\n"
LEAVING = {
    "exit 0": ["exit 0"],
    "exit 7": ["exit 7"],
    "exec": ["exec true"],
    "errexit": ["set -e", "false"],
    "nounset": ["set -u", "echo $NO_SUCH_NAME"],
    "unfinished": ["echo 'one"],
    "exit trap": ["trap 'exit 0' EXIT", "exit 3"],
    "143": ["exit 143"],
}
Jobs = Callable[..., Submitted]


@pytest.fixture
def stood_in(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Submits jobs of one task, a stand-in."""
    cluster.enter(monkeypatch)
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    (tmp_path / "mine.sh").write_text(MINE)

    def start(name: str, setup: list[str], *, lives: str) -> Submitted:
        folder = tmp_path / "runs" / name.replace(" ", "-")
        lines = [f"--setup={line.replace('{folder}', str(tmp_path))}" for line in setup]
        words = [
            "--no-snapshot",
            "--python",
            str(python),
            "--env",
            f"LIVES={lives}",
            *lines,
            PACED,
            "--run-dir",
            str(folder),
        ]
        made = planned(words)[0]
        return Submitted(cluster=cluster, plan=made, job=submit(made), folder=folder)

    return start


def test_a_saved_job_is_requeued_and_ends_well_whatever_setup_has_done(stood_in: Jobs) -> None:
    runs = [stood_in(name, setup, lives="saves ends") for name, setup in HOSTILE.items()]
    for run in runs:
        run.ended("COMPLETED", within_s=60)
        assert run.cluster.facts(run.id)["Restarts"] == "1", run.log
        assert "life 1 of job" in run.log
        assert "ends with exit code 0" in run.log


def test_a_failure_keeps_its_exit_code_whatever_setup_has_done(stood_in: Jobs) -> None:
    hardest = ("exit trap", "options", "readonly", "functions", "sourced")
    runs = [stood_in(name, HOSTILE[name], lives="fails") for name in hardest]
    for run in runs:
        run.ended("FAILED")
        assert run.cluster.facts(run.id)["ExitCode"] == "9:0", run.log


def test_a_cancelled_job_stays_cancelled_whatever_setup_has_done(stood_in: Jobs) -> None:
    runs = [
        stood_in(name, HOSTILE[name], lives="sleeps ends")
        for name in ("trap", "names and folder", "sourced")
    ]
    for run in runs:
        run.until((run.folder / "life-0").exists)
        run.cluster.run("scancel", run.id)
    for run in runs:
        run.ended("CANCELLED")
        assert becomes(
            lambda run=run: "SLURM itself ends or requeues the job" in run.log, within_s=5
        ), run.log
        assert run.cluster.facts(run.id)["Restarts"] == "0"


def test_a_setup_that_leaves_the_script_is_a_failure(stood_in: Jobs) -> None:
    runs = {name: stood_in(name, setup, lives="ends") for name, setup in LEAVING.items()}
    for run in runs.values():
        run.ended("FAILED")
        assert run.cluster.facts(run.id)["ExitCode"] == "1:0", run.log
        assert "--setup has ended the script before the ranks were started" in run.log
        assert not (run.folder / "life-0").exists()


def test_a_setup_line_that_fails_is_named_and_ends_the_job_with_1(stood_in: Jobs) -> None:
    run = stood_in("false", ["sh -c 'exit 7'"], lives="ends")
    run.ended("FAILED")
    assert run.cluster.facts(run.id)["ExitCode"] == "1:0"
    assert "ddp-kit: --setup sh -c 'exit 7': it failed" in run.log


def test_an_exit_code_0_without_an_end_is_a_failure(stood_in: Jobs) -> None:
    unseen = 'srun() { command srun "${@/#--output=*/--output=/no/such/folder/out}"; }'
    never_started = stood_in("unseen", [unseen], lives="ends")
    vanished = stood_in("vanished", [], lives="vanishes")
    for run in (never_started, vanished):
        run.ended("FAILED")
        assert run.cluster.facts(run.id)["ExitCode"] == "1:0", run.log
    assert (
        "no rank 0 has come to its end: were the tasks started? Every node must see" in vanished.log
    )
    assert not (never_started.folder / "life-0").exists()
