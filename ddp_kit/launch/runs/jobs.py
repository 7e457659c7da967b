"""`ddp-kit jobs`: a line for each run of mine that waits, runs or has ended here."""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_kit.io.json_lines import whole
from ddp_kit.io.tables import aligned, printable
from ddp_kit.launch.environment import has_slurm
from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.runs.found import FoundRun, is_of
from ddp_kit.launch.runs.lookup import runs_in, runs_of
from ddp_kit.launch.slurm import cluster
from ddp_kit.launch.verbs import verb

COLUMNS = ("run", "job", "state", "lives", "step", "loss", "saved", "why")
# characters of the last column that are always shown
SHORTEST = 20


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
    step = max(whole(status.get("step")), whole(train.get("step")))
    name = run.folder.name
    if run.folder.parent.name != "runs":
        name = f"{run.folder.parent.name}/{name}"
    loss = "-"
    if isinstance(train.get("loss"), float):
        loss = f"{train['loss']:.4g}"
    saved = "-"
    if run.newest_checkpoint() >= 0:
        saved = f"step {run.newest_checkpoint()}"
    attempts = len(run.events("start", "resume"))
    cells = (name, number, state, str(attempts), str(step), loss, saved, why)
    return tuple(printable(cell) for cell in cells)


def _state(run: FoundRun, status: Mapping[str, Any], job: cluster.Job | None) -> tuple[str, str]:
    """What the run is doing, and why it is not doing more.

    That is SLURM's word while it has the job, then the run's own.
    """
    if job is not None and job.is_waiting:
        reason = job.reason
        if reason == "None":
            reason = "SLURM has not looked at it yet"
        return "waiting", reason
    if job is not None and job.is_living:
        return job.state.lower(), ""
    own = str(status.get("status", ""))
    if own == "running" and not run.holder():
        why = "no process has it any more"
        if job is not None:
            why += f"; SLURM says {job.state.lower()}"
        return "gone", why
    if own:
        reasons = str(status.get("reason", "")).splitlines()
        return own, next(iter(reasons), "")
    if job is not None:
        return job.state.lower(), "it never began: ddp-kit logs tells"
    return "unknown", "it never began"


def table(lines: Sequence[Sequence[str]], *, width: int) -> str:
    """Returns the rows under their heads; the last column is cut where the terminal ends."""
    return "\n".join(aligned([COLUMNS, *lines], width=width, shortest=SHORTEST))


@verb("jobs")
def main(argv: Sequence[str]) -> int:
    """The command. Returns: 0."""
    asked = _parser().parse_args(argv)
    jobs: dict[str, cluster.Job] = {}
    try:
        if has_slurm():
            jobs = {job.id: job for job in cluster.jobs()}
    except LaunchError as error:
        print(f"{error}\nWithout its answer, as the run directories have it:", file=sys.stderr)
    found = {run.folder: run for run in runs_in(Path(asked.folder))}
    # those of other folders
    for job in jobs.values():
        if job.folder and job.is_living:
            found |= {run.folder: run for run in runs_of(Path(job.folder))}
    shown = list(found.values())
    if asked.hours:
        since = time.time() - 3600 * asked.hours
        shown = [run for run in shown if run.changed >= since]
    if not shown:
        print(f"no runs in {asked.folder}")
        return 0
    # a pipe or a file has no end
    width = sys.maxsize
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    print(table(rows(shown, jobs), width=width))
    return 0


def _parser() -> argparse.ArgumentParser:
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
