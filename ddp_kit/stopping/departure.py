"""Leaving where the main thread does not: it sits in C code, or no step ends any more.

Python's handlers of signals run in the main thread, between two bytecodes. A thread hears of a
signal at once, from the interpreter's own handler in C, which writes its number into a pipe. It
gives the main thread the time that there is, and then ends this process.

It cannot run where C code holds the interpreter's lock: there the launcher ends the rank.
"""

import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ddp_kit.distributed.launcher_pipes import answer_guard
from ddp_kit.distributed.topology import environment
from ddp_kit.io.logs import without_secrets
from ddp_kit.stopping.signals import ECHO_S, ECHOED, Stop, StopFlag

PATIENCE_S = 60.0  # without a step's end, where nobody has said how long the grace period is
ORPHANED_S = 10.0  # the same, for a rank whose launcher has gone
EARLY_S = 5.0  # before the first step there is nothing to save
LEAVING_S = 30.0  # to write down a failure, and to tell the peers
SAVING_S = 600.0  # once all ranks have agreed to stop, or have come to the end
AT_ONCE_S = 2.0  # after a second signal
LAST_WORDS_S = 3.0  # for the status, which a dead disk may keep
POLL_S = 0.1
HURRY_S = 0.5  # in which ranks that send packets as often as they mean to have agreed
SIGNALS = {int(getattr(signal, stop.name)) for stop in Stop if hasattr(signal, stop.name)}
ORDERS = {int(getattr(signal, name)) for name in ("SIGTERM", "SIGHUP", "SIGINT")}
OVER = 0  # no signal has this number
HANG = 124


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How far the loop is: boundaries that are done, -1 before the first step; seconds that a stop
    needs, as far as it was measured, and that it is given, 0 where that is not known.
    """

    boundaries: int = -1
    needs_s: float = 0.0
    grace_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Departure:
    """Why a process was ended by its own thread, and with which code."""

    stop: Stop
    reason: str
    exit_code: int


class Watch:
    """Reads the pipe, and ends the process if it comes to that. Whoever makes one closes it."""

    def __init__(
        self, flag: StopFlag, *, pace: Callable[[], Pace], tell: Callable[[Departure], None]
    ) -> None:
        """Args: `pace` is asked from a thread; so is `tell`, which has LAST_WORDS_S."""
        self._flag = flag
        self._pace = pace
        self._tell = tell
        self._launcher = _launcher()
        self._main = threading.main_thread().ident
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        _forget_in_children()
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="departure", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        signal.set_wakeup_fd(self._before)
        os.write(self._write, bytes([OVER]))
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _run(self) -> None:
        first: int | None = None
        # When the newest signal came of which the ranks have not agreed yet.
        asked = 0.0
        ordered = 0.0
        since = 0.0
        is_second = False
        has_answered = False
        boundaries = -1
        while True:
            timeout = None if first is None and not asked else POLL_S
            ready, _, _ = select.select([self._read], [], [], timeout)
            numbers = os.read(self._read, 64) if ready else b""
            if OVER in numbers:
                return
            if self._before >= 0 and numbers:
                # Somebody else, as an event loop, hears of signals this way too.
                os.write(self._before, numbers)
            now = time.monotonic()
            for number in ORDERS.intersection(numbers):
                if first is None:
                    first = number
                    ordered = since = now
                    boundaries = self._pace().boundaries
                elif not _is_echo(first, number, now - ordered):
                    is_second = True
            if SIGNALS.intersection(numbers):
                asked = now
            if asked and now - asked > HURRY_S:
                asked = 0.0
                self._hurry()
            if first is None:
                continue
            if not has_answered and self._is_orphan:
                answer_guard()
                has_answered = True
            pace = self._pace()
            if pace.boundaries != boundaries:
                boundaries = pace.boundaries
                since = now
            limit_s = AT_ONCE_S if is_second else self._limit_s(pace)
            if now - since > limit_s:
                self._leave(first, now - ordered, pace)

    def _hurry(self) -> None:
        """Where steps are slow, the next packet may be far away."""
        if self._flag.hurry is not None and not self._flag.is_settled:
            self._flag.hurry()

    @property
    def _is_orphan(self) -> bool:
        return self._launcher > 0 and os.getppid() != self._launcher

    def _limit_s(self, pace: Pace) -> float:
        """Returns how long the main thread may take to the next boundary, or to its end."""
        if self._flag.is_leaving:
            return LEAVING_S
        if pace.boundaries < 0:
            # Its handler has run: an exception unwinds.
            return LEAVING_S if self._flag.since else EARLY_S
        if self._flag.is_settled:
            return SAVING_S
        limit_s = max(PATIENCE_S, 2 * pace.needs_s)
        if pace.grace_s:
            limit_s = max(pace.grace_s - LAST_WORDS_S, 1.0)
        if self._is_orphan:
            limit_s = min(limit_s, max(ORPHANED_S, pace.needs_s))
        return limit_s

    def _leave(self, number: int, seconds: float, pace: Pace) -> None:
        """Ends this process, after its last words."""
        stop = Stop[signal.Signals(number).name]
        reason = f"{stop.name} came {seconds:.0f} s ago, and "
        if pace.boundaries < 0:
            reason += f"this rank is still {self._where()}"
            code = 128 + number
        else:
            reason += f"no step has ended since: this rank is {self._where()}. Left without a save"
            code = HANG
        told = Departure(stop=stop, reason=without_secrets(reason), exit_code=code)
        words = threading.Thread(target=self._tell, args=(told,), daemon=True)
        words.start()
        words.join(LAST_WORDS_S)
        os._exit(code)

    def _where(self) -> str:
        """Returns the line of Python that the main thread is at."""
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return "nowhere"
        code = frame.f_code
        return f"in {code.co_name} ({code.co_filename}:{frame.f_lineno})"


def _is_echo(first: int, number: int, seconds: float) -> bool:
    echoed = {int(getattr(signal, stop.name)) for stop in ECHOED}
    return {first, number} <= echoed and seconds < ECHO_S


def _launcher() -> int:
    """Returns the pid of a launcher without which this rank is an orphan, 0 if there is none."""
    is_launched = "DDP_KIT_LAUNCHER" in environment() or "TORCHELASTIC_RUN_ID" in environment()
    return os.getppid() if is_launched else 0


@functools.cache
def _forget_in_children() -> None:
    """A fork's signals are none of this process's: loader workers have the same pipe."""
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    signal.set_wakeup_fd(-1)


@contextmanager
def departing(
    flag: StopFlag, *, pace: Callable[[], Pace], tell: Callable[[Departure], None]
) -> Iterator[None]:
    """Sees to it, while it lasts, that a signal ends this process: a second one at once, the first
    one when no step has ended for as long as there is time. Outside the main thread it does
    nothing.

    Args: `pace` tells how far the loop is, `tell` writes down why the process ends; both are called
        from a thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = Watch(flag, pace=pace, tell=tell)
    try:
        yield
    finally:
        watch.close()
