"""Plans of batch jobs, and what a submission leaves, for tests that stand in a folder with recipe.py."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

from ddp_kit.launch.runs.found import FoundRun
from ddp_kit.launch.slurm.plan import Run, SlurmPlan
from ddp_kit.launch.slurm.planning import planned


def git(*words: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=e", *words], check=True, capture_output=True
    )


def plan(*words: str) -> SlurmPlan:
    return planned([*words, "recipe.py", "--lr", "0.2"])[0]


def submitted(name: str, *, time: int = 1, cluster: str = "", **changes: Any) -> FoundRun:
    """A run directory as a submission leaves it."""
    made = plan("--nodes", "2", "--nproc-per-node", "2")
    home = (Path("runs") / name).absolute()
    (home / "launch").mkdir(parents=True)
    run = Run(folder=str(home), words=("recipe.py", "--run-dir", str(home)))
    (home / "launch" / "plan.json").write_text(
        dataclasses.replace(made, runs=(run,), **changes).to_json()
    )
    record = {"job": "17", "time": time, "folder": str(home / "launch"), "cluster": cluster}
    (home / "launch" / "jobs.jsonl").write_text(json.dumps(record) + "\n")
    return FoundRun(home)
