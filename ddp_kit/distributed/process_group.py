"""The process groups of a run: made, bounded in time and always destroyed here.

These are the training group (nccl on CUDA, gloo on CPU) and the gloo groups beside it. Nobody waits
at a `dist.barrier` or with a default timeout, and no group is left behind: a gloo rank that exits
without destroying it aborts.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ddp_kit.distributed.device import choose_device
from ddp_kit.distributed.failures import FailureReport
from ddp_kit.distributed.gloo_abort import Connections, abandon
from ddp_kit.distributed.node_check import NodeCheck, node_check
from ddp_kit.distributed.peers import meet
from ddp_kit.distributed.process_tuning import set_threads, tune_process
from ddp_kit.distributed.pulse import Limits, Pulse
from ddp_kit.distributed.rendezvous import Place, gather, place_of, rendezvous, store_rank
from ddp_kit.distributed.topology import Topology, environment_default, read_topology
from ddp_kit.distributed.waits import set_timeout, wait_for_all

# Of a collective, where nothing else was asked for.
TIMEOUT_S = 600.0


@dataclass(kw_only=True)
class Group:
    """The ranks of a run as one of them sees them.

    In one process without a group, all three process groups are None, and so is the store.

    `sums_pg` is for small sums beside backward: on CUDA the training group itself. On a CPU it is
    one of its own, since after a collective that failed unread gloo may let another one of the same
    group wait until its timeout. Whoever holds the training group (a DDP wrapper) registers its
    release in `closing`: it must be gone before the group is.
    """

    topology: Topology
    device: torch.device
    failure_report: FailureReport
    pg: dist.ProcessGroup | None = None
    control_pg: dist.ProcessGroup | None = None
    sums_pg: dist.ProcessGroup | None = None
    # Those of who communicates beside training.
    others: list[dist.ProcessGroup] = field(default_factory=list)
    timeout_s: float = TIMEOUT_S
    # CPU threads of this rank were stated, and are no share of the cores.
    has_stated_threads: bool = False
    # What of the defaults for speed took effect.
    tuned: list[str] = field(default_factory=list)
    closing: ExitStack = field(default_factory=ExitStack)
    connections: Connections = field(default_factory=Connections)
    has_failed: bool = False  # it is being left on an error: peers may be gone
    # Each looks at a last step whose outcome the host has not read.
    unseen: dict[int, Callable[[], None]] = field(default_factory=dict)
    # Where the main thread is; others look at it.
    pulse: Pulse = field(default_factory=Pulse)
    # The ranks' store, and the rank in which it lives, -1 if that is none.
    store: dist.Store | None = None
    store_rank: int = -1
    # A watchdog looks at the pulse.
    is_watched: bool = False

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.topology.rank

    @property
    def world_size(self) -> int:
        """Ranks in the run."""
        return self.topology.world_size

    def read_unseen(self) -> None:
        """Reads the outcomes of steps that are left unread.

        Every rank calls it before it leaves without an error. Raises: NonFiniteError.
        """
        for look in list(self.unseen.values()):
            look()

    def shorten_timeouts(self) -> None:
        """Shortens the timeouts once the first step (compilation, first batch) is done.

        Every rank calls it.
        """
        for group in self.all:
            set_timeout(group, timeout_s=self.timeout_s)

    def raise_timeouts(self, seconds: float) -> None:
        """Lets collectives wait so long at least, since a watchdog ends them before.

        A timeout that was asked for stays. Any thread may call it.
        """
        if self.timeout_s < TIMEOUT_S or seconds <= self.timeout_s:
            return
        self.timeout_s = seconds
        for group in self.all:
            set_timeout(group, timeout_s=seconds)

    @property
    def all(self) -> list[dist.ProcessGroup]:
        """The process groups that there are."""
        candidates = (self.pg, self.control_pg, self.sums_pg, *self.others)
        return [group for group in candidates if group is not None]

    def join_another(self, *, backend: str | None = None) -> dist.ProcessGroup:
        """Returns one more process group of all ranks. Every rank calls it.

        Who holds it registers its release in `closing`.

        Args: `backend` None: that of the training group.
        """
        with self.connecting():
            another = dist.new_group(backend=backend)
            assert isinstance(another, dist.ProcessGroup)  # every rank is in it
            device = "cpu" if backend == "gloo" else self.device
            wait_for_all(another, device)
        self.others.append(another)
        return another

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Notes the connections made within it, which are cut if this rank fails.

        A library's own process group goes into `others`.
        """
        with self.connections.noting():
            yield


