"""A last look at ranks that no peer can name: they are alone, or all of them cannot run Python.

A rank that can names the one that hangs, and ends the run. Here are those that can not: their
pulses stand still in memory, which needs no word of theirs.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddp_kit.io.atomic import write_text
from ddp_kit.io.json_lines import json_text, read_json
from ddp_kit.io.process import process_state, state_words
from ddp_kit.io.pulse_file import (
    PHASES,
    STACKS_NAME,
    PulseWords,
    fetch_stacks,
    find,
    read,
)

LOOK_S = 1.0
# What the ranks themselves have first.
SPARE_S = 6.0
HUNG = 124


@dataclass
class _Pulse:
    """What is known of a rank's pulse."""

    descriptor: int = -1
    words: PulseWords | None = None
    still_s: float = 0.0


class LastLook:
    """Looks once a second, however often it is asked."""

    def __init__(self, pids: Sequence[int]):
        """Args: `pids` of the ranks, in their order."""
        self._pids = pids
        self._pulses = [_Pulse() for _ in pids]
        self._looked = time.monotonic()

    def names_frozen(self, living: Sequence[int]) -> bool:
        """Whether a living rank has stood still for too long, its watchdog with it. It is named
        then, and the status of the run written; whoever asked ends all ranks, and calls `clear`.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return False
        # A longer pause was this process's own.
        passed_s = min(now - self._looked, 2 * LOOK_S)
        self._looked = now
        over_s = [self._overdue_s(rank, passed_s=passed_s) for rank in living]
        if max(over_s, default=0.0) <= SPARE_S:
            return False
        self._tell([rank for rank, over in zip(living, over_s, strict=True) if over > 0])
        return True

    def clear(self) -> None:
        """Takes away the lock of the run, whose ranks are dead."""
        for pulse in self._pulses:
            if pulse.words is not None and pulse.words.folder:
                (Path(pulse.words.folder).parent / "run.lock").unlink(missing_ok=True)

    def _overdue_s(self, rank: int, *, passed_s: float) -> float:
        """Returns for how much longer than it may a rank has stood still, 0 if it has not."""
        pulse = self._pulses[rank]
        if pulse.descriptor < 0:
            pulse.descriptor = find(self._pids[rank])
        words = read(pulse.descriptor)
        if words is None or words.limit_s <= 0:
            return 0.0
        before = pulse.words
        pulse.words = words
        if before is None or (words.marks, words.ticks) != (before.marks, before.ticks):
            pulse.still_s = 0.0
            return 0.0
        pulse.still_s += passed_s
        return max(0.0, pulse.still_s - words.limit_s)

    def _tell(self, frozen: Sequence[int]) -> None:
        first = frozen[0]
        words = self._pulses[first].words
        assert words is not None
        parts = [self._being(rank) for rank in frozen]
        text = f"HUNG at step {words.step}: {'; '.join(parts)}"
        if words.folder:
            text += f". Stacks: {words.folder}/"
        print(text, file=sys.stderr, flush=True)
        if words.folder:
            folder = Path(words.folder)
            for rank in frozen:
                self._write_stacks(rank, folder)
            _write_status(folder.parent, text, step=words.step)

    def _being(self, rank: int) -> str:
        pulse = self._pulses[rank]
        assert pulse.words is not None
        state = state_words(process_state(self._pids[rank]))
        return (
            f"rank {rank} (host {socket.gethostname()}, pid {self._pids[rank]}) has been in "
            f"{PHASES[pulse.words.phase]} for {pulse.still_s:.0f} s; it {state}"
        )

    def _write_stacks(self, rank: int, folder: Path) -> None:
        pid = self._pids[rank]
        text = ""
        if process_state(pid) not in ("T", "t", "D"):
            descriptor = find(pid, STACKS_NAME)
            text = fetch_stacks(pid, descriptor)
            # The signal may have ended the call that it hung in: it goes no further.
            os.kill(pid, signal.SIGSTOP)
            if descriptor >= 0:
                os.close(descriptor)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank-{rank}.txt").write_text(text or "no stacks\n", encoding="utf-8")
        except OSError as error:
            print(f"the stacks of rank {rank} were not written: {error}", file=sys.stderr)


def _write_status(run_dir: Path, text: str, *, step: int) -> None:
    """Writes that the run has failed; what else the status says stays."""
    path = run_dir / "status.json"
    status = dict(read_json(path))
    if not status:
        return
    done = max(step - 1, 0)
    status |= {"status": "failed", "reason": text, "exit_code": HUNG, "step": done}
    try:
        write_text(path, json_text(status, indent=2) + "\n", durable=True)
    except OSError as error:
        print(f"status.json could not be written: {error}", file=sys.stderr)
