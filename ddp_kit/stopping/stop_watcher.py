"""What asks a run to stop or to save from outside, signals apart: two files, and the clock.

A thread of rank 0 looks once a second, so that no step waits for a slow file server. It stops
nothing itself: it sets the flag that the control packet carries.
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
from ddp_kit.stopping.grace_period import GracePeriod
from ddp_kit.stopping.signals import Stop, StopFlag

POLL_S = 1.0
# Before a job's end, for the processes' own end and the batch script's word with SLURM.
MARGIN_S = 15.0
# What a stop is taken to need before that was measured.
UNKNOWN_S = 15.0


class AsksForSaves(Protocol):
    """Whoever can be asked for a save from outside."""

    is_asked: bool

    def ask(self) -> None:
        """Asks for a save at the next boundary of all ranks."""


class StopWatcher:
    """Looks for `STOP` and `SAVE` in a run directory, and at the times when the run has to end.

    Whoever makes one closes it.
    """

    def __init__(
        self,
        folder: Path,
        flag: StopFlag,
        *,
        checkpoints: AsksForSaves,
        grace_period: GracePeriod,
        end: float = math.inf,
    ):
        """Args: `checkpoints` are asked for a save, `grace` for what a stop needs; `end`: when
        --max-hours are over, by `time.monotonic()`."""
        self._folder = folder
        self._flag = flag
        self._checkpoints = checkpoints
        self._grace_period = grace_period
        self._end = end
        self._job_end = _job_end()
        self._is_saving = False
        self._over = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def saved(self) -> bool:
        """Takes word of a committed save.

        Returns: whether somebody had asked for it; the file is removed then.
        """
        # A save that was begun before somebody asked is not the one that was asked for.
        if not self._is_saving or self._checkpoints.is_asked:
            return False
        was_there = self.take("SAVE")
        self._is_saving = False
        return was_there

    def take(self, name: str) -> bool:
        """Removes a file that was acted upon. Returns: whether it was there."""
        try:
            (self._folder / name).unlink()
        except OSError:
            # Gone, or out of reach: no reason to end a run.
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
        if self._flag.stop and self._flag.hurry is not None:
            # It was there a second ago: steps have become slow since the last packet.
            self._flag.hurry()
        names = set()
        # A file server may be away for a while; the next look tries again.
        with contextlib.suppress(OSError):
            names = {name for name in ("STOP", "SAVE") if (self._folder / name).exists()}
        if "STOP" in names:
            self._flag.ask(Stop.FILE)
        if "SAVE" in names and not self._is_saving:
            self._checkpoints.ask()
            self._is_saving = True
        if time.monotonic() >= self._end:
            self._flag.ask(Stop.MAX_HOURS)
        needs_s = self._grace_period.needs_s or UNKNOWN_S
        if time.time() >= self._job_end - MARGIN_S - needs_s:
            self._flag.ask(Stop.JOB_END)


def _job_end() -> float:
    """When SLURM ends this job, in Unix seconds.

    A time that has passed is another job's, whose variables were inherited.
    """
    text = environment().get("SLURM_JOB_END_TIME", "")
    if text.isdigit() and float(text) > time.time():
        return float(text)
    return math.inf


def process_age_s() -> float:
    """Returns how long this process has lived, in seconds; 0 where the system does not tell."""
    start = process_start(os.getpid())
    if not start.isdigit() or not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    started_s = int(start) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
