"""The tracker that is always on: metrics.jsonl and events.jsonl in the run directory.

Owns: how a record becomes one line of strict JSON, and reading such lines back.
Refuses: bare NaN and Infinity, which strict JSON does not know: they are the texts "nan", "inf" and "-inf".
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from ddp_kit.trackers import RunInfo, redact

_LINE = json.JSONEncoder(allow_nan=False, ensure_ascii=False)


def json_text(value: object, *, indent: int | None = None) -> str:
    """Returns strict JSON. Scalars of torch and numpy become numbers, paths become texts, keys keep their order."""
    return _LINE.encode(_plain(value)) if indent is None else json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    item = getattr(value, "item", None)  # a scalar of numpy or torch; anything else is json's TypeError
    return _plain(item()) if callable(item) else value


def read_lines(path: Path) -> Iterator[dict[str, object]]:
    """Yields the records of a file of JSON lines, if it is there; what a killed writer left half-written is skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record


def read_json(path: Path) -> dict[str, object]:
    """Returns the object in a JSON file; an empty one if the file is missing or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def supersede(path: Path, *, step: int, owes_evaluation: bool) -> None:
    """Drops from metrics.jsonl what a killed life wrote beyond the checkpoint of `step`: the life to come writes it again."""
    kept = []
    for record in read_lines(path):
        at = record.get("step")
        is_owed = owes_evaluation and at == step and record.get("kind") == "eval"
        if isinstance(at, int) and at <= step and not is_owed and record.get("kind") != "test":
            kept.append(json.dumps(record, ensure_ascii=False) + "\n")
    if path.exists():
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)


class JsonlTracker:
    """Appends records to metrics.jsonl and events.jsonl. Events and evaluations are flushed at once, training records when `flush` is
    called, which `Reporter` does after each burst, so that a killed run keeps what it logged.

    Flushed means handed to the operating system: a dead process loses nothing of it, a dead machine the last seconds.
    """

    def __init__(self) -> None:
        self._metrics: TextIO | None = None
        self._events: TextIO | None = None

    def start(self, info: RunInfo) -> None:
        """Opens both files for appending; a torn last line of an earlier life is closed off first."""
        self._metrics = _open(info.run_dir / "metrics.jsonl")
        self._events = _open(info.run_dir / "events.jsonl")

    def log(self, record: Mapping[str, object]) -> None:
        """Writes one line to metrics.jsonl."""
        assert self._metrics is not None, "start first"
        self._metrics.write(json_text(record) + "\n")
        if record.get("kind") != "train":
            self.flush()

    def flush(self) -> None:
        """Hands the records so far to the operating system."""
        if self._metrics is not None:
            self._metrics.flush()

    def event(self, event: Mapping[str, object]) -> None:
        """Writes one line to events.jsonl, without secrets: messages may quote what a user typed."""
        assert self._events is not None, "start first"
        self._events.write(json_text(redact(event)) + "\n")
        self._events.flush()
        if self._metrics is not None:
            self._metrics.flush()  # in the order in which things happened

    def sample(self, name: str, value: object, *, step: int) -> None:
        """Writes nothing: images and texts do not belong into lines of numbers."""

    def finish(self, status: Mapping[str, object]) -> None:
        """Closes both files."""
        for file in (self._metrics, self._events):
            if file is not None:
                file.close()
        self._metrics = self._events = None


def _open(path: Path) -> TextIO:
    torn = False
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, 2)
            torn = file.read(1) != b"\n"
    opened = path.open("a", encoding="utf-8")
    if torn:
        opened.write("\n")
    return opened
