"""Finding runs: by folder, by the name of a folder in runs/, or by a job's id."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ddp_kit.io.json_lines import whole
from ddp_kit.launch.environment import has_slurm
from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.runs.found import FoundRun, is_of
from ddp_kit.launch.slurm import cluster

# files of which a run directory has at least one
MARKS = ("status.json", "settings.json", "launch/plan.json")


def find(name: str) -> FoundRun:
    """Returns a run by its folder, the name of a folder in runs/, or a job id.

    Of several runs with a job of that number it is the one whose job SLURM has; if it has none of
    them any more, the newest. Raises: LaunchError that names those there are, or the runs of a
    sweep of that name.
    """
    places = (Path(name), Path("runs") / name)
    for path in places:
        if any((path / mark).exists() for mark in MARKS):
            return FoundRun(path.absolute())
    here = list(runs_in(Path("runs")))
    if name.replace("_", "").isdigit():
        run = _of_job(name, here=here)
        if run is not None:
            return run
    for path in places:
        if (path / "sweep.json").exists():
            _refuse_sweep(name, runs_of(path.absolute()))
    advice = "Type the folder that --run-dir named."
    if here:
        advice = f"Newest in runs/: {', '.join(run.folder.name for run in here[-5:])}."
    raise LaunchError(f"{name}: no run directory and no job of a run. {advice}")


def _of_job(number: str, *, here: Sequence[FoundRun]) -> FoundRun | None:
    """Returns the run of a job among those that are here and those that SLURM knows.

    Raises: LaunchError if the number is that of a sweep's array.
    """
    jobs: list[cluster.Job] = []
    if has_slurm():
        jobs = [job for job in cluster.jobs(ids=[number]) if job.folder]
    known = list(here)
    for folder in dict.fromkeys(job.folder for job in jobs):
        known += runs_of(Path(folder))
    found = []
    for run in known:
        own = [submission for submission in run.submissions() if str(submission["job"]) == number]
        found += [(submission, run) for submission in own]
    for submission, run in found:
        if any(is_of(job, submission) for job in jobs):
            return run
    if found:
        return max(found, key=lambda pair: _time_of(pair[0]))[1]
    points = [run for run in known if number in _arrays_of(run)]
    if points:
        _refuse_sweep(number, points)
    return None


def _time_of(submission: Mapping[str, Any]) -> float:
    when = submission.get("time")
    return when if isinstance(when, float) else float(whole(when))


def _arrays_of(run: FoundRun) -> set[str]:
    """The numbers of a run's jobs, without those of an array's elements."""
    return {str(submission["job"]).partition("_")[0] for submission in run.submissions()}


def _refuse_sweep(name: str, points: Sequence[FoundRun]) -> NoReturn:
    """Raises: LaunchError that names a sweep's runs, and the array by which all of them end."""
    jobs = set()
    for run in points:
        for submission in run.submissions()[-1:]:
            jobs.add(str(submission["job"]))
    names = ", ".join(sorted(jobs, key=_numbers_in)) or f"see ddp-kit jobs {shlex.quote(name)}"
    text = f"{name}: a sweep; name one of its runs, by its folder or job: {names}."
    arrays = sorted({job.partition("_")[0] for job in jobs if "_" in job})
    if arrays:
        text += f" To end all of them: scancel {' '.join(arrays)}"
    raise LaunchError(text)


def _numbers_in(job: str) -> list[int]:
    return [int(part) for part in job.split("_") if part.isdigit()]


def runs_in(folder: Path) -> Iterator[FoundRun]:
    """Yields the runs in a folder, those of its sweeps too, oldest first."""
    homes = set()
    for run in ("*", "*/*"):
        homes |= {path.parent for path in folder.glob(f"{run}/settings.json")}
        homes |= {path.parents[1] for path in folder.glob(f"{run}/launch/plan.json")}
    for home in sorted(homes, key=lambda path: path.stat().st_ctime):
        yield FoundRun(home.absolute())


def runs_of(home: Path) -> list[FoundRun]:
    """Returns the runs of a job by the folder that its comment names: the one, or a sweep's."""
    if (home / "launch" / "plan.json").exists():
        return [FoundRun(home)]
    return [FoundRun(path.parents[1]) for path in home.glob("*/launch/plan.json")]
