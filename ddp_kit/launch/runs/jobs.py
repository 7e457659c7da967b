"""`ddp-kit jobs`: a line for each run of mine that waits, runs or has ended here.

Owns: what is worth a column. Refuses: changing anything.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_kit.launch.slurm import cluster
from ddp_kit.launch.environment import has_slurm
from ddp_kit.launch.plan import LaunchError, answered
from ddp_kit.launch.runs.found import FoundRun, is_of, runs_in, runs_of

COLUMNS = ("run", "job", "state", "lives", "step", "loss", "saved", "why")
SHORTEST = 20  # characters of the last column that are always shown


def rows(runs: Sequence[FoundRun], jobs: Mapping[str, cluster.Job]) -> list[tuple[str, ...]]:
    """Returns a row of texts for each run; `jobs` are SLURM's, by id."""
    return [_row(run, jobs) for run in runs]


def _row(run: FoundRun, jobs: Mapping[str, cluster.Job]) -> tuple[str, ...]:
    last: Mapping[str, Any] = next(reversed(run.submissions()), {})
    number = str(last.get("job", "-"))
    job = jobs.get(number)
    if job is not None and not is_of(job, last):
        job = None
    status = run.status
    state, why = _state(run, status, job)
    train = run.newest("loss")
    step = max(int(status.get("step") or 0), int(train.get("step", 0)))
    saved = run.newest_checkpoint()
    lives = len(run.events("start", "resume"))
    loss = train.get("loss")
    shown = (
        run.folder.name
        if run.folder.parent.name == "runs"
        else f"{run.folder.parent.name}/{run.folder.name}",
        number,
        state,
        str(lives),
        str(step),
        f"{loss:.4g}" if isinstance(loss, float) else "-",
        f"step {saved}" if saved >= 0 else "-",
    )
    return (*shown, why)


def _state(run: FoundRun, status: Mapping[str, Any], job: cluster.Job | None) -> tuple[str, str]:
    """What the run is doing, and why it is not doing more: SLURM's word while it has the job, then the run's own."""
    own, reason = str(status.get("status", "")), str(status.get("reason", "")).splitlines()
    if job is not None and job.is_waiting:
        return "waiting", job.reason if job.reason != "None" else "SLURM has not looked at it yet"
    if job is not None and job.is_living:
        return job.state.lower(), ""
    if own == "running" and not run.holder():
        return (
            "gone",
            f"no process has it any more; SLURM says {job.state.lower()}"
            if job
            else "no process has it any more",
        )
    if own:
        return own, reason[0] if reason else ""
    return (
        (job.state.lower(), "it never began: ddp-kit logs tells")
        if job
        else ("unknown", "it never began")
    )


def table(lines: Sequence[Sequence[str]], *, width: int) -> str:
    """Returns the rows under their heads; the last column is cut where the terminal ends."""
    everything = [COLUMNS, *lines]
    widths = [max(len(line[column]) for line in everything) for column in range(len(COLUMNS) - 1)]
    left = max(width - sum(widths) - 2 * len(widths), SHORTEST)
    shown = (
        "  ".join(
            [*(cell.ljust(size) for cell, size in zip(line, widths, strict=False)), line[-1][:left]]
        )
        for line in everything
    )
    return "\n".join(line.rstrip() for line in shown)


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "ddp-kit jobs",
        description="My runs: those in a folder and those that SLURM has.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", nargs="?", default="runs", help="where the runs are (default: runs)"
    )
    parser.add_argument(
        "--hours", type=float, default=0, help="only runs that did something in that time; 0: all"
    )
    asked = parser.parse_args(argv)
    jobs: dict[str, cluster.Job] = {}
    try:
        jobs = {job.id: job for job in cluster.jobs()} if has_slurm() else {}
    except LaunchError as error:
        print(f"{error}\nWithout its answer, as the run directories have it:", file=sys.stderr)
    found = {run.folder: run for run in runs_in(Path(asked.folder))}
    for job in jobs.values():  # of other folders
        if job.folder and job.is_living:
            found |= {run.folder: run for run in runs_of(Path(job.folder))}
    since = time.time() - 3600 * asked.hours if asked.hours else 0
    shown = [run for run in found.values() if run.changed >= since]
    width = (
        shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    )  # a pipe or a file has no end
    print(table(rows(shown, jobs), width=width) if shown else f"no runs in {asked.folder}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns: 0."""
    return answered("jobs", _main, argv)


if __name__ == "__main__":
    sys.exit(main())
