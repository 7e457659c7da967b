"""A run as its directory shows it, to those who started it: its jobs, its status, its newest record.

Owns: finding a run by folder or job id, and reading the files of its contract. Refuses: changing them.
"""

import json
import shlex
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ddp_kit.launch.slurm import cluster
from ddp_kit.launch.environment import has_slurm
from ddp_kit.launch.plan import LaunchError

STALE_S = 60.0  # a run's lock without a beat: its holder is gone
TAIL = 65536  # bytes of metrics.jsonl in which the newest records are


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
        """Returns the jobs it was submitted as, oldest first: {"job", "time", "folder" of submitit's files, "cluster" if it is known}."""
        return list(_lines(self.folder / "launch" / "jobs.jsonl"))

    def jobs(self) -> list[cluster.Job]:
        """Returns those of its jobs that SLURM still knows of, oldest first."""
        submissions = self.submissions()
        if not submissions or not has_slurm():
            return []
        found = cluster.jobs(ids=[str(submission["job"]) for submission in submissions])
        return [job for job in found if any(is_of(job, submission) for submission in submissions)]

    def without_bad_nodes(self, excluded: str) -> str:
        """Returns a list of nodes to leave out, as it was typed, with those added that failed the run's pre-flight check."""
        path = self.folder / "bad_nodes"
        bad = (
            path.read_text(encoding="utf-8").split()
            if path.exists() and "/" not in excluded
            else []
        )  # with a / it names a file
        named = set(cluster.hosts(excluded))
        return ",".join(
            [
                *([excluded] if excluded else []),
                *(name for name in dict.fromkeys(bad) if name not in named),
            ]
        )

    def owner(self) -> Mapping[str, Any]:
        """Returns who holds the run's lock, {} if nobody does: {"host", "pid", "job" ("17@cluster"), ...}."""
        return _json(self.folder / "run.lock")

    def holder(self) -> str:
        """Returns the host on which a process holds the run's lock, "" if none does, by the rule of `ddp_kit.lifecycle.run_dir`.

        Here it is that very process, not a later one of its number; of another host one that keeps the lock fresh.
        """
        owner = self.owner()
        host = str(owner.get("host", ""))
        if host == socket.gethostname():
            return host if _start_of(owner.get("pid")) == owner.get("start") else ""
        try:
            age_s = time.time() - (self.folder / "run.lock").stat().st_mtime
        except OSError:
            return ""
        return host if age_s < STALE_S else ""

    def is_over(self) -> bool:
        """Whether no job of it waits or runs, and no process has it."""
        return not self.holder() and not any(job.is_living for job in self.jobs())

    def require_free(self) -> None:
        """Raises: LaunchError if a job that waits or runs, or a live process, has the run."""
        living = [
            f"job {job.id} ({job.state.lower()}) has it." for job in self.jobs() if job.is_living
        ]
        if not living and (host := self.holder()):
            stale = (
                ""
                if host == socket.gethostname()
                else f" If it was killed there, its lock is void after {STALE_S:g} s."
            )
            living = [f"a live run on {host} has it.{stale}"]
        if living:
            raise LaunchError(
                f"{self.folder}: {living[0]} Type another --run-dir, or: ddp-kit cancel {self.quoted}"
            )

    @property
    def changed(self) -> float:
        """When it last did something, in seconds of the epoch."""
        names = ("status.json", "metrics.jsonl", "launch/jobs.jsonl")
        return max(
            (
                path.stat().st_mtime
                for path in (self.folder / name for name in names)
                if path.exists()
            ),
            default=0.0,
        )

    def newest(self, name: str) -> Mapping[str, Any]:
        """Returns the newest of metrics.jsonl's records that holds a value of that name, {} without one."""
        path = self.folder / "metrics.jsonl"
        return next(
            (record for record in reversed(list(_lines(path, tail=TAIL))) if name in record), {}
        )

    def events(self, *names: str) -> list[Mapping[str, Any]]:
        """Returns its events of those names, oldest first."""
        return [
            event for event in _lines(self.folder / "events.jsonl") if event.get("event") in names
        ]

    def newest_checkpoint(self) -> int:
        """Returns the step of its newest checkpoint, -1 without one."""
        manifests = (self.folder / "checkpoints").glob("step-*/manifest.json")
        steps = [path.parent.name.removeprefix("step-") for path in manifests]
        return max((int(step) for step in steps if step.isdigit()), default=-1)


