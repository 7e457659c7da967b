"""Processes of the cluster: which are ours, what they have started, and their end.

A process is ours by its id and start time, its network, its environment or its parent, and never
by its name: there are other clusters, and later processes of the same number.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from cluster.tools import POLL_S, ClusterError

PROC = Path("/proc")


def start_time(pid: int) -> int | None:
    """Returns when a process started, in ticks since boot.

    None for one that is not there or is a zombie.
    """
    fields = _stat(pid)
    if fields is None or fields[0] == "Z":
        return None
    return int(fields[19])


def command_of(pid: int) -> str:
    """Returns a process's command line as one line, "" for one that is not there."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return ""
    return " ".join(words.decode(errors="replace").split())


def program_of(pid: int) -> str:
    """Returns the name of the file that a process runs, "" if it cannot be read."""
    try:
        return (PROC / str(pid) / "exe").readlink().name
    except OSError:
        return ""


def everyone() -> Iterator[int]:
    """Yields the ids of all processes."""
    # a tenth of Path.iterdir's time
    return (int(name) for name in os.listdir(PROC) if name.isdigit())  # noqa: PTH208


def network_of(pid: int) -> int | None:
    """Returns the number of a process's network namespace, None if it cannot be read."""
    try:
        return (PROC / str(pid) / "ns" / "net").stat().st_ino
    except OSError:
        return None


def has_variables(pid: int, wanted: Collection[str]) -> bool:
    """Whether a process was started with all of these NAME=value in its environment."""
    try:
        found = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return {variable.encode() for variable in wanted} <= set(found)


def has_open(pid: int, path: Path) -> bool:
    """Whether a process has this file open."""
    with contextlib.suppress(OSError):
        for link in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if link.readlink() == path:
                    return True
    return False


def with_descendants(pids: Collection[int]) -> set[int]:
    """Returns these processes and all that they have started."""
    children: dict[int, list[int]] = {}
    for pid in everyone():
        fields = _stat(pid)
        if fields is not None and fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(pid)
    found: set[int] = set()
    todo = list(pids)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children.get(pid, [])
    return found


def send(pids: Collection[int], number: signal.Signals) -> None:
    """Sends a signal to each; those that have ended meanwhile are no matter."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def settle(
    found: Callable[[], set[int]],
    number: signal.Signals,
    *,
    is_done: Callable[[int], bool],
    within_s: float = 10,
) -> None:
    """Sends a signal to what `found` returns until it is done with all.

    So what they fork meanwhile gets it too. Raises: ClusterError after `within_s` seconds, with
    what is left.
    """
    end = time.monotonic() + within_s
    while left := {pid for pid in found() if not is_done(pid)}:
        if time.monotonic() > end:
            named = ", ".join(f"{pid} ({command_of(pid)})" for pid in sorted(left))
            raise ClusterError(f"{number.name} had no effect on {named}.")
        send(left, number)
        time.sleep(POLL_S)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, or gone."""
    fields = _stat(pid)
    return fields is None or fields[0] in "TtZ"


def end(pid: int, *, started: int, within_s: float) -> None:
    """Ends a process with SIGTERM, after `within_s` seconds with SIGKILL.

    One that has ended is no matter.
    """
    limit = time.monotonic() + within_s
    if start_time(pid) == started:
        send([pid], signal.SIGTERM)
        # a stopped one wakes for its SIGTERM
        send([pid], signal.SIGCONT)
    while start_time(pid) == started:
        # `up` is still the parent of daemons that it ends after a failure
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > limit:
            send([pid], signal.SIGKILL)
        time.sleep(POLL_S)


def _stat(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat from the third on: state, parent, ..."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
