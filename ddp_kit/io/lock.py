"""Locks on files, each held by one process of one host at a time."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # Lustre mounted without it, some FUSE


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[IO[str]]:
    """Opens the lock file while no other process is looking at it or changing it.

    Yields: the file, open for reading and writing.
    Raises: OSError if it cannot be opened or locked. Where the file system knows no locks, it is
        opened without one.
    """
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_FLOCK:
                    raise
            if _is_at(lock, file.fileno()):
                yield file
                return


def lock_at_once(lock: Path) -> int | None:
    """Opens and locks a file, whose folders are made, if no other process has it.

    Returns: a descriptor, which holds the lock until it is closed; None if the lock is another's,
        or was until just now.
    Raises: OSError if it cannot be opened or locked.
    """
    descriptor = -1
    is_ours = False
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = _is_at(lock, descriptor)
    except (BlockingIOError, FileNotFoundError):
        return None
    finally:
        if descriptor >= 0 and not is_ours:
            os.close(descriptor)
    return descriptor if is_ours else None


def _is_at(lock: Path, descriptor: int) -> bool:
    """Whether an open file is the one on disk: another process may have unlinked it between our
    open and our lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False