def is_of(job: cluster.Job, submission: Mapping[str, Any]) -> bool:
    """Whether a job is the one that a submission has made. Its number alone says little: other clusters count too, and counts begin anew.

    Its comment names the run, or the sweep, whose submission wrote it. The cluster counts where the submission has noted it down.
    """
    if job.id != str(submission["job"]) or job.folder != str(
        Path(str(submission["folder"])).parent
    ):
        return False
    return submission.get("cluster", "") in ("", job.cluster)


def find(name: str) -> FoundRun:
    """Returns a run by its folder, the name of a folder in runs/, or a job id. Raises: LaunchError that names those there are.

    Of several runs with a job of that number it is the one whose job SLURM has; if it has none of them any more, the newest.
    """
    for path in (Path(name), Path("runs") / name):
        if _is_run(path):
            return FoundRun(path.absolute())
    here = list(runs_in(Path("runs")))
    if name.replace("_", "").isdigit():
        known_to_slurm = (
            [job for job in cluster.jobs(ids=[name]) if job.folder] if has_slurm() else []
        )
        folders = dict.fromkeys(job.folder for job in known_to_slurm)
        known = [*here, *(run for folder in folders for run in runs_of(Path(folder)))]
        if found := [
            (submission, run)
            for run in known
            for submission in run.submissions()
            if str(submission["job"]) == name
        ]:
            for submission, run in found:
                if any(is_of(job, submission) for job in known_to_slurm):
                    return run
            return max(found, key=lambda pair: float(pair[0].get("time", 0)))[1]
        if points := [
            run
            for run in known
            if name
            in {str(submission["job"]).partition("_")[0] for submission in run.submissions()}
        ]:
            _refuse_sweep(name, points)
    for path in (Path(name), Path("runs") / name):
        if (path / "sweep.json").exists():
            _refuse_sweep(name, runs_of(path.absolute()))
    near = ", ".join(run.folder.name for run in here[-5:])
    raise LaunchError(
        f"{name}: no run directory and no job of a run. "
        + (f"Newest in runs/: {near}." if near else "Type the folder that --run-dir named.")
    )


def _refuse_sweep(name: str, points: Sequence[FoundRun]) -> NoReturn:
    """Raises: LaunchError that names a sweep's runs, and the array by which all of them end."""
    jobs = {str(submission["job"]) for run in points for submission in run.submissions()[-1:]}
    arrays = sorted({job.partition("_")[0] for job in jobs if "_" in job})
    names = ", ".join(
        sorted(jobs, key=lambda job: [int(part) for part in job.split("_") if part.isdigit()])
    )
    raise LaunchError(
        f"{name}: a sweep; name one of its runs, by its folder or job: {names or 'see ddp-kit jobs ' + shlex.quote(name)}."
        + (f" To end all of them: scancel {' '.join(arrays)}" if arrays else "")
    )


def runs_in(folder: Path) -> Iterator[FoundRun]:
    """Yields the runs in a folder, those of its sweeps too, oldest first."""
    homes = {
        path.parent
        for pattern in ("*/settings.json", "*/*/settings.json")
        for path in folder.glob(pattern)
    }
    homes |= {
        path.parents[1]
        for pattern in ("*/launch/plan.json", "*/*/launch/plan.json")
        for path in folder.glob(pattern)
    }
    for home in sorted(homes, key=lambda path: path.stat().st_ctime):
        yield FoundRun(home.absolute())


def runs_of(home: Path) -> list[FoundRun]:
    """Returns the runs of a job by the folder that its comment names: the one, or those of a sweep."""
    if (home / "launch" / "plan.json").exists():
        return [FoundRun(home)]
    return [FoundRun(path.parents[1]) for path in home.glob("*/launch/plan.json")]


def _is_run(path: Path) -> bool:
    return any(
        (path / name).exists() for name in ("status.json", "settings.json", "launch/plan.json")
    )


def _start_of(pid: object) -> str | None:
    """When a process started, as its lock has it; None if there is no such process."""
    try:
        return (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()[19]
        )
    except OSError:
        return None


def _json(path: Path) -> Mapping[str, Any]:
    return next(_lines(path, whole=True), {})


def _lines(path: Path, *, tail: int = 0, whole: bool = False) -> Iterator[Mapping[str, Any]]:
    """The JSON objects of a file's lines, or of its `whole`; what is torn or not there yields nothing."""
    try:
        with path.open("rb") as file:
            if tail:
                file.seek(max(0, path.stat().st_size - tail))
            text = file.read().decode(errors="replace")
    except OSError:
        return
    for line in [text] if whole else text.splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            yield value
