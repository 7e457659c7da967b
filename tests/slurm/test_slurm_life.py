"""Two lives of one job on a real SLURM: submitted in a user's folder, edited while it is queued, warned, requeued, finished."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import submitit
from clusters import Cluster
from paths import ROOT
from slurm_jobs import Submitted
from users_folders import make_users_folder

from ddp_kit.launch.slurm.plan import SlurmPlan

STEPS = 30
EDITED = "raise SystemExit('edited while it was queued')\n"


def submitted(cluster: Cluster, folder: Path, *words: str) -> Submitted:
    """A job of 2 ranks, by `ddp-kit slurm`, typed in that folder."""
    own = ["--nproc-per-node", "2", "--env", "OMP_NUM_THREADS=1", "--warn-s", "60"]
    done = subprocess.run(
        [Path(sys.executable).with_name("ddp-kit"), "slurm", *own, *words, "--run-dir", "run"],
        cwd=folder,
        env=cluster.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plan = SlurmPlan.from_json((folder / "run" / "launch" / "plan.json").read_text())
    job = submitit.SlurmJob(
        folder=plan.folder, job_id=done.stdout.split()[1].rstrip(":"), tasks=[0, 1]
    )
    return Submitted(cluster=cluster, plan=plan, job=job, folder=folder / "run")


def commit(folder: Path) -> None:
    name = ["-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)


@dataclass(frozen=True, kw_only=True)
class TwoLives:
    """A job that has ended, and what it had left when its first life was over."""

    run: Submitted
    first_status: Any
    results: Sequence[str]


@pytest.fixture(scope="module")
def lives(session_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> TwoLives:
    cluster = session_cluster
    folder = make_users_folder(tmp_path_factory.mktemp("lives") / "mine", launch="launch")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ddp_kit", folder / "ddp_kit", ignore=ignored)
    commit(folder)
    flags = ["recipe.py", "--max-steps", str(STEPS), "--pace-s", "0.1"]
    run = submitted(cluster, folder, "--sbatch", "hold", *flags)
    (folder / "recipe.py").write_text(EDITED)
    (folder / "ddp_kit" / "train.py").write_text(EDITED)
    cluster.run("scontrol", "release", run.id)
    run.until_step(4)
    cluster.run("scancel", "--signal=USR1", run.id)
    run.until(lambda: "nothing lost: requeued" in run.log)
    first_status = run.status
    run.ended()
    with pytest.MonkeyPatch.context() as patch:
        cluster.enter(patch)
        return TwoLives(run=run, first_status=first_status, results=run.job.results())


def test_a_warning_leads_to_a_save_a_requeue_and_a_life_that_goes_on(lives: TwoLives) -> None:
    first = lives.first_status
    assert (first["status"], first["exit_code"]) == ("preempted", 75)
    run = lives.run
    assert (run.status["status"], run.status["step"]) == ("finished", STEPS)
    starts = [
        (event["event"], event["step"])
        for event in run.lines("events.jsonl")
        if event["event"] in ("start", "resume")
    ]
    assert starts == [("start", 0), ("resume", first["step"])]
    steps = [record["step"] for record in run.lines("metrics.jsonl") if record["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))  # nothing lost, nothing twice
    assert "life 0 of job" in run.log
    assert "life 1 of job" in run.log


def test_a_queued_job_runs_the_code_as_it_was_submitted(lives: TwoLives) -> None:
    """Beside a user's own `launch`, `recipes` and `tests`, which end whatever imports them."""
    code = lives.run.folder / "code"
    assert "edited" not in (code / "ddp_kit" / "train.py").read_text()
    assert (code / "launch" / "__init__.py").exists()
    recipe = json.loads((lives.run.folder / "settings.json").read_text())["recipe"]
    assert recipe.startswith(str(code))


def test_a_jobs_result_is_submitits(lives: TwoLives) -> None:
    assert [json.loads(result)["status"] for result in lives.results] == ["finished", "finished"]


@pytest.mark.slow
@pytest.mark.steady
def test_a_job_without_a_copy_of_the_code_runs_beside_a_users_own_modules(
    cluster: Cluster, tmp_path: Path
) -> None:
    """From `ddp-kit slurm`, typed in that folder, to the ranks, which submitit unpickles there."""
    folder = make_users_folder(tmp_path / "mine", launch="launch.py")
    run = submitted(cluster, folder, "--no-snapshot", "recipe.py", "--max-steps", "2")
    run.ended()
    assert (run.status["status"], run.status["step"]) == ("finished", 2)
