"""A run as its directory shows it, to those who started it: jobs, status, newest record.

The files of its contract are read, and never changed.
"""

import json
import shlex
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_kit.io.json_lines import NOT_JSON, whole
from ddp_kit.io.process import process_start
from ddp_kit.launch.environment import has_slurm
from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.slurm import cluster

# a run's lock without a beat: its holder is gone
STALE_S = 60.0
# bytes of metrics.jsonl in which the newest records are
TAIL = 65536
# files whose change is a sign of life
SIGNS = ("status.json", "metrics.jsonl", "launch/jobs.jsonl")


@dataclass(frozen=True)
class FoundRun:
    """A run directory."""

    folder: Path

    @property
    def quoted(self) -> str:
        """The folder as one types it."""
        return shlex.quote(str(self.folder))

    @property
    def status(self) -> Mapping[str, Any]:
        """What status.json holds, {} without one."""
        return _json(self.folder / "status.json")

    def submissions(self) -> list[Mapping[str, Any]]:
        """Returns the jobs it was submitted as, oldest first.

        They are {"job", "time", "folder" of submitit's files, "cluster" if it is known}.
        """
        found = _lines(self.folder / "launch" / "jobs.jsonl")
        return [submission for submission in found if {"job", "folder"} <= submission.keys()]

    def jobs(self) -> list[cluster.Job]:
        """Returns those of its jobs that SLURM still knows of, oldest first.

        Raises: LaunchError if SLURM does not answer.
        """
        submissions = self.submissions()
        if not submissions or not has_slurm():
            return []
        found = cluster.jobs(ids=[str(submission["job"]) for submission in submissions])
        return [job for job in found if any(is_of(job, submission) for submission in submissions)]

    def without_bad_nodes(self, excluded: str) -> str:
        """Returns a list of nodes to leave out, as it was typed, and with those of `bad_nodes`.

        These have failed a node check of the run.
        """
        path = self.folder / "bad_nodes"
        # with a / it names a file, to which nothing can be added
        if not path.exists() or "/" in excluded:
            return excluded
        named = set(cluster.hosts(excluded))
        bad = dict.fromkeys(path.read_text(encoding="utf-8").split())
        added = [name for name in bad if name not in named]
        if excluded:
            added.insert(0, excluded)
        return ",".join(added)

    def owner(self) -> Mapping[str, Any]:
        """Returns who holds the run's lock: {"host", "pid", "job" ("17@cluster"), ...}, or {}."""
        return _json(self.folder / "run.lock")

    def holder(self) -> str:
        """Returns the host on which a process holds the run's lock, "" if none does.

        The rule is that of `ddp_kit.lifecycle.run_dir`: here it is that very process, not a later
        one of its number; of another host one that keeps the lock fresh.
        """
        owner = self.owner()
        host = str(owner.get("host", ""))
        if host == socket.gethostname():
            start = process_start(whole(owner.get("pid")))
            is_held = start != "" and start == owner.get("start")
        else:
            is_held = self._is_lock_fresh()
        return host if is_held else ""

    def _is_lock_fresh(self) -> bool:
        try:
            beat = (self.folder / "run.lock").stat().st_mtime
        except OSError:
            return False
        return time.time() - beat < STALE_S

    def is_over(self) -> bool:
        """Whether no job of it waits or runs, and no process has it."""
        return not self.holder() and not any(job.is_living for job in self.jobs())

    def require_free(self) -> None:
        """Raises: LaunchError if a job that waits or runs, or a live process, has the run."""
        by = self._taken_by()
        if by:
            raise LaunchError(
                f"{self.folder}: {by} Type another --run-dir, or: ddp-kit cancel {self.quoted}"
            )

    def _taken_by(self) -> str:
        """Says who has the run, "" if nobody does."""
        for job in self.jobs():
            if job.is_living:
                return f"job {job.id} ({job.state.lower()}) has it."
        host = self.holder()
        if not host:
            return ""
        said = f"a live run on {host} has it."
        if host != socket.gethostname():
            said += f" If it was killed there, its lock is void after {STALE_S:g} s."
        return said

    @property
    def changed(self) -> float:
        """When it last did something, in seconds of the epoch."""
        paths = [self.folder / name for name in SIGNS]
        return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)

    def newest(self, name: str) -> Mapping[str, Any]:
        """Returns the newest of metrics.jsonl's records that holds a value of that name, or {}."""
        records = list(_lines(self.folder / "metrics.jsonl", tail=TAIL))
        return next((record for record in reversed(records) if name in record), {})

    def events(self, *names: str) -> list[Mapping[str, Any]]:
        """Returns its events of those names, oldest first."""
        events = _lines(self.folder / "events.jsonl")
        return [event for event in events if event.get("event") in names]

    def newest_checkpoint(self) -> int:
        """Returns the step of its newest checkpoint, -1 without one."""
        manifests = (self.folder / "checkpoints").glob("step-*/manifest.json")
        steps = [path.parent.name.removeprefix("step-") for path in manifests]
        return max((int(step) for step in steps if step.isdecimal()), default=-1)


def is_of(job: cluster.Job, submission: Mapping[str, Any]) -> bool:
    """Whether a job is the one that a submission has made.

    Its number alone says little: other clusters count too, and counts begin anew. Its comment
    names the run, or the sweep, whose submission wrote it. The cluster counts where the submission
    has noted it down.
    """
    home = Path(str(submission["folder"])).parent
    if job.id != str(submission["job"]) or job.folder != str(home):
        return False
    return submission.get("cluster", "") in ("", job.cluster)


def _json(path: Path) -> Mapping[str, Any]:
    """The JSON object that a file holds, {} if it is torn or not there."""
    return next(_objects([_text(path)]), {})


def _lines(path: Path, *, tail: int = 0) -> Iterator[Mapping[str, Any]]:
    """The JSON objects of a file's lines, with `tail` of its last bytes.

    What is torn or not there yields nothing.
    """
    return _objects(_text(path, tail=tail).splitlines())


def _text(path: Path, *, tail: int = 0) -> str:
    try:
        with path.open("rb") as file:
            if tail:
                file.seek(max(0, path.stat().st_size - tail))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _objects(texts: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for text in texts:
        try:
            value = json.loads(text)
        except NOT_JSON:
            continue
        if isinstance(value, dict):
            yield value
