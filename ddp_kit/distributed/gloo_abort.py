"""Ending gloo's connections after an error: gloo has no abort.

See https://github.com/pytorch/pytorch/issues/130345. NCCL's groups can be aborted. Of gloo's, which
give nobody their sockets, we note what a process opens while a group is made, and end that by hand.
"""

import contextlib
import ctypes
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


class Connections:
    """The connections of process groups, noted as they are made."""

    def __init__(self) -> None:
        self._sockets: dict[int, int] = {}  # file descriptor -> inode

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Notes the connections made within it."""
        before = _open_sockets()
        yield
        for descriptor, inode in _open_sockets().items():
            if before.get(descriptor) != inode:
                self._sockets[descriptor] = inode

    def shut_sending(self) -> None:
        """Ends this rank's side of them, so that its peers notice at once.

        Nothing else would until the process ends: a traceback holds the groups. Only the sending
        side, and the process should live on for a while: a peer's gloo that is cut off in the
        middle of a message waits for the rest of it until its timeout.
        """
        for descriptor, inode in self._sockets.items():
            # It may be closed meanwhile, or a listener, whose end gloo would not survive.
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_ino == inode:
                    with socket.socket(fileno=os.dup(descriptor)) as connection:
                        connection.getpeername()
                        connection.shutdown(socket.SHUT_WR)


def _open_sockets() -> dict[int, int]:
    """Returns this process's open sockets: file descriptor -> inode."""
    found = {}
    for path in Path("/dev/fd").iterdir():
        # The listing's own descriptor is closed by now.
        with contextlib.suppress(OSError):
            about = os.fstat(int(path.name))
            if stat.S_ISSOCK(about.st_mode):
                found[int(path.name)] = about.st_ino
    return found


def abandon(groups: Sequence[dist.ProcessGroup]) -> None:
    """Makes sure that nothing waits for a peer in these groups any more.

    It comes first when a rank leaves on an error, since threads that are joined may sit in one.
    """
    # On CUDA the training group is there twice: it is that of the small sums too.
    distinct = {id(group): group for group in groups}
    for group in distinct.values():
        # Never given back: gloo's destructor waits for what is in flight, which may never end.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    for group in distinct.values():
        # Destroying an NCCL group after an error can wait for ever.
        if dist.get_backend(group) == "nccl":
            group.abort()