@contextmanager
def process_group(
    *,
    topology: Topology | None = None,
    device: str = "auto",
    init_method: str | None = None,
    first_timeout_s: float = 1800,
    timeout_s: float = TIMEOUT_S,
    hang_timeout_s: float = 0.0,
    threads: int = 0,
    tuning: bool = True,
    run_dir: Path | None = None,
) -> Iterator[Group]:
    """Joins this process to its peers, and leaves them at the end, error or not.

    Every rank calls it.

    Args: `topology` read from the environment if not given; `device` auto, cpu or cuda;
        `init_method` a `file://` address in place of the environment's; `first_timeout_s` bounds
        the waits until `Group.shorten_timeouts`, `timeout_s` those after; `hang_timeout_s` seconds
        without progress in a step after which a rank is taken to hang once `wrap` was called (0:
        10 times the slowest step, at least 60); `threads` CPU threads of
        this rank (0: its share of the cores); `tuning` switches on the defaults for speed;
        `run_dir` is where a node check, if the launcher asks for one, leaves the names of bad
        nodes.
    Yields: the Group. One process that was not started as a rank gets one without process groups.
    Raises: ConfigError for a device that is not to be had, NodesError for nodes that failed the
        check, DdpKitError if rank 0 is not found in time, and what torch raises.
    """
    topology = read_topology() if topology is None else topology
    place = place_of(topology, init_method=init_method)
    check = node_check(topology, run_dir)
    chosen = check.device(lambda: choose_device(device, topology=topology))
    alone = FailureReport(rank=topology.rank, world_size=topology.world_size)
    group = Group(topology=topology, device=chosen, failure_report=alone, timeout_s=timeout_s)
    group.pulse.limits = Limits(step=hang_timeout_s)
    if tuning:
        group.tuned += tune_process(topology, chosen)
    group.has_stated_threads = threads > 0
    group.tuned.append(f"CPU threads a rank: {set_threads(topology, threads=threads)}")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if topology.launcher == "none":
        with group.closing:
            yield group
            group.read_unseen()
        return
    with ExitStack() as stack:
        if topology.nodes == 1:
            stack.enter_context(environment_default("GLOO_SOCKET_IFNAME", loopback()))
        usual = timedelta(seconds=first_timeout_s)
        with _leaving(group):
            with check.judging():
                _join(group, place, init_method=init_method, usual=usual, check=check)
            yield group
            group.read_unseen()


@contextmanager
def _leaving(group: Group) -> Iterator[None]:
    """Leaves the process groups at the end.

    On an error this rank first leaves word: before its connections close, so that peers find whose
    the failure is when they do.
    """
    try:
        yield
    except BaseException as error:
        group.failure_report.tell(error)
        is_awaited = group.failure_report.is_awaited
        if is_awaited:
            group.connections.shut_sending()
        _leave(group, failed=True)
        if is_awaited:
            group.failure_report.linger()
        raise
    _leave(group, failed=False)


def loopback() -> str:
    """Returns the name of the interface that stays on this host."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])


def _join(
    group: Group, place: Place, *, init_method: str | None, usual: timedelta, check: NodeCheck
) -> None:
    """Finds the peers and makes the groups, in the time that the node check leaves, if it is on."""
    topology = group.topology
    timeout = check.timeout(usual)
    with rendezvous(topology, place, init_method=init_method, timeout=timeout) as store:
        check.roll_call(store, group.device)
        gather(store, topology, timeout=timeout)
    group.store = dist.PrefixStore("ddp_kit_threads", store)
    group.store_rank = store_rank(init_method)
    group.failure_report = FailureReport(
        rank=topology.rank,
        world_size=topology.world_size,
        store=dist.PrefixStore("ddp_kit_blame", store),
        hosts=group.store_rank == topology.rank,
        is_rank_0s=group.store_rank == 0,
    )
    group.store = dist.PrefixStore("ddp_kit_threads", store)
    with group.connecting():
        training = _make_training_group(group, store, timeout=timeout)
        check.passed("met")
        _make_small_groups(group, training, timeout=timeout)
    assert group.control_pg is not None
    group.failure_report.peers = meet(group.control_pg, topology.world_size)
    check.try_sum(training, group.device)
    if timeout != usual:
        store.set_timeout(usual)
        for made in group.all:
            set_timeout(made, timeout_s=usual.total_seconds())


def _make_training_group(
    group: Group, store: dist.Store, *, timeout: timedelta
) -> dist.ProcessGroup:
    is_cuda = group.device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=dist.PrefixStore("ddp_kit_training", store),
        rank=group.rank,
        world_size=group.world_size,
        timeout=timeout,
        device_id=group.device if is_cuda else None,
    )
    training = dist.group.WORLD
    assert training is not None
    group.pg = training
    return training


def _make_small_groups(group: Group, training: dist.ProcessGroup, *, timeout: timedelta) -> None:
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)  # every rank is in it
    group.control_pg = control
    group.sums_pg = training
    if group.device.type != "cuda":
        sums = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(sums, dist.ProcessGroup)
        group.sums_pg = sums


def _leave(group: Group, *, failed: bool) -> None:
    if failed:
        group.has_failed = True
        abandon(group.all)
    try:
        group.closing.close()
    finally:
        group.unseen.clear()
        group.pg = group.control_pg = group.sums_pg = None
        group.others.clear()
        group.store = None
        if dist.is_initialized():
            dist.destroy_process_group()
