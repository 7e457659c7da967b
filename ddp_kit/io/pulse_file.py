"""A rank's pulse as other processes of its host can read it: numbers in memory that has a file.

Whoever looks needs no word of the rank, which may be stopped or hold the interpreter's lock. The
file has no name on any disk and goes with the last process that has it open.
"""

import contextlib
import mmap
import os
import signal
import struct
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# What a main thread does, by the number of its phase.
PHASES = (
    "start",
    "data",
    "forward",
    "backward",
    "reduce",
    "optimizer",
    "control",
    "callback",
    "evaluation",
    "save",
    "end",
)
# Makes a rank write its stacks into memory. Nobody else's: libraries take the first ones of these.
STACK_SIGNAL = getattr(signal, "SIGRTMIN", -8) + 7
WRITTEN_S = 1.0
PAUSE_S = 0.05
NAME = "ddp_kit-pulse"
STACKS_NAME = "ddp_kit-stacks"
# Positions of the numbers: marks and place of the main thread, and what its watchdog adds.
MARKS, STEP, PART, PHASE, TICKS, IDLE_MS, LIMITS_MS = range(7)
# The limit of each phase follows.
NUMBERS = 24
# Behind them: the number of bytes of the folder for stacks, and these.
FOLDER_AT = 8 * NUMBERS
SIZE = 4096
HEAD = struct.Struct("<q")


@dataclass(frozen=True, kw_only=True)
class PulseWords:
    """What a pulse says. `ticks` count on while the rank's watchdog runs, which writes `idle_s`;
    `limit_s` is that of the phase.
    """

    marks: int
    step: int
    part: int
    phase: int
    ticks: int
    idle_s: float
    limit_s: float
    folder: str = ""


class Numbers(Protocol):
    """Numbers by position."""

    def __getitem__(self, at: int, /) -> int: ...

    def __setitem__(self, at: int, number: int, /) -> None: ...


def no_file() -> Numbers:
    """Returns numbers that nobody else can read."""
    return array("q", [0] * NUMBERS)


class PulseFile:
    """The memory of one rank, from `open` to `close`."""

    def __init__(self) -> None:
        """Raises: OSError where the system has no such memory."""
        if not hasattr(os, "memfd_create"):
            raise OSError("no memory with a file")
        self.descriptor = os.memfd_create(NAME)
        os.ftruncate(self.descriptor, SIZE)
        self._memory = mmap.mmap(self.descriptor, SIZE)
        self._view = memoryview(self._memory)
        self.numbers = self._view[:FOLDER_AT].cast("q")

    def name_folder(self, folder: Path) -> None:
        """Tells where stacks go."""
        name = os.fsencode(folder)[: SIZE - FOLDER_AT - HEAD.size]
        self._view[FOLDER_AT : FOLDER_AT + HEAD.size] = HEAD.pack(len(name))
        begin = FOLDER_AT + HEAD.size
        self._view[begin : begin + len(name)] = name

    def close(self) -> None:
        """Gives it back. Nobody may write to `numbers` any more."""
        for phase in range(len(PHASES)):
            # Who still reads sees that nobody watches this rank.
            self.numbers[LIMITS_MS + phase] = 0
        self.numbers.release()
        self._view.release()
        self._memory.close()
        os.close(self.descriptor)


def open_of(pid: int, descriptor: int) -> int:
    """Returns a descriptor of a file that another process of this host has open, -1 if it cannot be
    had. It is good after that process's end.
    """
    with contextlib.suppress(OSError):
        return os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY)
    return -1


def find(pid: int, name: str = NAME) -> int:
    """Returns a descriptor of another process's pulse, or of its stacks; -1 if it has none."""
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if path.readlink().name.startswith(f"memfd:{name}"):
                    return open_of(pid, int(path.name))
    return -1


def read(descriptor: int) -> PulseWords | None:
    """Returns what a pulse says, None of what is none."""
    if descriptor < 0:
        return None
    with contextlib.suppress(OSError):
        content = os.pread(descriptor, SIZE, 0)
        if len(content) < SIZE:
            return None
        numbers = struct.unpack_from(f"={NUMBERS}q", content)
        (length,) = HEAD.unpack_from(content, FOLDER_AT)
        begin = FOLDER_AT + HEAD.size
        return PulseWords(
            marks=numbers[MARKS],
            step=numbers[STEP],
            part=numbers[PART],
            phase=numbers[PHASE],
            ticks=numbers[TICKS],
            idle_s=numbers[IDLE_MS] / 1000,
            limit_s=numbers[LIMITS_MS + numbers[PHASE]] / 1000,
            folder=os.fsdecode(content[begin : begin + length]),
        )
    return None


def text_of(descriptor: int) -> str:
    """Returns the whole content of a file as text, "" without one."""
    parts = []
    with contextlib.suppress(OSError):
        at = 0
        while descriptor >= 0:
            part = os.pread(descriptor, 1 << 16, at)
            if not part:
                break
            parts.append(part)
            at += len(part)
    return b"".join(parts).decode(errors="replace")


def fetch_stacks(pid: int, descriptor: int) -> str:
    """Asks another process of this host for its stacks, which come out of a file of its own.

    A call that sleeps in C may return at once: the process is to be ended soon.

    Args: `descriptor` this process's own of that file.
    Returns: "" where it gives none: it is stopped, or has no handler.
    """
    if descriptor < 0 or STACK_SIGNAL < 0:
        return ""
    text = ""
    with contextlib.suppress(OSError):
        os.kill(pid, STACK_SIGNAL)
        end = time.monotonic() + WRITTEN_S
        while time.monotonic() < end:
            time.sleep(PAUSE_S)
            now = text_of(descriptor)
            if now and now == text:
                break
            text = now
    return text
