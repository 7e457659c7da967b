"""Where threads stand: the line of the user's code, and the stacks of whole processes.

A handler in C writes the stacks of all Python threads when `STACK_SIGNAL` comes, so that a rank
answers that sits in C code or holds the interpreter's lock. It writes into memory, which a peer on
the same host reads: a healthy run leaves no file.
"""

import contextlib
import faulthandler
import os
import sys
import sysconfig
from pathlib import Path
from types import FrameType

from ddp_kit.io.pulse_file import STACK_SIGNAL, STACKS_NAME

HERE = str(Path(__file__).parents[1]) + os.sep
# Whose frames are not the user's code.
FOREIGN = tuple(
    {
        HERE,
        sysconfig.get_path("stdlib") + os.sep,
        sysconfig.get_path("platstdlib") + os.sep,
        sysconfig.get_path("purelib") + os.sep,
        sysconfig.get_path("platlib") + os.sep,
        sysconfig.get_path("scripts") + os.sep,
        "<",
    }
)
# In which a thread waits for other ranks.
COLLECTIVES = ("torch/distributed/", "torch/autograd/graph.py", "torch/_tensor.py")
DEBUGGERS = ("pdb.py", "bdb.py", "debugpy", "pydevd")


class StackSignal:
    """The handler of `STACK_SIGNAL`, from `install` to `remove`."""

    def __init__(self) -> None:
        self.descriptor = -1
        self._is_enabled = False

    def install(self) -> None:
        """Installs it where the system has such signals and such memory."""
        if STACK_SIGNAL < 0 or not hasattr(os, "memfd_create"):
            return
        self.descriptor = os.memfd_create(STACKS_NAME)
        faulthandler.register(STACK_SIGNAL, file=self.descriptor, all_threads=True)
        # So that a peer can tell where a process was that gloo has aborted.
        if not faulthandler.is_enabled():
            faulthandler.enable(file=self.descriptor, all_threads=True)
            self._is_enabled = True

    def remove(self) -> None:
        """Takes it away."""
        if self.descriptor < 0:
            return
        if self._is_enabled:
            faulthandler.disable()
        faulthandler.unregister(STACK_SIGNAL)
        os.close(self.descriptor)
        self.descriptor = -1


def main_frame(ident: int) -> FrameType | None:
    """Returns the innermost frame of a thread."""
    return sys._current_frames().get(ident)


def users_line(frame: FrameType | None) -> str:
    """Returns the innermost line of the user's code, "" if ddp_kit's is nearer."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(HERE):
            return ""
        if is_users(name):
            return f"{shown(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def users_line_of(error: BaseException) -> str:
    """Returns the innermost line of the user's code that an error came through, "" if ddp_kit's is
    nearer.
    """
    found = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name.startswith(HERE):
            found = ""
        if is_users(name):
            found = f"{shown(name)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def is_users(name: str) -> bool:
    """Whether a file is neither torch's nor ddp_kit's, nor another installed one."""
    return not name.startswith(FOREIGN)


def shown(name: str) -> str:
    """Returns a path as it is read best: from the working directory if it is below it."""
    with contextlib.suppress(ValueError):
        return str(Path(name).relative_to(Path.cwd()))
    return name


def waits_in_collective(frame: FrameType | None) -> bool:
    """Whether a thread sits in a collective, or in the backward pass outside the user's code.

    What the user's code does within it is nearer.
    """
    while frame is not None:
        name = frame.f_code.co_filename
        if any(part in name for part in COLLECTIVES):
            return True
        if is_users(name):
            return False
        frame = frame.f_back
    return False


def is_debugged(frame: FrameType | None) -> bool:
    """Whether a person is in a debugger there."""
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in DEBUGGERS):
            return True
        frame = frame.f_back
    return False


def write_own(path: Path) -> None:
    """Writes the stacks of this process's threads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def users_line_in(text: str) -> str:
    """Returns the innermost line of the user's code in stacks as they are written, "" if ddp_kit's
    is nearer. The main thread's are the last ones.
    """
    for line in text.rpartition("hread 0x")[2].splitlines():
        name, quote, rest = line.strip().removeprefix('File "').partition('", line ')
        if quote and name.startswith(HERE):
            return ""
        if quote and is_users(name):
            return f"{shown(name)}:{rest.split()[0]}"
    return ""
