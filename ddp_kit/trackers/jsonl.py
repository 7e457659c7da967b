"""The tracker that is always on: metrics.jsonl and events.jsonl in the run directory.

Each record is one line of strict JSON, which knows no NaN and no infinity: they are the texts
"nan", "inf" and "-inf".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import final

from ddp_kit.io.json_lines import JsonLines, supersede
from ddp_kit.io.redact import redact
from ddp_kit.trackers.base import RunInfo


@final
class JsonlTracker:
    """Appends records to metrics.jsonl and events.jsonl.

    Events and evaluations are flushed at once, training records when `flush` is called, which
    `Reporter` does after each burst, so that a killed run keeps what it logged. Flushed means
    handed to the operating system: a dead process loses nothing of it, a dead machine the last
    seconds.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._metrics: JsonLines | None = None
        self._events: JsonLines | None = None

    def start(self, info: RunInfo) -> None:
        """Opens both files for appending. Raises: OSError if one cannot be opened."""
        self._path = info.run_dir / "metrics.jsonl"
        self._metrics = JsonLines(self._path)
        self._events = JsonLines(info.run_dir / "events.jsonl")

    def log(self, record: Mapping[str, object]) -> None:
        """Adds one line to metrics.jsonl."""
        assert self._metrics is not None, "start first"
        self._metrics.add(record)
        if record.get("kind") != "train":
            self._metrics.flush()

    def flush(self) -> None:
        """Hands the records so far to the operating system."""
        if self._metrics is not None:
            self._metrics.flush()

    def event(self, event: Mapping[str, object]) -> None:
        """Adds one line to events.jsonl, without secrets: messages may quote what a user typed."""
        assert self._events is not None, "start first"
        # First the records before it: in the order in which things happened.
        self.flush()
        if event["event"] == "rollback":
            self._go_back(event["step"])
        self._events.add(redact(event))
        self._events.flush()

    def _go_back(self, step: object) -> None:
        """Drops the records of the steps that the run has gone back over: they come again."""
        if self._metrics is None or self._path is None or not isinstance(step, int):
            return
        self._metrics.close()
        supersede(self._path, step=step, owes_evaluation=False)
        self._metrics = JsonLines(self._path)

    def sample(self, name: str, value: object, *, step: int) -> None:
        """Writes nothing: images and texts do not belong into lines of numbers."""

    def finish(self, status: Mapping[str, object]) -> None:
        """Closes both files."""
        for file in (self._metrics, self._events):
            if file is not None:
                file.close()
        self._metrics = None
        self._events = None
