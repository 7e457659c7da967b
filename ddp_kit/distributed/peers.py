"""The processes of a run's ranks: which of them are gone, and which are stopped, as this host sees.

They tell each other who they are as they meet. Of another host's processes nothing is known here.
"""

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from ddp_kit.io.process import is_stopped, pid_namespace, process_start

WIDTH = 512  # bytes of a process's facts: a host's name has 64 at most


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The process of a rank: a later one with its number has another `start`."""

    host: str
    namespace: str
    pid: int
    start: str

    @property
    def is_here(self) -> bool:
        """Whether this host can see it."""
        return (self.host, self.namespace) == (socket.gethostname(), pid_namespace())

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended."""
        # A process that may open no more files cannot look.
        with contextlib.suppress(OSError):
            return self.is_here and process_start(self.pid) != self.start
        return False

    @property
    def is_stopped(self) -> bool:
        """Whether it is known to stand still, by SIGSTOP or a debugger."""
        return self.is_here and is_stopped(self.pid)


def this_process() -> Peer:
    """Returns what a rank tells of itself."""
    pid = os.getpid()
    return Peer(
        host=socket.gethostname(), namespace=pid_namespace(), pid=pid, start=process_start(pid)
    )


def meet(group: dist.ProcessGroup, world_size: int) -> Sequence[Peer]:
    """Returns the processes of all ranks. Every rank calls it; it waits for all of them.

    Args: `group` of gloo, of all ranks.
    """
    text = json.dumps(asdict(this_process())).encode().ljust(WIDTH)
    own = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(every, own, group=group)
    return [Peer(**json.loads(bytes(row.tolist()))) for row in every]
