"""submitit's SLURM executor with our batch script in place of its own.

Owns: handing rendered scripts and picklable text to submitit. Refuses: what is in them. Imported only to submit.
"""

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit import Job, SlurmExecutor
from submitit.core import utils

from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.slurm import elastic, task
from ddp_kit.launch.slurm.plan import Run, SlurmPlan
from ddp_kit.launch.slurm.script import render


class Executor(SlurmExecutor):
    """submits a plan: `_make_submission_file_text` is submitit's one place for the script, and a test pins it."""

    def __init__(self, plan: SlurmPlan):
        super().__init__(plan.folder, python=plan.python)
        self._plan = plan
        self._temporary = Path(plan.folder)

    def submit_plan(self) -> list[Job[str]]:
        """Submits the plan as one job. Returns: a `Job` for each of its runs. Raises: LaunchError with what sbatch has said."""
        plan = self._plan
        calls = [utils.DelayedSubmission(*call_of(plan, run)) for run in plan.runs]
        folder = Path(plan.folder)
        pickles = [folder / f".{uuid.uuid4().hex}.pkl" for _ in calls]
        try:
            for call, path in zip(calls, pickles, strict=True):
                call.dump(path)
            first: Job[str] = self._submit_command(self._submitit_command_str)
            jobs = [first]
            if plan.is_array:
                tasks = range(first.num_tasks)
                jobs = [
                    self.job_class(folder=folder, job_id=f"{first.job_id}_{number}", tasks=tasks)
                    for number in range(len(calls))
                ]
            for job, path in zip(jobs, pickles, strict=True):
                job.paths.move_temporary_file(path, "submitted_pickle")
        except utils.FailedJobError as error:
            raise LaunchError(f"sbatch: {_said(error)}") from error
        except utils.FailedSubmissionError as error:
            said = str(error).splitlines()[0]
            raise LaunchError(
                f"{said}: expected 'Submitted batch job N'. If there is one all the same (squeue --me): scancel N"
            ) from error
        finally:
            for path in (*pickles, self._temporary):  # SLURM has its own copy of the script
                path.unlink(missing_ok=True)
        return jobs

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return render(self._plan)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        self._temporary = submission_file_path
        return ["sbatch", str(submission_file_path)]

    def _num_tasks(self) -> int:
        return self._plan.nodes * (self._plan.processes if self._plan.launcher == "srun" else 1)


def call_of(plan: SlurmPlan, run: Run) -> Sequence[Any]:
    """Returns the function that a task of a run calls, and its arguments, all of them text."""
    if plan.launcher == "srun":
        return (task.rank, run.folder, *run.words)
    agents = {"torchrun": torchrun_agent, "accelerate": accelerate_agent}
    agent = elastic.agent if plan.min_nodes else task.agent
    return (
        agent,
        run.folder,
        *agents[plan.launcher](plan),
        "--",
        "-m",
        "ddp_kit.train",
        *run.words,
    )


def torchrun_agent(plan: SlurmPlan) -> list[str]:
    """Returns a node's torchrun, with {nodes}, {head}, {port} and {job} to be filled in on the node."""
    least = f"{plan.min_nodes}:" if plan.min_nodes else ""
    counts = [
        f"--nnodes={least}{{nodes}}",
        f"--nproc-per-node={plan.processes}",
        f"--max-restarts={plan.restarts}",
    ]
    return [
        plan.python,
        "-m",
        "torch.distributed.run",
        *counts,
        "--rdzv-backend=c10d",
        "--rdzv-endpoint={head}:{port}",
        "--rdzv-id={job}",
    ]


def accelerate_agent(plan: SlurmPlan) -> list[str]:
    """Returns a node's accelerate launcher. `--multi_gpu` on CPUs too: `--cpu` over two machines makes two worlds without a word."""
    counts = [
        f"--num_machines={plan.nodes}",
        f"--num_processes={plan.nodes * plan.processes}",
        "--machine_rank={node}",
    ]
    meeting = ["--main_process_ip={head}", "--main_process_port={port}", "--rdzv_backend=c10d"]
    kinds = [
        "--multi_gpu" if plan.nodes * plan.processes > 1 else "--cpu",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    ]
    return [plan.python, "-m", "accelerate.commands.launch", *counts, *meeting, *kinds]


def _said(error: Exception) -> str:
    """What sbatch has written, without submitit's frame around it."""
    lines = [
        line.removeprefix("sbatch: error: ")
        for line in str(error).splitlines()
        if line.startswith("sbatch: error: ")
    ]
    return "; ".join(lines) or str(error)
