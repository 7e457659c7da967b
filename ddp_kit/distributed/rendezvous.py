"""Where the ranks of a run find each other: the store that everything else is agreed through.

Owns: who holds the store and on which port. A port that was derived and is taken is no failure: rank 0 tells, at the first of some derived
ports that is free, on which port the store is, and the others ask at all of them.
Refuses: taking another run's store for ours: the answer begins with this job's sign.
"""

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from ddp_kit.distributed.topology import Topology, environment
from ddp_kit.errors import ConfigError, DdpKitError

HERE, ALL = "ddp_kit_here", "ddp_kit_all"
ANSWER_S, PAUSE_S, POLL_S = (
    1.0,
    0.2,
    0.05,
)  # for an answer at a port, between rounds, and to see that the telling is over
LONGEST = 200  # bytes of an answer


def hosts_store(topology: Topology) -> bool:
    """Whether this rank holds the store: rank 0 does, unless torchrun's agent has one."""
    return topology.rank == 0 and not _is_agents()


@contextmanager
def meeting(
    topology: Topology, *, timeout: timedelta, init_method: str | None = None
) -> Iterator[dist.Store]:
    """Yields the store of all ranks, and while it lasts tells those that are still to come where it is. Every rank calls it.

    Args: `init_method` a `file://` address in place of the environment's.
    Raises: ConfigError if no derived port is free, DdpKitError if rank 0 is not found in time, and what torch raises.
    """
    if init_method is not None:
        yield next(
            dist.rendezvous(init_method, topology.rank, topology.world_size, timeout=timeout)
        )[0]
        return
    # the agent's store outlives the ranks, and keeps their addresses; rank 0's does not, and agents of several nodes may count differently
    life = environment().get("TORCHELASTIC_RESTART_COUNT", "0") if _is_agents() else "0"
    with _whole_store(topology, timeout=timeout) as store:
        yield dist.PrefixStore(f"ddp_kit_life_{life}", store)


@contextmanager
def _whole_store(topology: Topology, *, timeout: timedelta) -> Iterator[dist.Store]:
    if _is_agents():  # it listens where torchrun says
        yield next(dist.rendezvous("env://", topology.rank, topology.world_size, timeout=timeout))[
            0
        ]
        return
    host = "127.0.0.1" if topology.nodes == 1 or topology.rank == 0 else topology.master
    is_local = topology.nodes == 1
    if topology.rank and not topology.meeting:
        yield _store(host, topology.port, topology, timeout=timeout)
    elif topology.rank:
        yield _store(
            host, _ask_for_port(host, topology, timeout=timeout), topology, timeout=timeout
        )
    elif not topology.meeting:
        listener = _given_listener(topology.port) or _listen(topology.ports, is_local=is_local)
        yield _store(host, topology.port, topology, timeout=timeout, listener=listener)
    else:
        listener = _listen([0], is_local=is_local)
        port = listener.getsockname()[1]
        with _telling(f"{topology.meeting} {port}\n", _listen(topology.ports, is_local=is_local)):
            yield _store(host, port, topology, timeout=timeout, listener=listener)


def gather(store: dist.Store, topology: Topology, *, timeout: timedelta) -> None:
    """Returns once every rank is connected to the store. Every rank calls it."""
    if store.add(HERE, 1) == topology.world_size:
        store.set(ALL, "")
    store.wait([ALL], timeout)


def _is_agents() -> bool:
    """Whether torchrun's agent holds the store."""
    return environment().get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(
    host: str,
    port: int,
    topology: Topology,
    *,
    timeout: timedelta,
    listener: socket.socket | None = None,
) -> dist.TCPStore:
    """`listener` makes this rank the one that holds it. Nobody waits for the others here: `gather` does."""
    descriptor = listener.detach() if listener is not None else None
    is_host = listener is not None
    return dist.TCPStore(
        host,
        port,
        topology.world_size,
        is_host,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=descriptor,
    )


def _listen(ports: Sequence[int], *, is_local: bool) -> socket.socket:
    """Returns a listener on the first port that is free; torch's own would be open to every interface on one node too."""
    for port in ports:
        try:
            if is_local:
                return socket.create_server(("127.0.0.1", port))
            is_dual = socket.has_dualstack_ipv6()
            return socket.create_server(
                ("", port),
                family=socket.AF_INET6 if is_dual else socket.AF_INET,
                dualstack_ipv6=is_dual,
            )
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise ConfigError(
        f"every port for the ranks to meet is taken: {', '.join(map(str, ports))}. Set MASTER_PORT to a free one for all ranks."
    )


@contextmanager
def _telling(line: str, listener: socket.socket) -> Iterator[None]:
    """Tells everybody who connects, from a thread, one line."""
    is_over = threading.Event()

    def tell() -> None:
        while not is_over.is_set():
            with (
                contextlib.suppress(OSError),
                listener.accept()[0] as peer,
            ):  # nobody came for a while, or somebody has gone
                peer.sendall(line.encode())

    with listener:
        listener.settimeout(POLL_S)
        thread = threading.Thread(target=tell, name="meeting", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def _ask_for_port(host: str, topology: Topology, *, timeout: timedelta) -> int:
    """Returns the port of this job's store, asking at each port where rank 0 may tell it until it does."""
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        for port in topology.ports:
            with (
                contextlib.suppress(OSError),
                socket.create_connection((host, port), timeout=ANSWER_S) as peer,
            ):
                sign, _, found = (
                    peer.makefile(encoding="ascii", errors="replace")
                    .readline(LONGEST)
                    .partition(" ")
                )
                if sign == topology.meeting and found.strip().isdigit():
                    return int(found)
        time.sleep(PAUSE_S)
    ports = ", ".join(map(str, topology.ports))
    raise DdpKitError(
        f"rank 0 was not found on {host}, ports {ports}, within {timeout.total_seconds():.0f} s."
    )


def _given_listener(port: int) -> socket.socket | None:
    """Returns the listener that `ddp-kit run` has opened for rank 0, so that nobody else could take the port; None if it was used."""
    given = environment().get("DDP_KIT_LISTENER", "")
    with contextlib.suppress(OSError):
        listener = socket.socket(fileno=os.dup(int(given))) if given else None
        if listener is not None and listener.getsockname()[1] == port:
            os.close(int(given))
            return listener
    return None
