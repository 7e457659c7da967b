"""Why a run stops before its end, and the flag by which one rank learns of it.

While a run lasts it handles SIGTERM, SIGHUP, SIGINT, SIGUSR1 and SIGUSR2 of this process. No rank
acts alone: the flag travels in the control packet and all ranks stop at the same step, or at the
same micro-batch of an evaluation. Before the first step there is nothing to agree on, and a signal
ends this rank as an exception does; a second signal leaves at once.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

from ddp_kit.distributed.control_packet import ControlPacket, Decision
from ddp_kit.distributed.topology import environment

# The exit code for "saved, please start me again", if the launcher has asked for it.
REQUEUE = 75
# Of prctl.h.
PR_SET_PDEATHSIG = 1
# SLURM sends SIGTERM twice, torchrun's agent repeats what its ranks got, and so does the shell of
# a closed terminal.
ECHO_S = 5.0


class Stop(IntEnum):
    """Why a run stops, as the packet carries it.

    Where ranks have several reasons the largest counts: a person's wish above all. A closed
    terminal (SIGHUP) is treated as SIGTERM.
    """

    NONE = 0
    MAX_HOURS = 1
    JOB_END = 2
    SIGUSR1 = 3
    SIGUSR2 = 4
    SIGHUP = 5
    SIGTERM = 6
    SIGINT = 7
    FILE = 8

    @property
    def is_preemption(self) -> bool:
        """Whether the run should come back by itself.

        A time of one's own choice ends it, unless a launcher starts it again.
        """
        if self in (Stop.SIGINT, Stop.FILE):
            return False
        return self is not Stop.MAX_HOURS or requeues()

    @property
    def exit_code(self) -> int:
        """75 for a preemption if the launcher asked for it, else 143; 130 for SIGINT.

        It is 0 for what a person asked for in advance.
        """
        if self.is_preemption:
            return REQUEUE if requeues() else 143
        return 130 if self is Stop.SIGINT else 0

    def words(self, rank: int) -> str:
        """Returns the reason in words; `rank` is the one that saw it."""
        own = {
            Stop.MAX_HOURS: "--max-hours are over",
            Stop.JOB_END: "the job's time is nearly over",
            Stop.FILE: "the file STOP",
        }
        return own.get(self, f"{self.name} on rank {rank}")


# Of an end to come: an order that follows is the first one.
WARNINGS = (Stop.SIGUSR1, Stop.SIGUSR2)
# Orders that may come twice.
ECHOED = (Stop.SIGTERM, Stop.SIGHUP)
SIGNALS = tuple(getattr(signal, stop.name) for stop in Stop if hasattr(signal, stop.name))


class Stopped(SystemExit):
    """A signal came before the first step: nothing can be lost yet, so the run unwinds and ends.

    After a warning it may be requeued; SIGTERM may also come from a launcher that has lost a rank.
    """

    def __init__(self, stop: Stop):
        is_told_apart = stop in (*WARNINGS, Stop.SIGINT)
        super().__init__(stop.exit_code if is_told_apart else 143)
        self.stop = stop

    def __str__(self) -> str:
        return f"{self.stop.name} before the first step"


class Abandoned(BaseException):
    """All ranks have agreed, in the midst of an evaluation, to stop: its sums are dropped."""

    def __init__(self, decision: Decision):
        super().__init__("the evaluation is abandoned, since the run stops")
        self.decision = decision


class StopFlag:
    """What this rank knows of a stop.

    `since` is the `time.monotonic()` of the first reason. `deferring`: it waits for a step
    boundary, or for a failure to be written down.
    """

    def __init__(self) -> None:
        self.stop = Stop.NONE
        self.since = 0.0
        self.deferring = False
        # All ranks have left the loop together: what is left is to save.
        self.is_settled = False
        # A failure is being written down.
        self.is_leaving = False
        # Called by whoever sees that a stop is not agreed upon soon.
        self.hurry: Callable[[], None] | None = None
        # Called before a second signal ends this process at once.
        self.on_second: Callable[[Stop], None] | None = None
        # The first signal that was no mere warning, and when it came.
        self._order = Stop.NONE
        self._ordered = 0.0

    def ask(self, stop: Stop) -> None:
        """Notes a reason to stop."""
        self.since = self.since or time.monotonic()
        self.stop = max(self.stop, stop)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler. Raises: Stopped, unless `deferring`."""
        stop = Stop[signal.Signals(number).name]
        now = time.monotonic()
        if self._order:
            if self._is_echo(stop, now):
                return
            on_second = self.on_second
            # Once: it may be the disk that this process waits for.
            self.on_second = None
            if on_second is not None:
                on_second(stop)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if stop not in WARNINGS:
            self._ordered = now
            self._order = stop
        self.ask(stop)
        if not self.deferring:
            raise Stopped(stop)

    def _is_echo(self, stop: Stop, now: float) -> bool:
        return stop in ECHOED and self._order in ECHOED and now - self._ordered < ECHO_S


@contextmanager
def signals_noted() -> Iterator[StopFlag]:
    """Notes signals in a StopFlag while it lasts, and puts the handlers back.

    Outside the main thread it notes none. SIGHUP stays ignored if it comes so, as `nohup` has it;
    for the others that is a launcher's doing, which keeps them from itself.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {}
    for number in SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, flag.handle)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def heeding(control_packet: ControlPacket, flag: StopFlag) -> Iterator[Callable[[], None]]:
    """Yields what an evaluation calls after each micro-batch, on every rank alike.

    Raises: Abandoned, where that is called, once all ranks agree to stop.
    """

    def heed() -> None:
        decision = control_packet.boundary(stop=flag.stop)
        if decision.stop:
            raise Abandoned(decision)

    control_packet.begin_kind("evaluation")
    try:
        yield heed
    finally:
        control_packet.begin_kind("training")


def leaves_with_agent(launcher: str) -> None:
    """Asks, on Linux, for a SIGTERM when torchrun's agent dies.

    It would leave its ranks behind: so they save and leave.
    """
    if launcher == "torchrun" and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def requeues() -> bool:
    """Whether the launcher starts a run again that was stopped and saved."""
    return environment().get("DDP_KIT_REQUEUE") == "1"


def is_restarted() -> bool:
    """Whether torchrun's agent would start the ranks again, at once, at any exit code but 0."""
    return environment().get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0")
