"""The process groups of a run: made, bounded in time and always destroyed here.

Owns: the training group (nccl on CUDA, gloo on CPU), the gloo groups beside it, and the rank's device.
Refuses: `dist.barrier`, default timeouts, and leaving a group behind: a gloo rank that exits without destroying it aborts.
"""

import ctypes
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ddp_kit.distributed.failures import Blame
from ddp_kit.distributed.gloo_abort import open_sockets, shut_sending
from ddp_kit.distributed.node_check import Preflight, preflight
from ddp_kit.distributed.process_tuning import set_threads, tune_process
from ddp_kit.distributed.rendezvous import gather, hosts_store, meeting
from ddp_kit.distributed.topology import Topology, environment_default, read_topology
from ddp_kit.errors import ConfigError


@dataclass(kw_only=True)
class Group:
    """The ranks of a run as one of them sees them. In one process without a group, all three process groups are None.

    `sums` is for small sums beside backward: on CUDA the training group itself. On a CPU it is one of its own, since after a collective
    that failed unread gloo may let another one of the same group wait until its timeout. Whoever holds the training group (a DDP
    wrapper) registers its release in `closing`: it must be gone before the group is.
    """

    topology: Topology
    device: torch.device
    blame: Blame
    training: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    sums: dist.ProcessGroup | None = None
    timeout_s: float = 600
    tuned: list[str] = field(default_factory=list)  # what of the defaults for speed took effect
    closing: ExitStack = field(default_factory=ExitStack)
    sockets: dict[int, int] = field(
        default_factory=dict
    )  # of the gloo groups: file descriptor -> inode
    has_failed: bool = False  # it is being left on an error: peers may be gone
    unseen: dict[int, Callable[[], None]] = field(
        default_factory=dict
    )  # looks at a last step whose verdict the host has not read
    others: list[dist.ProcessGroup] = field(
        default_factory=list
    )  # of those who communicate beside training

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.topology.rank

    @property
    def world_size(self) -> int:
        """Ranks in the run."""
        return self.topology.world_size

    def end(self) -> None:
        """Reads the verdicts that are left. Every rank calls it before it leaves without an error. Raises: NonFiniteError."""
        for look in list(self.unseen.values()):
            look()

    def settle(self) -> None:
        """Shortens the timeouts once the first step (compilation, first batch) is done. Every rank calls it."""
        for group in self.all:
            _set_timeout(group, timeout_s=self.timeout_s)

    @property
    def all(self) -> list[dist.ProcessGroup]:
        """The process groups that there are."""
        return [
            group
            for group in (self.training, self.control, self.sums, *self.others)
            if group is not None
        ]

    def join_another(self, *, backend: str | None = None) -> dist.ProcessGroup:
        """Returns one more process group of all ranks, of the training group's kind or of `backend`. Every rank calls it.

        Who holds it registers its release in `closing`.
        """
        with self.connecting():
            another = dist.new_group(backend=backend)
            assert isinstance(another, dist.ProcessGroup)  # every rank is in it
            dist.all_reduce(
                torch.zeros(1, device="cpu" if backend == "gloo" else self.device), group=another
            )  # as in `_join`
        self.others.append(another)
        return another

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Notes the connections made within it, which are cut if this rank fails. A library's own process group goes into `others`."""
        before = open_sockets()
        yield
        self.sockets |= {
            descriptor: inode
            for descriptor, inode in open_sockets().items()
            if before.get(descriptor) != inode
        }


def _set_timeout(group: dist.ProcessGroup, *, timeout_s: float) -> None:
    set_timeout = (
        getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    )  # public since torch 2.15
    set_timeout(timedelta(seconds=timeout_s), group)


