"""What a rank writes down in words: `logs/rank-K.log` for each rank, and rank 0's lines on the console.

Owns: the handlers of the logger `ddp_kit` while a run lasts.
Refuses: metrics (trackers have them), and the root logger, which belongs to the user's program.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

logger = logging.getLogger("ddp_kit")
FORMAT = "%(asctime)s %(levelname)s %(message)s"


class _ToStdout(logging.StreamHandler[TextIO]):
    """Looks stdout up at each line: a live progress line puts its own in place, above which a line must appear."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


@contextmanager
def rank_log(folder: Path | None, *, rank: int) -> Iterator[logging.Logger]:
    """Writes this rank's log into `folder` (None: nowhere), and info and warnings of rank 0 to the console too.

    Python's warnings go to the log as well as where they went before.
    """
    handlers: list[logging.Handler] = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / f"rank-{rank}.log"))
        handlers[-1].setFormatter(logging.Formatter(FORMAT))
        handlers[-1].setLevel(logging.DEBUG)
    if rank == 0:
        handlers.append(_ToStdout())
        handlers[-1].setFormatter(logging.Formatter("%(message)s"))
        handlers[-1].setLevel(logging.INFO)
    level, propagates, shown = logger.level, logger.propagate, warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
    ) -> None:
        logger.debug("%s", warnings.formatwarning(message, category, filename, lineno, line).rstrip())
        if rank == 0 or file is not None:  # once, not once a rank
            shown(message, category, filename, lineno, file, line)

    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    warnings.showwarning = show
    try:
        yield logger
    finally:
        warnings.showwarning = shown
        logger.setLevel(level)
        logger.propagate = propagates
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
