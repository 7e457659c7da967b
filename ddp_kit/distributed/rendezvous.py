"""Where the ranks of a run find each other: the store that everything else is agreed through.

A port that was derived and is taken is no failure: rank 0 tells, at the first of some derived ports
that is free, on which port the store is, and the others ask at all of them. The answer begins with
this job's sign, so that no other run's store is taken for ours.

A process may meet its peers again, for a second run. Their store stays, since its port could be
another's by then, and each meeting has names of its own in it.
"""

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ddp_kit.distributed.topology import Topology, environment
from ddp_kit.errors import ConfigError, DdpKitError

HERE = "ddp_kit_here"
ALL = "ddp_kit_all"
ANSWER_S = 1.0  # for an answer at a port
WAIT_S = 1.0  # for the others, until signals are looked at
PAUSE_S = 0.2  # between rounds of asking
POLL_S = 0.05  # to see that the telling is over
LONGEST = 200  # bytes of an answer


def store_rank(init_method: str | None) -> int:
    """Returns the rank in which the store lives, -1 if that is torchrun's agent or a file."""
    return -1 if init_method is not None or is_agents_store() else 0


@dataclass
class Place:
    """Where this process has met its peers: how often, and in which store."""

    meetings: int = 0
    store: dist.Store | None = None


# By process, since a fork has none of its parent's connections, and by address. They live as long
# as the process does.
_places: dict[tuple[int, str], Place] = {}


def place_of(topology: Topology, *, init_method: str | None = None) -> Place:
    """Returns where this process meets its peers, with one more meeting counted: every rank calls
    it as often, also where what follows fails on it.
    """
    address = init_method
    if address is None:
        address = f"{topology.rendezvous_host}:{topology.port} {topology.meeting}"
    place = _places.setdefault((os.getpid(), address), Place())
    place.meetings += 1
    return place


@contextmanager
def rendezvous(
    topology: Topology, place: Place, *, timeout: timedelta, init_method: str | None = None
) -> Iterator[dist.Store]:
    """Yields the store of all ranks, with names for this meeting alone.

    While it lasts, those that are still to come are told where it is. Every rank calls it.

    Args: `place` where they meet; `init_method` a `file://` address in place of the environment's.
    Raises: ConfigError if no derived port is free, DdpKitError if rank 0 is not found in time, and
        what torch raises.
    """
    meeting = f"ddp_kit_meeting_{place.meetings}"
    if init_method is not None:
        store = _torchs_store(init_method, topology, timeout=timeout)
        yield dist.PrefixStore(meeting, store)
        return
    # The agent's store outlives the ranks, and keeps their addresses. Rank 0's does not, and agents
    # of several nodes may count differently.
    life = "0"
    if is_agents_store():
        life = environment().get("TORCHELASTIC_RESTART_COUNT", "0")
    with _whole_store(topology, place, timeout=timeout) as store:
        yield dist.PrefixStore(meeting, dist.PrefixStore(f"ddp_kit_life_{life}", store))


@contextmanager
def _whole_store(topology: Topology, place: Place, *, timeout: timedelta) -> Iterator[dist.Store]:
    if place.store is not None:
        place.store.set_timeout(timeout)
        yield place.store
        return
    with _new_store(topology, timeout=timeout) as store:
        yield store
        # All ranks have it.
        place.store = store


@contextmanager
def _new_store(topology: Topology, *, timeout: timedelta) -> Iterator[dist.Store]:
    if is_agents_store():  # it listens where torchrun says
        yield _torchs_store("env://", topology, timeout=timeout)
        return
    is_local = topology.nodes == 1
    host = topology.rendezvous_host
    if is_local or topology.rank == 0:
        host = "127.0.0.1"
    if topology.rank:
        port = topology.port
        if topology.meeting:
            port = _ask_for_port(host, topology, timeout=timeout)
        yield _store(host, port, topology, timeout=timeout)
    elif not topology.meeting:
        listener = _given_listener(topology.port) or _listen(topology.ports, is_local=is_local)
        yield _store(host, topology.port, topology, timeout=timeout, listener=listener)
    else:
        listener = _listen([0], is_local=is_local)
        port = listener.getsockname()[1]
        with _telling(f"{topology.meeting} {port}\n", _listen(topology.ports, is_local=is_local)):
            yield _store(host, port, topology, timeout=timeout, listener=listener)


