"""A node's torchrun agent in a job that goes on when nodes die (`--min-nodes`).

It goes on as long as its first node lives. When that one dies, the job's batch script, its srun
and torchrun's store are gone, and SLURM leaves the job its other nodes until the time limit
(seen: 22.05.8): the agents that are left have it requeued. After the loss of any other node
torchrun forms the world anew.
"""

import contextlib
import signal
import time
from pathlib import Path

from ddp_kit.launch.environment import environment
from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.slurm import cluster, task

# SLURM notices a dead node after its SlurmdTimeout, at many sites 300 s
HEAD_S = 900.0
POLL_S = 0.2
# between two questions to SLURM
ASK_S = 5.0


def agent(run_dir: str, *words: str) -> str:
    """Runs a node's agent as `task.agent` does; the job does not outlive its first node."""
    over = task.job_file("over")
    try:
        return task.agent(run_dir, *words)
    finally:
        if environment()["SLURM_NODEID"] == "0":
            # the batch script does the rest
            over.touch()
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _outlive(over)


def _outlive(over: Path) -> None:
    """Waits until the first node's agent has ended too.

    If SLURM has given that node up, it has the job requeued, or ended if that is not asked for.
    """
    job = environment()["SLURM_JOB_ID"]
    head = environment()["DDP_KIT_HOSTS"].split(",")[0]
    end = time.monotonic() + HEAD_S
    asked = time.monotonic()
    while not over.exists() and time.monotonic() < end:
        time.sleep(POLL_S)
        if time.monotonic() - asked < ASK_S:
            continue
        asked = time.monotonic()
        # a controller may be away for a while
        with contextlib.suppress(LaunchError):
            if head not in nodes_of(job):
                print(
                    f"ddp-kit: {head} is lost, and with it the batch script: "
                    "the job ends this life",
                    flush=True,
                )
                _give_up(job)
                return


def _give_up(job: str) -> None:
    if environment().get("DDP_KIT_REQUEUE"):
        cluster.ask("scontrol", "requeue", job)
    else:
        cluster.ask("scancel", job)


def nodes_of(job: str) -> list[str]:
    """Returns the nodes that a job has now. Raises: LaunchError if SLURM does not answer."""
    names = ""
    for word in cluster.ask("scontrol", "--oneliner", "show", "job", job).split():
        if word.startswith("NodeList="):
            names = word.removeprefix("NodeList=")
            break
    return cluster.ask("scontrol", "show", "hostnames", names).split()
