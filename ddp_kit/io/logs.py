"""What a rank writes down in words: `logs/rank-K.log`, and rank 0's lines on the console.

While a run lasts, the logger `ddp_kit` has handlers, and the process's own stdout and stderr take
no run with them when they fail. No text has a value that is being hidden. Metrics go to trackers,
and the root logger is left alone: it belongs to the user's program.
"""

import contextlib
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote, quote_plus

logger = logging.getLogger("ddp_kit")
FORMAT = "%(asctime)s %(levelname)s %(message)s"
REDACTED = "[redacted]"
LEAST = 6  # characters of a value that is looked for: a shorter one may be part of any text

# Streams and handlers of the whole process hide them, and have no other way to know them.
_secrets: list[re.Pattern[str]] = []


@contextmanager
def hiding(values: Iterable[str]) -> Iterator[None]:
    """Takes these values out of every text that this process writes while it lasts.

    They are also found as they stand in a URL, in JSON or in a repr. A value of fewer than `LEAST`
    characters is not looked for, and others are found only where no letter or digit goes on with
    them.
    """
    found: set[str] = set()
    for value in values:
        in_json = json.dumps(value)[1:-1]
        in_repr = repr(value)[1:-1]
        found |= {value, quote(value, safe=""), quote_plus(value), in_json, in_repr}
    sought = [text for text in found if len(text.strip()) >= LEAST]
    if not sought:
        yield
        return
    # The longest first: a shorter one may be part of it.
    sought.sort(key=len, reverse=True)
    pattern = re.compile("|".join(map(_whole, sought)))
    _secrets.append(pattern)
    try:
        yield
    finally:
        _secrets.remove(pattern)


def _whole(text: str) -> str:
    begin = r"(?<![^\W_])" if text[0].isalnum() else ""
    end = r"(?![^\W_])" if text[-1].isalnum() else ""
    return f"{begin}{re.escape(text)}{end}"


def without_secrets(text: str) -> str:
    """Returns the text with `[redacted]` in place of each value that is being hidden."""
    for pattern in _secrets:
        text = pattern.sub(REDACTED, text)
    return text


class _Patient(io.FileIO):
    """A file that drops what cannot be written.

    Its reader may be gone, its terminal closed, its disk full.
    """

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
        except OSError:
            return size
        return size if written is None else written

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _Stream(io.TextIOWrapper):
    """Text for people: no secrets in it, and nothing is raised if nobody can read it."""

    def write(self, text: str) -> int:
        super().write(without_secrets(text))
        return len(text)


@contextmanager
def patient_output() -> Iterator[None]:
    """Makes the process's own stdout and stderr streams that never fail, while it lasts.

    What a program has put in their place stays as it is. The descriptors 1 and 2 are taken by
    /dev/null where they are closed: else the next file or connection would get them, and what
    libraries print.
    """
    for descriptor in (1, 2):
        _occupy(descriptor)
    with _patient("stdout"), _patient("stderr"):
        yield


def _occupy(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        else:
            os.set_inheritable(descriptor, True)


@contextmanager
def _patient(name: str) -> Iterator[None]:
    kept: TextIO | None = getattr(sys, name)
    if kept is None:  # it came closed
        made = _Stream(io.BufferedWriter(_Patient(os.devnull, "w")), encoding="utf-8")
    elif kept is getattr(sys, f"__{name}__") and isinstance(kept, io.TextIOWrapper):
        made = _beside(kept)
    else:
        yield
        return
    setattr(sys, name, made)
    try:
        yield
    finally:
        made.flush()
        if getattr(sys, name) is made:
            setattr(sys, name, kept)


def _beside(stream: io.TextIOWrapper) -> _Stream:
    """Returns another stream to where this one leads."""
    raw = _Patient(stream.fileno(), "w", closefd=False)
    with contextlib.suppress(OSError):
        stream.flush()
    is_unbuffered = isinstance(stream.buffer, io.RawIOBase)
    return _Stream(
        # Without a buffer as `python -u` has it.
        raw if is_unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class _ToFile(logging.FileHandler):
    """A log is worth no run: what a full disk refuses is dropped."""

    def _open(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(
            io.BufferedWriter(_Patient(self.baseFilename, self.mode)), encoding="utf-8"
        )


class _ToStdout(logging.StreamHandler[TextIO]):
    """Looks stdout up at each line.

    A live progress line puts its own in place, above which a line must appear.
    """

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


@contextmanager
def rank_log(folder: Path | None, *, rank: int) -> Iterator[logging.Logger]:
    """Writes this rank's log while it lasts, and info and warnings of rank 0 to the console too.

    Python's warnings go to the log as well as where they went before.

    Args: `folder` where the log goes; None: nowhere.
    Yields: the logger `ddp_kit`.
    Raises: OSError if the folder or the file in it cannot be made.
    """
    handlers = _handlers(folder, rank=rank)
    level = logger.level
    propagates = logger.propagate
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        with _warnings_too(rank=rank):
            yield logger
    finally:
        logger.setLevel(level)
        logger.propagate = propagates
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _handlers(folder: Path | None, *, rank: int) -> list[logging.Handler]:
    handlers: list[logging.Handler] = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        to_file = _ToFile(folder / f"rank-{rank}.log")
        to_file.setFormatter(_Formatter(FORMAT))
        to_file.setLevel(logging.DEBUG)
        handlers.append(to_file)
    if rank == 0:
        to_stdout = _ToStdout()
        to_stdout.setFormatter(_Formatter("%(message)s"))
        to_stdout.setLevel(logging.INFO)
        handlers.append(to_stdout)
    return handlers


@contextmanager
def _warnings_too(*, rank: int) -> Iterator[None]:
    """Logs Python's warnings while it lasts; they are shown by rank 0 only."""
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        logger.debug("%s", text.rstrip())
        # Once, not once a rank.
        if rank == 0 or file is not None:
            shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
