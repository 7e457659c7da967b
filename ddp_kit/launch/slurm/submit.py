"""`ddp-kit slurm [flags] RECIPE.py [recipe flags]`: a batch job; from Python `submit(plan)`."""

import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_kit.io.atomic import make_private_folder
from ddp_kit.launch.environment import outside_job
from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.private_file import write_private
from ddp_kit.launch.runs.found import FoundRun
from ddp_kit.launch.slurm import cluster
from ddp_kit.launch.slurm.plan import Run, SlurmPlan
from ddp_kit.launch.slurm.planning import planned, tell_if_uncopied
from ddp_kit.launch.slurm.script import render, variables
from ddp_kit.launch.slurm.snapshot import code_of
from ddp_kit.launch.verbs import verb

if TYPE_CHECKING:
    from submitit import Job


def submit(plan: SlurmPlan, *, copies: bool = True) -> "Job[str]":
    """Submits a plan of one run. Returns: submitit's `Job`. Otherwise as `submit_runs`."""
    return submit_runs(plan, copies=copies)[0]


def submit_runs(plan: SlurmPlan, *, copies: bool = True) -> "list[Job[str]]":
    """Copies the code (without `copies` only if it never was), and submits the plan as one job.

    Returns: submitit's `Job` of each run. Raises: LaunchError if the cluster has no such
    partition, GPUs or time, a run directory is in use or cannot be written, or sbatch refuses it.
    """
    cluster.require_fits(plan)
    for run in plan.runs:
        FoundRun(Path(run.folder)).require_free()
    _make_folders(plan)
    if plan.snapshot and (copies or not Path(plan.snapshot).exists()):
        code_of(Path(plan.source), copy=Path(plan.snapshot)).take()
    if importlib.util.find_spec("submitit") is None:
        raise LaunchError("submitting needs submitit: pip install 'ddp_kit[slurm]'.")
    from ddp_kit.launch.slurm.executor import Executor

    name = cluster.submitted_to(plan)
    with outside_job(without=variables(plan)):
        jobs = Executor(plan).submit_plan()
    for run, job in zip(plan.runs, jobs, strict=True):
        _note_down(plan, run, job=job.job_id, cluster_name=name)
    return jobs


def _make_folders(plan: SlurmPlan) -> None:
    """Raises: LaunchError if one cannot be made."""
    try:
        for path in (Path(plan.folder), *(_home(run) for run in plan.runs)):
            make_private_folder(path)
    except OSError as error:
        raise LaunchError(
            f"{error.filename}: cannot be written ({error.strerror}). Type another --run-dir."
        ) from error


def _home(run: Run) -> Path:
    return Path(run.folder) / "launch"


def _note_down(plan: SlurmPlan, run: Run, *, job: str, cluster_name: str) -> None:
    """Leaves in a run's directory how it was submitted, and as which job.

    The words of a recipe may be secrets, which the job needs: the plan is for its owner alone.
    """
    own = dataclasses.replace(plan, runs=(run,))
    write_private(_home(run) / "plan.json", own.to_json())
    record = {"job": job, "time": time.time(), "folder": plan.folder, "cluster": cluster_name}
    with (_home(run) / "jobs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@verb("slurm")
def main(argv: Sequence[str]) -> int:
    """The command. Returns: 0 once the job is submitted, 2 if it is refused."""
    plan, asked = planned(argv)
    tell_if_uncopied(plan, asked=asked)
    if asked.dry_run:
        print(render(plan), end="")
        return 0
    number = submit(plan).job_id
    print(f"job {number}: {plan.runs[0].folder}")
    print(f"ddp-kit jobs · ddp-kit logs {number} -f · ddp-kit cancel {number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
