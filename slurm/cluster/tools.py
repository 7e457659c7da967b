"""Programs that the cluster is made of: where they are, which package has them, what they say."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence

POLL_S = 0.02
PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sinfo": "slurm-client",
    "scancel": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}


class ClusterError(Exception):
    """The cluster cannot do what was asked; the message says why and what to type."""


def find(name: str) -> str | None:
    """Returns a program's path, or None.

    Daemons lie in folders that an ordinary user's PATH leaves out.
    """
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def tool(name: str) -> str:
    """Returns a program's path. Raises: ClusterError if it is not there."""
    path = find(name)
    if path is None:
        raise ClusterError(
            f"{name} is missing. On Debian or Ubuntu: apt-get install -y {PACKAGES.get(name, name)}"
        )
    return path


def check_installed() -> None:
    """Raises: ClusterError with one line that installs all that is missing."""
    missing = [name for name in PACKAGES if find(name) is None]
    if missing:
        packages = " ".join(dict.fromkeys(PACKAGES[name] for name in missing))
        raise ClusterError(
            f"SLURM is not (wholly) installed here: no {', '.join(missing)}. "
            "On Debian or Ubuntu, as root: "
            f"apt-get install -y --no-install-recommends {packages}"
        )


def output_of(
    command: Sequence[str], *, environ: dict[str, str] | None = None, limit_s: float = 20
) -> str:
    """Returns what a program printed.

    Raises: ClusterError with its last words if it fails or takes longer.
    """
    try:
        done = subprocess.run(
            command,
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"`{' '.join(command)}` did not end within {limit_s:g} s.") from None
    if done.returncode:
        raise ClusterError(
            f"`{' '.join(command)}` ended with {done.returncode}: {done.stdout.strip()[-500:]}"
        )
    return done.stdout


def wait_until(is_so: Callable[[], bool], *, within_s: float, what: str) -> None:
    """Polls until it is so. Raises: ClusterError after `within_s` seconds."""
    end = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > end:
            raise ClusterError(f"waited {within_s:g} s for {what}.")
        time.sleep(POLL_S)
