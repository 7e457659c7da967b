"""The launchers' one place that reads the environment, and becoming another program in a clean one.

Owns: which variables belong to a launcher and not to the user. Refuses: the rank facts; `ddp_kit.distributed.topology` reads those.
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
OWN = tuple(
    f"DDP_KIT_{name}"
    for name in ("LAUNCHER", "LISTENER", "REQUEUE", "GRACE_S", "PREFLIGHT_S", "HOSTS")
)  # from launcher to ranks
FOREIGN = (
    "TORCHELASTIC_",
    "ACCELERATE_",
    "SLURM_",
    "SUBMITIT_",
    "PMI",
)  # a launcher's own: of a job that this start may be part of
KEPT = ("SLURM_CONF",)  # where the cluster is
# of the job that a start on this machine is part of: the run's name, its lives, whether and when it stops for the next one
JOBS = (
    *(
        f"SLURM_{name}"
        for name in (
            "CLUSTER_NAME",
            "JOB_ID",
            "ARRAY_JOB_ID",
            "ARRAY_TASK_ID",
            "RESTART_COUNT",
            "JOB_END_TIME",
        )
    ),
    *("DDP_KIT_REQUEUE", "DDP_KIT_GRACE_S"),
)


def environment() -> Mapping[str, str]:
    """The process's environment. Everything in `launch` reads it through this function."""
    return os.environ


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment without the rank and job variables of whoever has started us."""
    foreign = {
        name for name in environ if name in RANK_VARIABLES + OWN or name.startswith(FOREIGN)
    } - set(KEPT)
    return {name: value for name, value in environ.items() if name not in foreign}


def inside_job(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns a clean environment with the facts of the job that we are in: for ranks on this machine, which live and end with it."""
    return clean(environ) | {name: environ[name] for name in JOBS if name in environ}


@contextmanager
def outside_job(*, without: Collection[str] = ()) -> Iterator[None]:
    """Takes the rank and job variables, and those named, out of this process's own environment while it lasts: what it submits is a job
    of its own. Outside of jobs SLURM's variables stay: they are the user's choices.
    """
    foreign = {
        name: value
        for name, value in os.environ.items()
        if name in without or name not in clean(os.environ)
    }
    if "SLURM_JOB_ID" not in os.environ:
        foreign = {
            name: value
            for name, value in foreign.items()
            if name in without or not name.startswith("SLURM_")
        }
    for name in foreign:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(foreign)


def become(words: Sequence[str]) -> NoReturn:
    """Replaces this process by a launcher of ranks, in a clean environment.

    SIGUSR1 and SIGUSR2, warnings of an end to come, are ignored: agents of torchrun die of them. Ranks install handlers of their own.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.execve(words[0], list(words), inside_job(environment()))


def python_paths(env: Sequence[str] = ()) -> list[str]:
    """Returns where ranks look for modules beside their own folder, installed packages apart: PYTHONPATH, of `env` (NAME=VALUE) too,
    then what editable installs have added.
    """
    named = [pair.partition("=")[2] for pair in env if pair.startswith("PYTHONPATH=")] or [
        environment().get("PYTHONPATH", "")
    ]
    found = [path for path in named[-1].split(os.pathsep) if path] + sys.path[
        1:
    ]  # the first one is this program's own
    return [
        path for path in found if not {"site-packages", "dist-packages"} & set(Path(path).parts)
    ]


def has_slurm() -> bool:
    """Whether this machine can submit to a SLURM cluster."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def visible_gpus(
    *, environ: Mapping[str, str] | None = None, driver: Path = Path("/proc/driver/nvidia/gpus")
) -> int:
    """Returns how many GPUs a process started here would see, without torch."""
    visible = (environment() if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(list(driver.iterdir())) if driver.is_dir() else 0
