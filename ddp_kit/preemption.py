"""Signals: a handler sets a flag, and nothing else.

Owns: SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 of this process while a run lasts.
Refuses: acting on one rank alone. The flag travels in the control packet and all ranks stop at the same step. Before the first step
there is nothing to agree on, and a signal ends this rank as an exception does; a second signal leaves at once.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class Stopped(SystemExit):
    """A signal came before the first step: nothing can be lost yet, so the run unwinds and ends."""

    def __init__(self, number: int):
        super().__init__(exit_code(number))
        self.number = number

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name} before the first step"


class StopFlag:
    """Which signal has come, 0 for none. `deferring`: it waits for a step boundary, or for a failure to be written down."""

    def __init__(self) -> None:
        self.signal = 0
        self.deferring = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number
        if not self.deferring:
            raise Stopped(number)


@contextmanager
def signals_noted() -> Iterator[StopFlag]:
    """Notes signals in a StopFlag while it lasts, and puts the handlers back. Outside the main thread it notes none."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag.handle) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def exit_code(number: int) -> int:
    """Returns the exit code of a run that a signal stopped: 130 for SIGINT, 143 for the others."""
    return 130 if number == signal.SIGINT else 143
