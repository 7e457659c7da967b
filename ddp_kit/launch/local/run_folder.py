"""The run directory of the ranks that a launcher has started: rank 0 tells it, through a pipe.

From it the launcher sees whether rank 0's heart beats, and there it leaves the last word on a run
whose ranks could not write it themselves: how a process was killed only its parent knows.
"""

import contextlib
import os
import time
from pathlib import Path

from ddp_kit.io.atomic import write_text
from ddp_kit.io.json_lines import json_text, read_json

# the rank's words for a peer that it has lost: it cannot know how
UNKNOWN = "a peer is gone that left no word"
LONGEST = 65536


class RunFolder:
    """What the ranks' run directory says. Whoever makes one closes it."""

    def __init__(self) -> None:
        self._read, self.descriptor = os.pipe()
        os.set_blocking(self._read, False)
        self._text = b""
        self._beat = 0.0
        self._beat_seen = time.monotonic()

    @property
    def name(self) -> str:
        """What a rank is told of the pipe: another file may have its number in a process that
        inherits the variable."""
        return f"{self.descriptor}:{os.fstat(self.descriptor).st_ino}"

    @property
    def path(self) -> Path | None:
        """The directory, None until rank 0 has begun."""
        with contextlib.suppress(BlockingIOError):
            self._text += os.read(self._read, LONGEST)
        folder, line_end, _ = self._text.partition(b"\n")
        return Path(os.fsdecode(folder)) if line_end else None

    def without_heartbeat_s(self) -> float:
        """Returns for how long rank 0's lock has not changed, as far as it was looked at."""
        beat = 0.0
        if self.path is not None:
            with contextlib.suppress(OSError):
                beat = (self.path / "run.lock").stat().st_mtime
        if beat != self._beat:
            self._beat = beat
            self._beat_seen = time.monotonic()
        return time.monotonic() - self._beat_seen

    def close(self) -> None:
        """Gives the pipe back."""
        os.close(self._read)
        os.close(self.descriptor)

    def leave_last_word(self, rank: int, code: int, *, ended_by: str) -> None:
        """Writes into status.json how the first rank ended, where the ranks have left that open.
        Raises: OSError if it cannot be written.

        Args: `code` the rank's exit code, as `subprocess` has it; `ended_by` what is to be said
            of a signal.
        """
        folder = self.path
        if folder is None:
            return
        status = read_json(folder / "status.json")
        is_running = status.get("status") == "running"
        is_unknown = str(status.get("reason")).startswith(UNKNOWN)
        if code < 0 and (is_running or is_unknown):
            reason = ended_by
            exit_code = 128 - code
        elif is_running:
            reason = f"rank {rank} ended with {code}, and rank 0 has not written why"
            exit_code = code
        else:
            return
        told = {**status, "status": "failed", "reason": reason, "exit_code": exit_code}
        write_text(folder / "status.json", json_text(told, indent=2) + "\n", durable=True)
