"""A node's torchrun agent in a job that goes on when nodes die (`--min-nodes`), as long as its first node lives.

Owns: what becomes of the job when that one dies: its batch script, its srun and torchrun's store are gone. SLURM leaves the job
its other nodes until the time limit (seen: 22.05.8), and so the agents that are left have it requeued.
Refuses: re-forming after the loss of any other node; torchrun does that.
"""

import contextlib
import signal
import time
from pathlib import Path

from ddp_kit.launch.environment import environment
from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.slurm import cluster, task

HEAD_S, POLL_S, ASK_S = (
    900.0,
    0.2,
    5.0,
)  # SLURM notices a dead node after its SlurmdTimeout, at many sites 300 s


def agent(run_dir: str, *words: str) -> str:
    """Runs a node's agent as `task.agent` does, and then sees to it that the job does not outlive its first node."""
    facts = environment()
    life = f"{facts['SLURM_JOB_ID']}.{facts.get('SLURM_RESTART_COUNT', '0')}"
    over = Path(facts["SUBMITIT_FOLDER"]) / f"{life}.over"
    try:
        return task.agent(run_dir, *words)
    finally:
        if facts["SLURM_NODEID"] == "0":
            over.touch()  # the batch script does the rest
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _outlive(over)


def _outlive(over: Path) -> None:
    """Waits until the first node's agent has ended too. If SLURM has given that node up, it ends this life of the job."""
    job, head = environment()["SLURM_JOB_ID"], environment()["DDP_KIT_HOSTS"].split(",")[0]
    end, asked = time.monotonic() + HEAD_S, time.monotonic()
    while not over.exists() and time.monotonic() < end:
        time.sleep(POLL_S)
        if time.monotonic() - asked < ASK_S:
            continue
        asked = time.monotonic()
        with contextlib.suppress(LaunchError):  # a controller that is away for a while
            if head not in nodes_of(job):
                print(
                    f"ddp-kit: {head} is lost, and with it the batch script: the job ends this life",
                    flush=True,
                )
                cluster.ask(
                    *(
                        ("scontrol", "requeue")
                        if environment().get("DDP_KIT_REQUEUE")
                        else ("scancel",)
                    ),
                    job,
                )
                return


def nodes_of(job: str) -> list[str]:
    """Returns the nodes that a job has now. Raises: LaunchError if SLURM does not answer."""
    facts = cluster.ask("scontrol", "--oneliner", "show", "job", job).split()
    names = next(
        (word.removeprefix("NodeList=") for word in facts if word.startswith("NodeList=")), ""
    )
    return cluster.ask("scontrol", "show", "hostnames", names).split()
