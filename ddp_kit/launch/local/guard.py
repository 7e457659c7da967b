"""A process that outlives its launcher, until the ranks are gone.

When a launcher dies the kernel sends its ranks SIGTERM, and they save and leave. One that sits in C
code and holds the interpreter's lock does not hear of it: nothing of Python runs there, and no
signal but SIGKILL ends it. So each rank answers, from a thread, that it has heard; whoever has not
answered in time is killed.
"""

import contextlib
import os
import select
import signal
import struct
import time
import warnings
from collections.abc import Sequence

# from the launcher's death to a rank's answer
ANSWER_S = 8.0
POLL_S = 0.05
PID = struct.Struct("<I")


class Guard:
    """The pipes between launcher, ranks and the guarding process."""

    def __init__(self) -> None:
        self._answers, self.descriptor = os.pipe()
        os.set_blocking(self._answers, False)
        self._over, self._lifeline = os.pipe()

    @property
    def name(self) -> str:
        """What a rank is told of the pipe for its answer, as of `RunFolder.name`."""
        return f"{self.descriptor}:{os.fstat(self.descriptor).st_ino}"

    def watch(self, ranks: Sequence[int]) -> None:
        """Starts the process, where the system can name a process for good.

        It is nobody's child: the launcher has no others than its ranks.
        """
        if not hasattr(os, "pidfd_open"):
            return
        with warnings.catch_warnings():
            # of a fork beside threads: this child needs none of theirs
            warnings.simplefilter("ignore")
            child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        try:
            os.setsid()
            if not os.fork():
                self._serve(ranks)
        finally:
            os._exit(0)

    def close(self) -> None:
        """Gives the pipes back, which ends the process once the ranks are gone."""
        for descriptor in (self._answers, self.descriptor, self._over, self._lifeline):
            os.close(descriptor)

    def _serve(self, ranks: Sequence[int]) -> None:
        kept = {self._answers, self._over}
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        highest = max(*kept, self.descriptor, self._lifeline, null)
        for descriptor in range(3, highest + 1):
            if descriptor not in kept:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        handles = {}
        for pid in ranks:
            with contextlib.suppress(OSError):
                handles[pid] = os.pidfd_open(pid)
        os.read(self._over, 1)
        end = time.monotonic() + ANSWER_S
        heard: set[int] = set()
        while time.monotonic() < end:
            heard |= self._answered()
            silent = [handle for pid, handle in handles.items() if pid not in heard]
            if all(_has_ended(handle) for handle in silent):
                return
            time.sleep(POLL_S)
        for pid, handle in handles.items():
            if pid not in heard and not _has_ended(handle):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

    def _answered(self) -> set[int]:
        try:
            text = os.read(self._answers, 4096)
        except BlockingIOError:
            return set()
        whole = len(text) // PID.size * PID.size
        return {pid for (pid,) in PID.iter_unpack(text[:whole])}


def _has_ended(handle: int) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(0))