def _torchs_store(address: str, topology: Topology, *, timeout: timedelta) -> dist.Store:
    found = dist.rendezvous(address, topology.rank, topology.world_size, timeout=timeout)
    store: dist.Store = next(found)[0]
    return store


def gather(store: dist.Store, topology: Topology, *, timeout: timedelta) -> None:
    """Returns once every rank is connected to the store. Every rank calls it.

    Signals are heard of meanwhile: one wait in C takes WAIT_S at most.
    """
    if store.add(HERE, 1) == topology.world_size:
        store.set(ALL, "")
    end = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            store.wait([ALL], timedelta(seconds=min(WAIT_S, timeout.total_seconds())))
            return
        except dist.DistStoreError:
            if time.monotonic() >= end:
                raise


def is_agents_store() -> bool:
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
    """Returns this rank's end of the store; nobody waits for the others here: `gather` does.

    Args: `listener` makes this rank the one that holds the store.
    """
    return dist.TCPStore(
        host,
        port,
        topology.world_size,
        listener is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def _listen(ports: Sequence[int], *, is_local: bool) -> socket.socket:
    """Returns a listener on the first port that is free.

    Torch's own would be open to every interface on one node too.

    Raises: ConfigError if every port is taken.
    """
    for port in ports:
        try:
            return _listen_at(port, is_local=is_local)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise ConfigError(
        f"every port for the ranks to meet is taken: {', '.join(map(str, ports))}."
        " Set MASTER_PORT to a free one for all ranks."
    )


def _listen_at(port: int, *, is_local: bool) -> socket.socket:
    if is_local:
        return socket.create_server(("127.0.0.1", port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port), family=socket.AF_INET)


@contextmanager
def _telling(line: str, listener: socket.socket) -> Iterator[None]:
    """Tells everybody who connects, from a thread, one line."""
    is_over = threading.Event()

    def tell() -> None:
        while not is_over.is_set():
            # Nobody came for a while, or somebody has gone.
            with contextlib.suppress(OSError), listener.accept()[0] as peer:
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
    """Returns the port of this job's store.

    It asks at each port where rank 0 may tell it, until it does.

    Raises: DdpKitError if nobody has told it in time.
    """
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        for port in topology.ports:
            sign, _, found = _answer_at(host, port).partition(" ")
            if sign == topology.meeting and found.strip().isdigit():
                return int(found)
        time.sleep(PAUSE_S)
    ports = ", ".join(map(str, topology.ports))
    raise DdpKitError(
        f"rank 0 was not found on {host}, ports {ports}, within {timeout.total_seconds():.0f} s."
    )


def _answer_at(host: str, port: int) -> str:
    """Returns the line that is told at a port, "" where nobody tells anything."""
    with (
        contextlib.suppress(OSError),
        socket.create_connection((host, port), timeout=ANSWER_S) as peer,
    ):
        return peer.makefile(encoding="ascii", errors="replace").readline(LONGEST)
    return ""


def _given_listener(port: int) -> socket.socket | None:
    """Returns the listener that `ddp-kit run` has opened for rank 0, None if there is none.

    It is opened so early that nobody else could take the port. Once used it is closed.
    """
    given = environment().get("DDP_KIT_LISTENER", "")
    if not given:
        return None
    with contextlib.suppress(OSError):
        listener = socket.socket(fileno=os.dup(int(given)))
        if listener.getsockname()[1] == port:
            os.close(int(given))
            return listener
    return None
