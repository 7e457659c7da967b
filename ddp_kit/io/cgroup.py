"""What the kernel counts of this process's cgroup: who was killed for memory, and the limits.

A process that the kernel kills for memory leaves no word, and to its peers looks like any other
that was killed. The counter of its cgroup tells the two apart. Under SLURM all cgroups of the job
on this node count, since a task may have one of its own there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
MIB = 2**20
# A limit above this is none: version 1 writes the largest multiple of a page there is.
NO_LIMIT = 2**60
# What torch says of a loader worker that has died.
WORKER_DEATHS = ("is killed by signal: Killed", ") exited unexpectedly")
JOB = re.compile(r"job_\d+")
# By version of cgroups: the file with `oom_kill N`, the limit, the most that was used.
FILES = {
    1: ("memory.oom_control", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    2: ("memory.events", "memory.max", "memory.peak"),
}


@dataclass(frozen=True, kw_only=True)
class Cgroup:
    """A controller's cgroup of this process: its folder, and the path as the kernel calls it."""

    version: int
    folder: Path
    path: str

    def number(self, name: str) -> int | None:
        """Returns the number in a file of it; None if there is none, or it says `max`."""
        text = _text(self.folder / name).strip()
        return int(text) if text.isdigit() else None


def own_cgroup(controller: str, *, root: Path = Path("/")) -> Cgroup | None:
    """Returns this process's cgroup of a controller, None where it cannot be found.

    Args: `root` the folder that stands for `/`.
    """
    paths = _paths(_text(root / "proc/self/cgroup"))
    for kind, options, within, mount in _mounts(_text(root / "proc/self/mountinfo")):
        if kind == "cgroup" and controller in options.split(","):
            version = 1
            path = paths.get(controller)
        elif kind == "cgroup2":
            version = 2
            path = paths.get("")
        else:
            continue
        if path is None:
            continue
        folder = _folder(root / mount.lstrip("/"), path, within=within)
        if version == 1 or controller in _text(folder / "cgroup.controllers").split():
            return Cgroup(version=version, folder=folder, path=path)
    return None


def _paths(text: str) -> dict[str, str]:
    """Returns the cgroup of each controller of version 1, and under "" that of version 2."""
    found = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            found[controller] = path
    return found


def _mounts(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Yields (kind, options, which part of it, where) of the mounts of cgroups."""
    for line in text.splitlines():
        place, _, kind = line.partition(" - ")
        words = place.split()
        kinds = kind.split()
        if len(words) > 4 and len(kinds) > 2 and kinds[0].startswith("cgroup"):
            yield kinds[0], kinds[2], words[3], words[4]


def _folder(mount: Path, path: str, *, within: str) -> Path:
    """Returns where a cgroup is mounted; a container may see a part of the tree as its root."""
    if within != "/" and path.startswith(within):
        path = path[len(within) :]
    folder = mount / path.lstrip("/")
    return folder if folder.is_dir() else mount


class MemoryKills:
    """Counts the processes that the kernel has killed for memory here since it was made."""

    def __init__(self, *, root: Path = Path("/")):
        """Args: `root` the folder that stands for `/`."""
        self._cgroup = own_cgroup("memory", root=root)
        self._before = self._count()

    def words(self) -> str:
        """Returns that the kernel has killed for memory, with its numbers; "" if it has not."""
        killed = self._count() - self._before
        if self._cgroup is None or killed <= 0:
            return ""
        facts = []
        limit = self._limit()
        if limit is not None:
            facts.append(f"{gib(limit)} limit")
        peak = self._cgroup.number(FILES[self._cgroup.version][2])
        if peak is not None:
            facts.append(f"{gib(peak)} at the peak")
        facts.append(f"{killed} oom_kill")
        return f"out of memory (cgroup {self._cgroup.path}: {', '.join(facts)})"

    def of_worker(self, message: str) -> str:
        """Adds to what torch says of a loader worker's death that the kernel did it, if it did."""
        why = ""
        if any(words in message for words in WORKER_DEATHS):
            why = self.words()
        return f"{message}; killed by the kernel: {why}" if why else message

    def _count(self) -> int:
        if self._cgroup is None:
            return 0
        name = FILES[self._cgroup.version][0]
        folder = _job_folder(self._cgroup.folder)
        if folder is None:
            return _kills(self._cgroup.folder / name)
        # Version 2 counts a kill in every cgroup above it, version 1 in the process's own alone.
        if self._cgroup.version == 2:
            return _kills(folder / name)
        return sum(_kills(path) for path in folder.rglob(name))

    def _limit(self) -> int | None:
        """The smallest limit of the cgroup and of those above it."""
        assert self._cgroup is not None
        name = FILES[self._cgroup.version][1]
        limits = []
        folder = self._cgroup.folder
        while (folder / name).exists():
            text = _text(folder / name).strip()
            if text.isdigit() and int(text) < NO_LIMIT:
                limits.append(int(text))
            folder = folder.parent
        return min(limits, default=None)


def _job_folder(folder: Path) -> Path | None:
    """Returns the cgroup of the SLURM job that a cgroup is in, None if it is in none."""
    for above in (folder, *folder.parents):
        if JOB.fullmatch(above.name):
            return above
    return None


def _kills(path: Path) -> int:
    for line in _text(path).splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill" and count.isdigit():
            return int(count)
    return 0


def gib(size: int) -> str:
    """Returns a size in words, in GiB or MiB."""
    if size >= GIB:
        return f"{size / GIB:.1f} GiB"
    return f"{size / MIB:.0f} MiB"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
