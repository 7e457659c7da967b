"""JSON that is always valid, as lines of a file: written whole, and read though the last line may be torn."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ddp_kit.io.logs import logger

_LINE = json.JSONEncoder(allow_nan=False, ensure_ascii=False)


def json_text(value: object, *, indent: int | None = None) -> str:
    """Returns strict JSON. Scalars of torch and numpy become numbers, paths become texts, keys keep their order."""
    return (
        _LINE.encode(_plain(value))
        if indent is None
        else json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)
    )


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
    item = getattr(
        value, "item", None
    )  # a scalar of numpy or torch; anything else is json's TypeError
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


class JsonLines:
    """A file to which lines are appended. A full disk ends no run: what cannot be written waits in memory for the next attempt."""

    def __init__(self, path: Path):
        """A torn last line of an earlier life is closed off first."""
        self._path, self._is_failing = path, False
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._file).st_size
        self._waiting = bytearray(
            b"\n" if size and os.pread(self._file, 1, size - 1) != b"\n" else b""
        )

    def add(self, value: object) -> None:
        self._waiting += json_text(value).encode() + b"\n"

    def flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: os.write(self._file, self._waiting)]
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                logger.warning(
                    "%s: %s; its lines wait in memory until they can be written",
                    self._path,
                    error.strerror,
                )
            self._is_failing = True

    def close(self) -> None:
        self.flush()
        if self._waiting:
            logger.warning(
                "%s: the last %d lines could not be written", self._path, self._waiting.count(b"\n")
            )
        os.close(self._file)
