"""Telling one process from another that later got its number."""

import subprocess
from pathlib import Path


def process_start(pid: int) -> str:
    """Returns when a process on this host started, in its system's own words.

    It is "" if there is none, or only a zombie.
    """
    if Path("/proc/self/stat").exists():
        try:
            state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        if state in "ZX":
            return ""
        return numbers[18]  # field 22: clock ticks since boot
    found = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def is_stopped(pid: int) -> bool:
    """Whether a process on this host stands still: SIGSTOP, Ctrl-Z or a debugger. False where the
    system does not tell.
    """
    return process_state(pid) in ("T", "t")


def process_state(pid: int) -> str:
    """Returns the letter that Linux has for what a process on this host does: T stopped, D in a
    wait in the kernel, R and S it runs or sleeps; "gone" if it is there no more.

    Elsewhere it is "".
    """
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return "gone" if state in "ZX" else state


def state_words(state: str) -> str:
    """Returns what a process does that says nothing any more, by its `process_state`."""
    words = {
        "T": "is stopped (SIGSTOP)",
        "t": "is stopped by a debugger",
        "D": "sits in the kernel, in a wait that nothing can interrupt (a disk or file server)",
        "": "has said nothing",
        "gone": "is gone",
    }
    return words.get(state, "cannot run Python (something holds its GIL)")


def pid_namespace() -> str:
    """Returns in which namespace this process's number holds, "" where there are none."""
    path = Path("/proc/self/ns/pid")
    return str(path.readlink()) if path.is_symlink() else ""
