"""What a cluster's folder knows: its nodes, its network, and the processes started from it.

`cluster.json` is written before each thing it names is made, so that `down` finds all of it. The
folder is shared with nothing else: what is in it is emptied.
"""

import contextlib
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.processes import start_time
from cluster.tools import ClusterError

# in every folder that was made by `up`: nothing else is ever emptied
MARK = ".dev_cluster"
FOLDERS = ("bin", "ctld", "dev", "etc", "log", "munge", "run", "spool")


@dataclass(kw_only=True)
class State:
    """A cluster that is up, or half so.

    `network` numbers its bridge and addresses, `port` is the controller's, and `pids` has
    (id, start time) by name.
    """

    folder: Path
    addresses: dict[str, str]
    network: int | None = None
    port: int = 0
    pids: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        """slurm.conf"""
        return self.folder / "etc" / "slurm.conf"

    @property
    def environ(self) -> dict[str, str]:
        """The environment with which commands reach this cluster.

        Nothing in it is another cluster's, or a job's.
        """
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH_", "SRUN_"))
        }
        return {
            **inherited,
            "SLURM_CONF": str(self.config),
            "PATH": f"{self.folder / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        }

    def save(self) -> None:
        """Writes cluster.json, whole or not at all."""
        facts = {name: value for name, value in asdict(self).items() if name != "folder"}
        written = self.folder / "cluster.tmp"
        written.write_text(json.dumps(facts, indent=1))
        written.replace(self.folder / "cluster.json")

    def forget(self) -> None:
        """There is no cluster in the folder any more; its logs stay."""
        (self.folder / "cluster.json").unlink(missing_ok=True)

    def is_alive(self, name: str) -> bool:
        """Whether a process of ours is running."""
        pid, started = self.pids.get(name, (0, 0))
        return bool(pid) and start_time(pid) == started

    def start(self, name: str, command: Sequence[str]) -> None:
        """Starts a daemon in a session of its own, which outlives this process.

        Its output goes to log/NAME.out.
        """
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environ,
                cwd=self.folder,
                start_new_session=True,
            )
        started = start_time(process.pid)
        # nobody waits for it: it is not this object's business any more
        process.returncode = 0
        if started is not None:
            self.pids[name] = (process.pid, started)
            self.save()


def read_state(folder: Path) -> State | None:
    """Returns what is up in a folder, None for nothing."""
    try:
        facts = json.loads((folder / "cluster.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return State(
        folder=folder,
        addresses=facts["addresses"],
        network=facts["network"],
        port=facts["port"],
        pids={name: (pid, started) for name, (pid, started) in facts["pids"].items()},
    )


def prepare(folder: Path) -> None:
    """Makes the folder, or empties what an earlier cluster has left there.

    Raises: ClusterError if it is somebody else's, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MARK).exists() and any(folder.iterdir()):
            raise ClusterError(f"{folder} holds something else. Take a new or an empty folder.")
        (folder / MARK).touch()
        for name in FOLDERS:
            _empty(folder / name)
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClusterError(
            f"{folder} cannot be the cluster's folder: {error.strerror}. "
            "Take one that you may write to."
        ) from None


def _empty(folder: Path) -> None:
    """Removes what is in a folder.

    By hand: the fake GPUs are links to a device, which must not be followed.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _empty(path)
            path.rmdir()
        else:
            path.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One command at a time changes a cluster. Raises: ClusterError if the folder is not there."""
    try:
        file = (folder / MARK).open("a")
    except OSError:
        raise ClusterError(
            f"{folder}: no cluster here. Start one: slurm/dev_cluster up {folder}"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
