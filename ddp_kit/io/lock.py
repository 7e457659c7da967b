"""A lock on a file that one process of one host holds at a time."""

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
        # Another process may unlink the file between our open and our flock; then ours is no
        # longer the one on disk: once more.
        current = None
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_FLOCK:
                    raise
            with contextlib.suppress(FileNotFoundError):
                current = lock.stat()
            if current is not None and os.path.samestat(os.fstat(file.fileno()), current):
                yield file
                return
