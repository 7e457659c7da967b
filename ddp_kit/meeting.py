"""Where the ranks of a run find each other: the store that everything else is agreed through.

Owns: who holds the store and on which port; a port that was derived and is taken is no failure.
Refuses: taking another run's store for ours: what a derived port leads to must show this job's sign.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from ddp_kit.blame import without_stderr
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.topology import Topology, environment

SIGN, HERE, ALL = "ddp_kit_meeting", "ddp_kit_here", "ddp_kit_all"
PROBE_S, ANSWER_S, PAUSE_S = 1.0, 5.0, 0.2  # for a connection, for a store's answer, between rounds


def hosts_store(topology: Topology) -> bool:
    """Whether this rank holds the store: rank 0 does, unless torchrun's agent has one."""
    return topology.rank == 0 and not _is_agents()


def open_store(topology: Topology, *, timeout: timedelta) -> dist.Store:
    """Returns the store of all ranks. Every rank calls it.

    Raises: ConfigError if no derived port is free, DdpKitError if rank 0 is not found in time, and what torch raises.
    """
    if _is_agents():  # it listens where torchrun says
        agents: dist.Store = next(dist.rendezvous("env://", topology.rank, topology.world_size, timeout=timeout))[0]
        return agents
    ports = topology.ports
    if hosts_store(topology):
        listener = _given_listener(topology.port) or _listen(ports, is_local=topology.nodes == 1)
        store = _store("127.0.0.1", listener.getsockname()[1], topology, timeout=timeout, listener=listener)
        store.set(SIGN, topology.meeting)
        return store
    host = "127.0.0.1" if topology.nodes == 1 else topology.master
    if len(ports) == 1:
        return _store(host, topology.port, topology, timeout=timeout)
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        for port in ports:
            if (found := _probe(host, port, topology)) is not None:
                found.set_timeout(timeout)
                return found
        time.sleep(PAUSE_S)
    raise DdpKitError(f"rank 0 was not found on {host}, ports {', '.join(map(str, ports))}, within {timeout.total_seconds():.0f} s.")


def gather(store: dist.Store, topology: Topology, *, timeout: timedelta) -> None:
    """Returns once every rank is connected to the store. Every rank calls it."""
    if store.add(HERE, 1) == topology.world_size:
        store.set(ALL, "")
    store.wait([ALL], timeout)


def _is_agents() -> bool:
    """Whether torchrun's agent holds the store."""
    return environment().get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(host: str, port: int, topology: Topology, *, timeout: timedelta, listener: socket.socket | None = None) -> dist.TCPStore:
    """`listener` makes this rank the one that holds it. Nobody waits for the others here: `gather` does."""
    descriptor = listener.detach() if listener is not None else None
    is_host = listener is not None
    return dist.TCPStore(host, port, topology.world_size, is_host, timeout=timeout, wait_for_workers=False, master_listen_fd=descriptor)


def _listen(ports: Sequence[int], *, is_local: bool) -> socket.socket:
    """Returns a listener on the first port that is free; torch's own would be open to every interface on one node too."""
    for port in ports:
        try:
            if is_local:
                return socket.create_server(("127.0.0.1", port))
            is_dual = socket.has_dualstack_ipv6()
            return socket.create_server(("", port), family=socket.AF_INET6 if is_dual else socket.AF_INET, dualstack_ipv6=is_dual)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise ConfigError(
        f"every port for the ranks to meet is taken: {', '.join(map(str, ports))}. Set MASTER_PORT to a free one for all ranks."
    )


def _probe(host: str, port: int, topology: Topology) -> dist.TCPStore | None:
    """Returns the store of this job, None if nobody listens, or somebody else."""
    with contextlib.suppress(OSError, dist.DistError, RuntimeError), without_stderr():
        socket.create_connection((host, port), timeout=PROBE_S).close()
        store = _store(host, port, topology, timeout=timedelta(seconds=ANSWER_S))
        if store.check([SIGN]) and store.get(SIGN).decode() == topology.meeting:
            return store
    return None


def _given_listener(port: int) -> socket.socket | None:
    """Returns the listener that `ddp-kit run` has opened for rank 0, so that nobody else could take the port; None if it was used."""
    given = environment().get("DDP_KIT_LISTENER", "")
    with contextlib.suppress(OSError):
        listener = socket.socket(fileno=os.dup(int(given))) if given else None
        if listener is not None and listener.getsockname()[1] == port:
            os.close(int(given))
            return listener
    return None
