"""JSON that is always valid, as lines of a file.

Lines are written whole, and read though the last one of a killed writer may be torn.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ddp_kit.io.atomic import write_text
from ddp_kit.io.logs import logger

_LINE = json.JSONEncoder(allow_nan=False, ensure_ascii=False)
# What a text that is no JSON raises: numbers of thousands of digits, and brackets nested as deep.
NOT_JSON = (ValueError, RecursionError)


def json_text(value: object, *, indent: int | None = None) -> str:
    """Returns strict JSON, which knows no NaN and no infinity: those become texts.

    Scalars of torch and numpy become numbers, paths become texts, keys keep their order.

    Args: `indent` spaces of each level, on lines of their own; None: all in one line.
    Raises: TypeError if there is something that JSON has no form for.
    """
    if indent is None:
        return _LINE.encode(_plain(value))
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # nan, inf or -inf
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    # A scalar of numpy or torch has it; anything else is json's TypeError.
    item = getattr(value, "item", None)
    return _plain(item()) if callable(item) else value


def read_lines(path: Path) -> Iterator[dict[str, object]]:
    """Yields the records of a file of JSON lines, if it is there.

    What a killed writer left half-written is skipped.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except NOT_JSON:
                continue
            if isinstance(record, dict):
                yield record


def read_json(path: Path) -> dict[str, object]:
    """Returns the object in a JSON file; an empty one if it is missing or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, *NOT_JSON):
        return {}
    return value if isinstance(value, dict) else {}


def whole(value: object) -> int:
    """Returns a whole number that a file holds, 0 where something else stands in its place."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return 0


def supersede(path: Path, *, step: int, owes_evaluation: bool) -> None:
    """Drops from metrics.jsonl what a killed attempt wrote beyond a checkpoint.

    The attempt to come writes it again.

    Args: `step` the checkpoint's; `owes_evaluation` the checkpoint was written before the
        evaluation of its step, which is to come.
    """
    if not path.exists():
        return
    kept = []
    for record in read_lines(path):
        at = record.get("step")
        is_owed = owes_evaluation and at == step and record.get("kind") == "eval"
        if isinstance(at, int) and at <= step and not is_owed and record.get("kind") != "test":
            kept.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text(path, "".join(kept))


class JsonLines:
    """A file to which lines are appended.

    A full disk ends no run: what cannot be written waits in memory until it can.
    """

    def __init__(self, path: Path):
        """Opens the file; a torn last line of an earlier attempt is closed off first.

        Raises: OSError if it cannot be opened.
        """
        self._path = path
        self._is_failing = False
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._file).st_size
        self._waiting = bytearray()
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            self._waiting += b"\n"

    def add(self, value: object) -> None:
        """Adds a line, which waits for the next `flush`."""
        self._waiting += json_text(value).encode() + b"\n"

    def flush(self) -> None:
        """Hands the lines that wait to the operating system; what it refuses waits on."""
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
        """Writes what waits, as far as that is possible, and closes the file."""
        self.flush()
        if self._waiting:
            lost = self._waiting.count(b"\n")
            logger.warning("%s: the last %d lines could not be written", self._path, lost)
        os.close(self._file)
