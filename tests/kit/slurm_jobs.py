"""Recipes as batch jobs on the tests' cluster."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters import Cluster
from paths import KIT, ROOT

from ddp_kit.launch.runs.found import FoundRun
from ddp_kit.launch.slurm.plan import SlurmPlan
from ddp_kit.launch.slurm.submit import planned, submit

PACED = str(KIT / "paced.py")
LONG = ("--max-steps", "400", "--pace-s", "0.2")
SHORT = ("--max-steps", "3")
POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job of ours, and what it leaves."""

    cluster: Cluster
    plan: SlurmPlan
    job: Any  # submitit's
    folder: Path

    @property
    def id(self) -> str:
        return str(self.job.job_id)

    @property
    def status(self) -> Mapping[str, Any]:
        return FoundRun(self.folder).status

    @property
    def log(self) -> str:
        """What the batch script has said, over all lives."""
        path = Path(self.plan.folder) / f"{self.id}.log"
        return path.read_text() if path.exists() else ""

    def said(self, task: int = 0, kind: str = "out") -> str:
        """What a task has written, over all lives."""
        path = Path(self.plan.folder) / f"{self.id}_{task}_log.{kind}"
        return path.read_text() if path.exists() else ""

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of one of the run's files."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, what: Callable[[], object], *, within_s: float = 120) -> None:
        """Waits for something. Fails the test with the job's words after `within_s` seconds."""
        end = time.monotonic() + within_s
        while not what():
            state = self.cluster.state(self.id)
            assert time.monotonic() < end, (
                f"job {self.id} is {state}\n{self.log}\n{self.said()[-2000:]}\n{self.said(kind='err')[-3000:]}"
            )
            time.sleep(POLL_S)

    def until_step(self, step: int, *, within_s: float = 120) -> None:
        """Waits until a step is recorded."""
        self.until(
            lambda: any(record["step"] >= step for record in self.lines("metrics.jsonl")),
            within_s=within_s,
        )

    def ended(self, state: str = "COMPLETED", *, within_s: float = 180) -> None:
        """Waits for the job's end as `state`, which leaves no lock behind."""
        try:
            self.cluster.wait(self.id, state=state, within_s=within_s)
        except AssertionError as error:
            raise AssertionError(
                f"{error}\n{self.log}\n{self.said()[-2000:]}\n{self.said(kind='err')[-3000:]}"
            ) from error
        assert not (self.folder / "run.lock").exists()


def train(
    cluster: Cluster,
    folder: Path,
    *flags: str,
    slurm: Sequence[str] = (),
    recipe: str = PACED,
    **changes: Any,
) -> Submitted:
    """Submits a recipe; `slurm` are the launcher's flags: 1 node and 2 ranks unless they say otherwise. Call `cluster.enter` first."""
    default = [] if "--nodes" in slurm else ["--nodes", "1"]
    default += [] if "--nproc-per-node" in slurm else ["--nproc-per-node", "2"]
    default += [] if "--no-snapshot" in slurm else ["--no-snapshot"]
    common = [
        "--env",
        f"PYTHONPATH={ROOT}:{KIT}",
        "--env",
        "OMP_NUM_THREADS=1",
        "--warn-s",
        "60",
    ]
    made = planned([*default, *common, *slurm, recipe, *flags, "--run-dir", str(folder)])[0]
    return Submitted(cluster=cluster, plan=made, job=submit(made), folder=folder)


Trained = Callable[..., Submitted]


def pids(run: Submitted, word: str, *, but: str = "\0") -> list[int]:
    """The processes on the cluster whose command line has a word, and not another one."""
    return [
        int(line.split()[1])
        for line in run.cluster.control("ps").splitlines()
        if word in line and but not in line
    ]
