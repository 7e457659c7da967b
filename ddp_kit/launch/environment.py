"""The launchers' one place that reads the environment, and becoming another program in a clean one.

It knows which variables belong to a launcher and not to the user. What a rank reads of them is
`ddp_kit.distributed.topology`'s.
"""

import os
import shutil
import signal
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
)
# from a launcher of ours to its ranks
OWN = (
    "DDP_KIT_LAUNCHER",
    "DDP_KIT_LISTENER",
    "DDP_KIT_RUN_FOLDER",
    "DDP_KIT_GUARD",
    "DDP_KIT_REQUEUE",
    "DDP_KIT_GRACE_S",
    "DDP_KIT_PREFLIGHT_S",
    "DDP_KIT_HOSTS",
)
# of other launchers, and of a job that this start may be part of
FOREIGN = ("TORCHELASTIC_", "ACCELERATE_", "SLURM_", "SUBMITIT_", "PMI")
# where the cluster is
KEPT = ("SLURM_CONF",)
# Of the job that a start on this machine is part of: the run's name, how often it was requeued,
# whether and when it stops for the next time.
JOBS = (
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_JOB_END_TIME",
    "DDP_KIT_REQUEUE",
    "DDP_KIT_GRACE_S",
)


def environment() -> Mapping[str, str]:
    """The process's environment. Every launcher reads it through this function."""
    return os.environ


def is_launchers(name: str) -> bool:
    """Whether a variable belongs to whoever has started us, and not to the user."""
    if name in KEPT:
        return False
    return name in RANK_VARIABLES or name in OWN or name.startswith(FOREIGN)


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment without the rank and job variables of whoever has started us."""
    return {name: value for name, value in environ.items() if not is_launchers(name)}


def inside_job(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns a clean environment with the facts of the job that we are in.

    It is for ranks on this machine, which live and end with that job.
    """
    return clean(environ) | {name: environ[name] for name in JOBS if name in environ}


@contextmanager
def outside_job(*, without: Collection[str] = ()) -> Iterator[None]:
    """Takes rank and job variables, and those named, out of this process's own environment.

    What it submits meanwhile is a job of its own. Outside of jobs SLURM's variables stay: they
    are the user's choices.
    """
    is_in_job = "SLURM_JOB_ID" in os.environ
    taken = {}
    for name, value in os.environ.items():
        is_users = not is_in_job and name.startswith("SLURM_")
        if name in without or (is_launchers(name) and not is_users):
            taken[name] = value
    for name in taken:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(taken)


def become(words: Sequence[str]) -> NoReturn:
    """Replaces this process by a launcher of ranks, in a clean environment.

    SIGUSR1 and SIGUSR2, warnings of an end to come, are ignored: agents of torchrun die of them.
    Ranks install handlers of their own.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.execve(words[0], list(words), inside_job(environment()))


def python_paths(env: Sequence[str] = ()) -> list[str]:
    """Returns where ranks look for modules beside their own folder, installed packages apart.

    These are the folders of PYTHONPATH, as `env` (NAME=VALUE) sets it if it does, then what
    editable installs have added.
    """
    named = environment().get("PYTHONPATH", "")
    for pair in env:
        name, _, value = pair.partition("=")
        if name == "PYTHONPATH":
            named = value
    # the first of sys.path is this program's own folder
    found = [*(path for path in named.split(os.pathsep) if path), *sys.path[1:]]
    installed = {"site-packages", "dist-packages"}
    return [path for path in found if not installed & set(Path(path).parts)]


def has_slurm() -> bool:
    """Whether this machine can submit to a SLURM cluster."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def visible_gpus(
    *, environ: Mapping[str, str] | None = None, driver: Path = Path("/proc/driver/nvidia/gpus")
) -> int:
    """Returns how many GPUs a process started here would see, without torch."""
    if environ is None:
        environ = environment()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if not driver.is_dir():
        return 0
    return len(list(driver.iterdir()))
