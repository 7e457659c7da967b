"""A disk that goes wrong on request, for the thread that writes checkpoints: `install("kill 0 8 5")` in the rank's own process.

A fault is "WHAT RANK STEP MORE", several are separated by commas; STEP is the checkpoint's, 0 means each:
    kill R S N            SIGKILL before the N-th file operation, from the first open of that save to the end of its retention;
                          a write is half done
    ENOSPC R S write      the operation fails with that error (any name of errno, any of OPERATIONS)
    stall R S seconds     the first fsync of that save takes so long
    wait R S N            the first fsync of that save takes until this rank has trained to step N, 20 s at most
"""

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

OPERATIONS = ("open", "write", "fsync", "rename", "unlink", "rmdir", "ftruncate")
FOLDER = re.compile(r"step-(\d+)")


WAIT_S = 20.0
steps_done: list[int] = []  # of this rank; the recipe tells


class Disk:
    """Stands before the file operations of `os`."""

    def __init__(self, faults: str):
        own = os.environ.get("RANK", "0")
        self.faults = [fault.split() for fault in faults.split(",") if fault.split()[1] == own]
        self.step, self.count, self.begun = -1, 0, set[int]()

    def meets(self, name: str, real: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Does an operation, or what a fault wants in its place."""
        if threading.current_thread().name != "checkpoint":
            return real(*args, **more)
        found = FOLDER.search(str(args[0]))
        if name == "open" and found and ".tmp-" in str(args[0]) and int(found[1]) not in self.begun:
            self.step, self.count = int(found[1]), 0
            self.begun.add(self.step)
        self.count += 1
        for what, _, step, detail in self.faults:
            if int(step) not in (0, self.step):
                continue
            if what == "kill" and self.count == int(detail):
                print(f"killed before {name} {args[0]}", flush=True)
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "stall" and name == "fsync" and self.count == 3:
                print("the stall begins", flush=True)
                time.sleep(float(detail))
                print("the stall ends", flush=True)
            if what == "wait" and name == "fsync" and self.count == 3:
                self.wait_for(int(detail))
            if hasattr(errno, what) and name == detail and (name != "open" or args[1] & os.O_CREAT):
                number = getattr(errno, what)
                raise OSError(number, os.strerror(number))
        return real(*args, **more)

    def wait_for(self, step: int) -> None:
        print("the stall begins", flush=True)
        end = time.monotonic() + WAIT_S
        while step not in steps_done and time.monotonic() < end:
            time.sleep(0.01)
        print("the stall ends", flush=True)


def install(faults: str) -> None:
    """Puts the faults in place for the rest of this process."""
    if not faults:
        return
    disk = Disk(faults)

    def stands_before(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **more: disk.meets(name, real, *args, **more)

    for name in OPERATIONS:
        setattr(os, name, stands_before(name, getattr(os, name)))
