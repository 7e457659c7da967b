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

from ddp_kit.io.polling import wait_until
from ddp_kit.io.process import is_stopped, pid_namespace, process_start

PAUSE_S = 0.02
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


def gone_of(peers: Sequence[Peer], *, within_s: float) -> list[int]:
    """Returns the ranks whose process is known to have ended; one that was killed is waited for."""
    gone: list[int] = []

    def is_one_gone() -> bool:
        nonlocal gone
        gone = [rank for rank, peer in enumerate(peers) if peer.is_gone]
        return bool(gone)

    wait_until(is_one_gone, within_s=within_s, pause_s=PAUSE_S)
    return gone


def sees_all(peers: Sequence[Peer]) -> bool:
    """Whether all ranks' processes can be seen from here."""
    return bool(peers) and all(peer.is_here for peer in peers)


def living_words(peers: Sequence[Peer]) -> str:
    """Returns what is known of the processes, of which none is gone."""
    stopped = [rank for rank, peer in enumerate(peers) if peer.is_stopped]
    if stopped:
        named = [f"rank {rank} (pid {peers[rank].pid})" for rank in stopped]
        return f"stopped from outside: {', '.join(named)}"
    if sees_all(peers):
        return "every rank's process lives"
    return "no rank's process is known to be gone"
