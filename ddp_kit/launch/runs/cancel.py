"""`ddp-kit cancel RUN [--now]`: ends a run, after a save.

A run is told by a file that its rank 0 looks for, by SLURM's scancel, or by a signal. The end is
not waited for.
"""

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence

from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.runs.found import FoundRun
from ddp_kit.launch.runs.lookup import find
from ddp_kit.launch.slurm import cluster
from ddp_kit.launch.verbs import verb

# between two signals: a second one means at once
AGAIN_S = 0.5


def cancel(run: FoundRun, *, now: bool) -> str:
    """Tells a run to end. Returns: what will happen, in words.

    Raises: LaunchError if nothing of it waits or runs, or it cannot be told from here.
    """
    living = [job for job in run.jobs() if job.is_living]
    waiting = [job.id for job in living if job.is_waiting]
    if waiting:
        cluster.ask("scancel", *waiting)
        return f"job {', '.join(waiting)} was waiting and is taken back"
    if living and all(job.state == "COMPLETING" for job in living):
        raise LaunchError(f"{run.folder}: job {living[0].id} is ending already.")
    if living and now:
        cluster.ask("scancel", *(job.id for job in living))
        return f"job {living[0].id} is ended; the newest checkpoint is kept"
    host = run.holder()
    if not living and not host:
        raise LaunchError(f"{run.folder}: nothing of it waits or runs (ddp-kit jobs).")
    if now and host != socket.gethostname():
        raise LaunchError(
            f"{run.folder}: it runs on {host}, where `--now` can be typed; "
            "without --now it ends after a save from here too."
        )
    if now:
        _end_here(run)
        return "ended; the newest checkpoint is kept"
    try:
        (run.folder / "STOP").touch()
    except OSError as error:
        raise LaunchError(
            f"{run.folder}/STOP: cannot be written ({error.strerror}). "
            "Whoever owns the run can end it."
        ) from error
    return (
        f"it stops after this step and a save: ddp-kit logs {run.quoted} -f; "
        f"at once: ddp-kit cancel {run.quoted} --now"
    )


def _end_here(run: FoundRun) -> None:
    pid = int(run.owner()["pid"])
    os.kill(pid, signal.SIGTERM)
    time.sleep(AGAIN_S)
    if run.holder():
        # a second SIGTERM so soon is taken for the echo of the first
        os.kill(pid, signal.SIGINT)


@verb("cancel")
def main(argv: Sequence[str]) -> int:
    """The command. Returns: 0, or 2 if there is nothing to end."""
    parser = argparse.ArgumentParser(
        "ddp-kit cancel", description="Ends a run, after a save.", allow_abbrev=False
    )
    parser.add_argument("run", help="its folder or a job id")
    parser.add_argument("--now", action="store_true", help="without a save")
    asked = parser.parse_args(argv)
    run = find(asked.run)
    print(f"{run.folder}: {cancel(run, now=asked.now)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
