"""submitit's SLURM executor with our batch script in place of its own.

It hands rendered scripts and pickles of nothing but text to submitit, and is imported only to
submit.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from submitit import Job, SlurmExecutor
from submitit.core import utils

from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.private_file import claim_private, write_private
from ddp_kit.launch.slurm import elastic, task
from ddp_kit.launch.slurm.plan import Run, SlurmPlan
from ddp_kit.launch.slurm.script import render


class Executor(SlurmExecutor):
    """Submits a plan: the methods with an underscore are submitit's, and a test pins them."""

    def __init__(self, plan: SlurmPlan):
        super().__init__(plan.folder, python=plan.python)
        self._plan = plan
        self._temporary = Path(plan.folder)

    def submit_plan(self) -> list[Job[str]]:
        """Submits the plan as one job, whose files only their owner may read.

        Returns: a `Job` for each of its runs. Raises: LaunchError with what sbatch has said.
        """
        plan = self._plan
        calls = [utils.DelayedSubmission(*call_of(plan, run)) for run in plan.runs]
        pickles = [Path(plan.folder) / f".{uuid.uuid4().hex}.pkl" for _ in calls]
        try:
            for call, path in zip(calls, pickles, strict=True):
                claim_private(path)
                call.dump(path)
            with _refusals():
                first: Job[str] = self._submit_command(self._submitit_command_str)
            jobs = self._jobs_of(first)
            for job, path in zip(jobs, pickles, strict=True):
                job.paths.move_temporary_file(path, "submitted_pickle")
        finally:
            # SLURM has its own copy of the script
            for path in (*pickles, self._temporary):
                path.unlink(missing_ok=True)
        return jobs

    def _jobs_of(self, first: Job[str]) -> list[Job[str]]:
        """Returns a `Job` for each run: the job itself, or the elements of its array."""
        if not self._plan.is_array:
            return [first]
        folder = Path(self._plan.folder)
        tasks = range(first.num_tasks)
        return [
            self.job_class(folder=folder, job_id=f"{first.job_id}_{number}", tasks=tasks)
            for number in range(len(self._plan.runs))
        ]

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        # what submitit writes into a file that others may read
        return ""

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        self._temporary = submission_file_path
        write_private(submission_file_path, render(self._plan))
        return ["sbatch", str(submission_file_path)]

    def _num_tasks(self) -> int:
        return self._plan.nodes * self._plan.tasks_per_node


@contextmanager
def _refusals() -> Iterator[None]:
    """Raises: LaunchError with what sbatch has said, without submitit's frame around it."""
    try:
        yield
    except utils.FailedJobError as error:
        raise LaunchError(f"sbatch: {_said(error)}") from error
    except utils.FailedSubmissionError as error:
        said = str(error).splitlines()[0]
        raise LaunchError(
            f"{said}: expected 'Submitted batch job N'. "
            "If there is one all the same (squeue --me): scancel N"
        ) from error


def call_of(plan: SlurmPlan, run: Run) -> Sequence[Any]:
    """Returns the function that a task of a run calls, and its arguments, all of them text."""
    if not plan.has_agents:
        return (task.rank, run.folder, *run.words)
    agent = elastic.agent if plan.min_nodes else task.agent
    command = AGENTS[plan.launcher](plan)
    return (agent, run.folder, *command, "--", "-m", "ddp_kit.train", *run.words)


def torchrun_agent(plan: SlurmPlan) -> list[str]:
    """Returns a node's torchrun; {nodes}, {head}, {port} and {job} are filled in on the node."""
    nodes = "{nodes}"
    if plan.min_nodes:
        nodes = f"{plan.min_nodes}:{nodes}"
    return [
        plan.python,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={plan.processes}",
        f"--max-restarts={plan.restarts}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint={head}:{port}",
        "--rdzv-id={job}",
    ]


def accelerate_agent(plan: SlurmPlan) -> list[str]:
    """Returns a node's accelerate launcher.

    `--multi_gpu` on CPUs too: `--cpu` over two machines makes two worlds without a word.
    """
    processes = plan.nodes * plan.processes
    return [
        plan.python,
        "-m",
        "accelerate.commands.launch",
        f"--num_machines={plan.nodes}",
        f"--num_processes={processes}",
        "--machine_rank={node}",
        "--main_process_ip={head}",
        "--main_process_port={port}",
        "--rdzv_backend=c10d",
        "--multi_gpu" if processes > 1 else "--cpu",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    ]


AGENTS = {"torchrun": torchrun_agent, "accelerate": accelerate_agent}


def _said(error: Exception) -> str:
    """What sbatch has written on its lines, else all of the error."""
    mark = "sbatch: error: "
    lines = [line for line in str(error).splitlines() if line.startswith(mark)]
    if not lines:
        return str(error)
    return "; ".join(line.removeprefix(mark) for line in lines)
