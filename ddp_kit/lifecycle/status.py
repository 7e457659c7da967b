"""status.json: what it holds, and writing it whatever state disk and process are in.

It is the last word on a run. A run that is over must not stand there as "running" because a disk is
full, or because the process may open no more files.
"""

import errno
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

from ddp_kit.io.atomic import write_over, write_text
from ddp_kit.io.json_lines import json_text
from ddp_kit.io.redact import redact_text

Status = Literal["running", "finished", "stopped", "preempted", "failed"]

NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
MOST_WORDS = 1000  # of the reason, where a full disk leaves one block


def status_content(
    status: Status,
    *,
    reason: str = "",
    step: int = 0,
    epoch: int = 0,
    metrics: Mapping[str, object] | None = None,
    weights_sha256: str = "",
    exit_code: int | None = None,
) -> dict[str, object]:
    """Returns what status.json holds. `exit_code` is None while running."""
    assert status in get_args(Status), status
    return {
        "status": status,
        "reason": redact_text(reason),
        "step": step,
        "epoch": epoch,
        "metrics": dict(metrics or {}),
        "weights_sha256": weights_sha256,
        "exit_code": exit_code,
    }


class StatusFile:
    """The status.json of a run directory."""

    def __init__(self, path: Path) -> None:
        """Touches nothing yet. `path` is the file's."""
        self._path = path
        # A heartbeat writes it too, and a second signal may come while this thread does.
        self._writing = threading.RLock()
        self._progress: Callable[[], tuple[int, int]] | None = None
        self._step = -1
        self.is_running = False
        # Given back where the process may open no more files.
        self._spare = -1

    def open(self) -> None:
        """Keeps a descriptor in reserve. Whoever calls it calls `close`."""
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Gives the descriptor back."""
        spare = self._spare
        self._spare = -1
        if spare >= 0:
            os.close(spare)

    def write(self, content: Mapping[str, object]) -> None:
        """Writes a status, durably; what `follow` was given is over.

        Raises: OSError if there is no way to write it.
        """
        with self._writing:
            self._progress = None
            self._write(content)

    def follow(self, progress: Callable[[], tuple[int, int]]) -> None:
        """From now on each `beat` writes the step and epoch that `progress` returns."""
        self._progress = progress

    def beat(self) -> None:
        """Writes how far the run is, if it has come further. Any thread may call it.

        Raises: OSError if it cannot be written.
        """
        with self._writing:
            if self._progress is None:
                return
            step, epoch = self._progress()
            if step != self._step:
                self._write(status_content("running", step=step, epoch=epoch))

    def _write(self, content: Mapping[str, object]) -> None:
        try:
            write_text(self._path, _text(content), durable=True)
        except OSError as error:
            if error.errno in NO_DESCRIPTOR:
                self.close()
                write_text(self._path, _text(content), durable=True)
            elif error.errno in NO_ROOM and self._path.exists():
                # The old one's own block is all the room that there is.
                reason = str(content["reason"])[:MOST_WORDS]
                write_over(self._path, _text({**content, "metrics": {}, "reason": reason}))
            else:
                raise
        step = content["step"]
        assert isinstance(step, int)
        self._step = step
        self.is_running = content["status"] == "running"


def _text(content: Mapping[str, object]) -> str:
    return json_text(content, indent=2) + "\n"
