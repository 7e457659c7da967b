"""Work on files that one process of a node does while the others wait.

Such work is downloading, decoding, tokenising. No process group is used: a rank that downloads for
an hour inside a collective runs into the collective's timeout; a file lock has none, works before
the group exists, and is let go by the kernel when its holder dies.
"""

import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ddp_kit.distributed.topology import environment
from ddp_kit.errors import DataError
from ddp_kit.io.atomic import sync
from ddp_kit.io.lock import lock_at_once

POLL_S = 0.05
# How long a process waits before it says so.
QUIET_S = 5.0


def first_on_node(path: Path, make: Callable[[Path], None]) -> Path:
    """Makes `path` unless it is there already. Any rank may call it, and no rank must.

    Of all the processes of a node that ask at once, one does the work. `make(temporary)` writes a
    file or a folder at the path it is given, in the folder of `path`. What it wrote is synced to
    the disk and renamed, so `path` is whole or it is not there. If `make` raises, nothing stays
    behind; if its process is killed, the next one that asks removes the remains and makes it anew.
    Errors of `make` pass through.

    On a shared file system whose locks hold across nodes there is one maker in all; where they do
    not, one a node, and the first folder or the last file stays.

    Returns: `path`.
    Raises: DataError if the folder cannot be written or its file system has no locks.
    """
    if path.exists():
        return path
    with _locked(path.with_name(path.name + ".lock"), wanted=path):
        if not path.exists():
            _make(path, make)
    return path


def cache_path(beside: Path, name: str) -> Path:
    """Returns where a file derived from `beside` (a file or folder of data) is kept under `name`.

    That is next to `beside` if it is there already or may be written there. Otherwise, and always
    if the environment variable DDP_KIT_CACHE names a folder, it is in a folder for this `beside`
    under DDP_KIT_CACHE or ~/.cache/ddp_kit.
    """
    chosen = environment().get("DDP_KIT_CACHE", "")
    near = beside.parent / name
    if not chosen and (near.exists() or os.access(beside.parent, os.W_OK)):
        return near
    folder = Path(chosen) if chosen else Path.home() / ".cache" / "ddp_kit"
    source = str(beside.resolve())
    return folder / f"{beside.name}-{hashlib.sha256(source.encode()).hexdigest()[:12]}" / name


@contextmanager
def _locked(lock: Path, *, wanted: Path) -> Iterator[None]:
    descriptor = _acquire(lock, wanted=wanted)
    try:
        yield
    finally:
        # While it is held: whoever waits on this inode sees that it has no name any more, and opens
        # the new file.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock: Path, *, wanted: Path) -> int:
    """Returns an open descriptor that holds the lock on the file that now has the name `lock`."""
    asked = time.monotonic()
    has_told = False
    while True:
        descriptor = _try_lock(lock, wanted=wanted)
        if descriptor is not None:
            return descriptor
        if not has_told and time.monotonic() - asked > QUIET_S:
            has_told = True
            logging.getLogger("ddp_kit").info(
                "waiting for another process to make %s (lock: %s)", wanted, lock
            )
        time.sleep(POLL_S)


def _try_lock(lock: Path, *, wanted: Path) -> int | None:
    try:
        return lock_at_once(lock)
    except OSError as error:
        raise DataError(
            f"{wanted} is not there, and making it failed: {error.strerror} ({lock}). It needs a "
            "folder that can be written, on a file system with locks. Type: export "
            "DDP_KIT_CACHE=DIR for caches of decoded data, or give downloads another data folder."
        ) from error


def _make(path: Path, make: Callable[[Path], None]) -> None:
    # One temporary name per host: the lock's holder may remove what a killed maker of this host
    # left, and only that.
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.partial")
    _remove(temporary)
    try:
        make(temporary)
        _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        # Another node's folder is in place first, where locks do not reach across nodes: theirs is
        # as good as ours.
        if not (path.is_dir() and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
            raise
    finally:
        _remove(temporary)
    sync(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Syncs a file or a whole folder, so that the rename never shows a name without its bytes."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    if not path.is_dir():
        sync(path)
