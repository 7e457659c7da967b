"""What asks a run to stop or to save from outside, signals apart: two files, and the clock.

Owns: a thread of rank 0 that looks once a second, so that no step waits for a slow file server.
Refuses: stopping anything: it sets the flag that the control packet carries.
"""

import contextlib
import math
import os
import threading
import time
from pathlib import Path
from typing import Protocol

from ddp_kit.distributed.topology import environment
from ddp_kit.io.process import process_start
from ddp_kit.stopping.grace_period import Grace
from ddp_kit.stopping.signals import Stop, StopFlag

POLL_S = 1.0
MARGIN_S = (
    15.0  # before a job's end, for the processes' own end and the batch script's word with SLURM
)
UNKNOWN_S = 15.0  # what a stop is taken to need before that was measured


class AsksForSaves(Protocol):
    """Whoever can be asked for a save from outside."""

    is_asked: bool

    def ask(self) -> None:
        """Asks for a save at the next boundary of all ranks."""


class Watch:
    """Looks for `STOP` and `SAVE` in a run directory, and at the times when the run has to end. Whoever makes one closes it."""

    def __init__(
        self,
        folder: Path,
        flag: StopFlag,
        *,
        checkpoints: AsksForSaves,
        grace: Grace,
        end: float = math.inf,
    ):
        """Args: `checkpoints` are asked for a save, `grace` for what a stop needs; `end`: when --max-hours are over, by
        `time.monotonic()`."""
        self._folder, self._flag, self._checkpoints, self._grace, self._end = (
            folder,
            flag,
            checkpoints,
            grace,
            end,
        )
        self._job_end = _job_end()
        self._is_saving = False
        self._over = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def saved(self) -> bool:
        """Takes word of a committed save. Returns whether somebody had asked for it; the file is removed then."""
        if not self._is_saving or self._checkpoints.is_asked:  # it was begun before somebody asked
            return False
        is_there, self._is_saving = self.take("SAVE"), False
        return is_there

    def take(self, name: str) -> bool:
        """Removes a file that was acted upon. Returns whether it was there."""
        try:
            (self._folder / name).unlink()
        except OSError:  # gone, or out of reach: no reason to end a run
            return False
        return True

    def close(self) -> None:
        """Ends the thread, unless a file server keeps it."""
        self._over.set()
        self._thread.join(timeout=POLL_S)

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        names = set()
        with contextlib.suppress(
            OSError
        ):  # a file server that is away for a while; the next look tries again
            names = {name for name in ("STOP", "SAVE") if (self._folder / name).exists()}
        if "STOP" in names:
            self._flag.ask(Stop.FILE)
        if "SAVE" in names and not self._is_saving:
            self._checkpoints.ask()
            self._is_saving = True
        if time.monotonic() >= self._end:
            self._flag.ask(Stop.MAX_HOURS)
        if time.time() >= self._job_end - MARGIN_S - (self._grace.needs_s or UNKNOWN_S):
            self._flag.ask(Stop.JOB_END)


def _job_end() -> float:
    """When SLURM ends this job, in Unix seconds. A time that has passed is another job's, whose variables were inherited."""
    text = environment().get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() and float(text) > time.time() else math.inf


def process_age_s() -> float:
    """Returns how long this process has lived, 0 where the system does not tell."""
    start = process_start(os.getpid())
    if not start.isdigit() or not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(start) / os.sysconf("SC_CLK_TCK"))