def choose_device(device: str, *, topology: Topology) -> torch.device:
    """Returns this rank's device: `cuda:(local_rank % visible devices)` or `cpu`.

    Raises: ConfigError if CUDA is asked for and there is none, or the name is not known.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: expected auto, cpu or cuda.")
    visible = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and not visible:
        raise ConfigError(
            "--device cuda: no CUDA device is visible here (torch.cuda.is_available() is False). Type --device cpu, or auto."
        )
    return torch.device("cuda", topology.local_rank % visible) if visible else torch.device("cpu")


@contextmanager
def process_group(
    *,
    topology: Topology | None = None,
    device: str = "auto",
    init_method: str | None = None,
    first_timeout_s: float = 1800,
    timeout_s: float = 600,
    threads: int = 0,
    tuning: bool = True,
    run_dir: Path | None = None,
) -> Iterator[Group]:
    """Joins this process to its peers, and leaves them at the end, error or not. Every rank calls it.

    Args: `topology` read from the environment if not given; `device` auto, cpu or cuda; `init_method` a `file://` address in
        place of the environment's; `first_timeout_s` bounds the waits until `Group.settle`, `timeout_s` those after;
        `threads` CPU threads of this rank (0: its share of the cores); `tuning` switches on the defaults for speed; `run_dir` is
        where a pre-flight check, if the launcher asks for one, leaves the names of bad nodes.
    Yields: the Group. One process that was not started as a rank gets one without process groups.
    """
    topology = read_topology() if topology is None else topology
    check = preflight(topology, run_dir)
    chosen = check.device(lambda: choose_device(device, topology=topology))
    alone = Blame(rank=topology.rank, world_size=topology.world_size)
    group = Group(topology=topology, device=chosen, blame=alone, timeout_s=timeout_s)
    group.tuned = [
        *(tune_process(topology, chosen) if tuning else []),
        f"CPU threads a rank: {set_threads(topology, threads=threads)}",
    ]
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if topology.launcher == "none":
        with group.closing:
            yield group
            group.end()
        return
    with ExitStack() as stack:
        if topology.nodes == 1:
            stack.enter_context(environment_default("GLOO_SOCKET_IFNAME", _loopback()))
        with check.judging():
            _join(
                group,
                init_method=init_method,
                timeout=timedelta(seconds=first_timeout_s),
                check=check,
            )
        try:
            yield group
            group.end()
        except BaseException as error:
            group.blame.tell(
                error
            )  # before the connections close, so that peers find the culprit when they do
            is_awaited = group.blame.is_awaited
            if is_awaited:
                shut_sending(group.sockets)
            _leave(group, failed=True)
            if is_awaited:
                group.blame.linger()
            raise
        _leave(group, failed=False)


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])


def _join(group: Group, *, init_method: str | None, timeout: timedelta, check: Preflight) -> None:
    topology, usual, timeout = group.topology, timeout, check.timeout(timeout)
    with meeting(topology, init_method=init_method, timeout=timeout) as store:
        check.roll_call(store, group.device)
        gather(store, topology, timeout=timeout)
    hosts = init_method is None and hosts_store(topology)
    shared = dist.PrefixStore("ddp_kit_blame", store)
    group.blame = Blame(
        rank=topology.rank, world_size=topology.world_size, store=shared, hosts=hosts
    )
    _make_groups(group, store, timeout=timeout, check=check)
    if timeout != usual:
        store.set_timeout(usual)
        for made in group.all:
            _set_timeout(made, timeout_s=usual.total_seconds())


def _make_groups(group: Group, store: dist.Store, *, timeout: timedelta, check: Preflight) -> None:
    topology, cuda = group.topology, group.device.type == "cuda"
    before = open_sockets()
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("ddp_kit_training", store),
        rank=topology.rank,
        world_size=topology.world_size,
        timeout=timeout,
        device_id=group.device if cuda else None,
    )
    check.passed("met")
    training = dist.group.WORLD
    assert training is not None
    group.training = training
    control = dist.new_group(backend="gloo", timeout=timeout)
    sums = training if cuda else dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)  # every rank is in it
    assert isinstance(sums, dist.ProcessGroup)
    group.control, group.sums = control, sums
    group.sockets = {
        descriptor: inode
        for descriptor, inode in open_sockets().items()
        if before.get(descriptor) != inode
    }
    dist.all_reduce(
        torch.zeros(1), group=control
    )  # nobody leaves while a peer is still connecting: that would fail it
    check.try_sum(training, group.device)


def _leave(group: Group, *, failed: bool) -> None:
    if failed:
        group.has_failed = True
        _abandon(group.all)
    try:
        group.closing.close()
    finally:
        group.unseen.clear()
        group.training = group.control = group.sums = None
        group.others.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def _abandon(groups: Sequence[dist.ProcessGroup]) -> None:
    """Makes sure that nothing waits for a peer in these groups any more: first of all, since threads that are joined may sit in one."""
    distinct = {id(made): made for made in groups}  # on CUDA the sums' is the training group
    for made in distinct.values():
        ctypes.pythonapi.Py_IncRef(
            ctypes.py_object(made)
        )  # gloo's destructor waits for what is in flight, which may never end
    for made in distinct.values():
        if dist.get_backend(made) == "nccl":
            made.abort()  # destroying an NCCL group after an error can wait for ever
