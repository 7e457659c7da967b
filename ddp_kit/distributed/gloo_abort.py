"""Ending gloo's connections after an error: gloo has no abort (pytorch#130345)."""

import contextlib
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path


def open_sockets() -> dict[int, int]:
    """Returns this process's open sockets: file descriptor -> inode."""
    found = {}
    for path in Path("/dev/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            about = os.fstat(int(path.name))
            if stat.S_ISSOCK(about.st_mode):
                found[int(path.name)] = about.st_ino
    return found


def shut_sending(sockets: Mapping[int, int]) -> None:
    """Ends this rank's side of the connections of gloo groups, which have no abort (pytorch#130345), so that its peers notice at once.

    Nothing else would until the process ends: a traceback holds the groups. Only the sending side, and the process should live on for a
    while: a peer's gloo that is cut off in the middle of a message waits for the rest of it until its timeout.
    """
    for descriptor, inode in sockets.items():
        with contextlib.suppress(
            OSError
        ):  # closed meanwhile, or a listener, whose end gloo would not survive
            if os.fstat(descriptor).st_ino == inode:
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    connection.getpeername()
                    connection.shutdown(socket.SHUT_WR)
