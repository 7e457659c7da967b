"""Before a run on several nodes begins: is every node there, and does it work?

Each has to answer in time, with the devices that its ranks need, and a sum has to go through. A
launcher asks for this check (`DDP_KIT_PREFLIGHT_S`). The names of the nodes that failed it are left
in the run directory for the next submission, but never those of all nodes: what fails everywhere is
not a node's fault.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ddp_kit.distributed.topology import Topology, environment
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.io.atomic import make_private_folder, write_text
from ddp_kit.io.polling import wait_until

FILE = "bad_nodes"
PAUSE_S = 0.1
# By which others than rank 0 wait longer: its word counts, if it can give one.
LATER_S = 5.0
# How far the ranks of a node come, and what is wrong with one that stays behind. The first is no
# step forward: who does not even notice that something is wrong, hangs.
STAGES = {
    "out": "its ranks hang or are gone",
    "met": "its ranks did not connect",
    "reduced": "its ranks got through no sum",
}


class NodesError(DdpKitError):
    """Nodes failed the pre-flight check."""


@dataclass(kw_only=True)
class NodeCheck:
    """One rank's part in the check.

    Where it is off (`within_s` is 0), nothing is asked and nothing said.
    """

    topology: Topology
    folder: Path  # the run directory
    within_s: float
    # The nodes' names by node rank, where that follows the launcher's order.
    hosts: Mapping[int, str] = field(default_factory=dict)
    own_host: str = ""  # as the scheduler calls it; "" without one
    fault: str = ""  # of this rank's device
    begin: float = field(default_factory=time.monotonic)
    store: dist.Store | None = None

    @property
    def left_s(self) -> float:
        """Seconds until the check is over, at least one."""
        later = LATER_S if self.topology.rank else 0
        return max(1.0, self.begin + self.within_s + later - time.monotonic())

    def timeout(self, usual: timedelta) -> timedelta:
        """Returns how long to wait for peers: what is left of the check, or `usual` without one."""
        if not self.within_s:
            return usual
        return timedelta(seconds=self.left_s)

    def roll_call(self, store: dist.Store, device: torch.device) -> None:
        """Says that this rank is here and on which device, and hears from rank 0 whether all are.

        Every rank calls it.

        Raises: NodesError on every rank that is here if a node is not, or has too few devices.
        """
        if not self.within_s:
            return
        self.store = dist.PrefixStore("ddp_kit_preflight", store)
        self._answer(self.store, device)
        if self.topology.rank == 0:
            self._call(self.store)
        self.store.wait(["verdict"], timedelta(seconds=self.left_s))
        verdict = self.store.get("verdict").decode()
        if verdict:
            self.store.add("heard", 1)
            raise NodesError(verdict)

    def _answer(self, store: dist.Store, device: torch.device) -> None:
        """Says who is here; `_faults` reads it."""
        own = self.topology
        store.set(f"size/{own.node_rank}", str(own.local_world_size))
        if self.own_host:
            store.set(f"host/{own.node_rank}", self.own_host)
        found = f"no: {self.fault}" if self.fault else identity(device)
        store.set(f"device/{own.node_rank}/{own.local_rank}", found)

    def _call(self, store: dist.Store) -> None:
        """Waits for the answers of all ranks and tells them what came of it."""
        faults = self._faults()
        while faults and self.left_s > 1:
            time.sleep(PAUSE_S)
            faults = self._faults()
        if not faults:
            store.set("verdict", "")
            return
        self._write(faults)
        store.set("verdict", self._words(faults))
        self._linger(store)

    def _linger(self, store: dist.Store) -> None:
        """Keeps the store until the others that are here have heard."""
        others = -1
        for node in range(self.topology.nodes):
            others += len(self._here(node))
        wait_until(lambda: store.add("heard", 0) >= others, within_s=LATER_S, pause_s=PAUSE_S)

    def device(self, choose: Callable[[], torch.device]) -> torch.device:
        """Returns this rank's device; rank 0, which names nodes, is told if there is none.

        Args: `choose` returns the device, or raises ConfigError.
        """
        try:
            return choose()
        except ConfigError as error:
            if not self.within_s:
                raise
            self.fault = str(error)
            return torch.device("cpu")

    def try_sum(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Adds up a number over the training group, in the time that is left.

        Every rank calls it.
        """
        if not self.within_s:
            return
        work = dist.all_reduce(torch.zeros(1, device=device), group=group, async_op=True)
        assert work is not None
        work.wait(timedelta(seconds=self.left_s))
        self.passed("reduced")

    def passed(self, stage: str) -> None:
        """Notes that this rank has come so far, to a stage of STAGES."""
        if self.store is not None:
            self.store.add(f"{stage}/{self.topology.node_rank}", 1)

    @contextmanager
    def judging(self) -> Iterator[None]:
        """While the ranks join: says of a failure which nodes it was.

        Raises: NodesError in its place.
        """
        try:
            yield
        except NodesError:
            raise
        except (DdpKitError, RuntimeError) as error:  # torch's are RuntimeErrors
            if not self.within_s:
                raise
            raise NodesError(self._judge(error)) from error

    def _judge(self, error: BaseException) -> str:
        faults: dict[int, str] = {}
        if self.store is None:
            faults[0] = "its store was not reached"
        else:
            with contextlib.suppress(dist.DistError):
                faults = self._behind()
        if self.topology.rank == 0 or not (self.folder / FILE).exists():
            self._write(faults)
        separator = "; " if faults else ""
        return f"{self._words(faults)}{separator}{type(error).__name__}: {error}"

    def _behind(self) -> dict[int, str]:
        """Returns the nodes that have not come as far as others."""
        self.passed("out")
        wait_until(lambda: not self._short_of("out"), within_s=LATER_S, pause_s=PAUSE_S)
        for stage, words in STAGES.items():
            nodes = self._short_of(stage)
            if 0 < len(nodes) < self.topology.nodes:
                return dict.fromkeys(nodes, words)
        return {}

    def _short_of(self, stage: str) -> list[int]:
        nodes = range(self.topology.nodes)
        return [node for node in nodes if self._count(stage, node) < self._size(node)]

    def _faults(self) -> dict[int, str]:
        """Returns what is wrong with which node as far as ranks have come."""
        faults: dict[int, str] = {}
        devices: dict[int, list[str]] = {}
        has_cuda = False
        for node in range(self.topology.nodes):
            size = self._size(node)
            here = self._here(node)
            devices[node] = [self._text(f"device/{node}/{rank}") for rank in here]
            has_cuda |= any(name.startswith("cuda ") for name in devices[node])
            if not here or len(here) < size:
                faults[node] = f"{len(here)} of {size or 'its'} ranks came"
        for node, names in devices.items():
            wrong = wrong_devices(names, others_have_cuda=has_cuda)
            if wrong:
                faults[node] = wrong
        return faults

    def _here(self, node: int) -> list[int]:
        """Returns the local ranks of a node that have answered."""
        ranks = range(self._size(node))
        return [rank for rank in ranks if self._has(f"device/{node}/{rank}")]

    def _words(self, faults: Mapping[int, str]) -> str:
        named = []
        for node, words in faults.items():
            host = self._host(node) or f"node {node}"
            named.append(f"{host}: {words}")
        listed = "; ".join(named)
        return f"the pre-flight check of {self.within_s:.0f} s was not passed. {listed}"

    def _write(self, nodes: Collection[int]) -> None:
        """Leaves the nodes' names, a line each, unless all of them failed."""
        if not 0 < len(nodes) < self.topology.nodes:
            return
        make_private_folder(self.folder)
        names = [self._host(node) for node in sorted(nodes)]
        write_text(self.folder / FILE, "".join(f"{name}\n" for name in names if name))

    def _host(self, node: int) -> str:
        """A node's name, as its own ranks or else the launcher has it; "" if nobody has said."""
        with contextlib.suppress(dist.DistError):
            if self.store is not None and self._has(f"host/{node}"):
                return self._text(f"host/{node}")
        return self.hosts.get(node, "")

    def _size(self, node: int) -> int:
        if not self._has(f"size/{node}"):
            return 0
        return int(self._text(f"size/{node}"))

    def _count(self, stage: str, node: int) -> int:
        assert self.store is not None
        return self.store.add(f"{stage}/{node}", 0)

    def _has(self, key: str) -> bool:
        assert self.store is not None
        return self.store.check([key])

    def _text(self, key: str) -> str:
        assert self.store is not None
        return self.store.get(key).decode()


def node_check(topology: Topology, folder: Path | None) -> NodeCheck:
    """Returns the check that the launcher asked for.

    It is off without that, on one node, and for commands without a run directory.

    Raises: ConfigError if DDP_KIT_PREFLIGHT_S is no number.
    """
    text = environment().get("DDP_KIT_PREFLIGHT_S", "")
    try:
        within_s = float(text or 0)
    except ValueError:
        raise ConfigError(f"DDP_KIT_PREFLIGHT_S={text!r} is not a number of seconds.") from None
    if topology.nodes == 1 or folder is None:
        within_s = 0
    names: list[str] = []
    # Torchrun numbers its nodes in an order of its own, and those that are left anew.
    if topology.launcher != "torchrun":
        names = [name for name in environment().get("DDP_KIT_HOSTS", "").split(",") if name]
    return NodeCheck(
        topology=topology,
        folder=folder or Path(),
        within_s=within_s,
        hosts=dict(enumerate(names)),
        own_host=environment().get("SLURMD_NODENAME", ""),
    )


def identity(device: torch.device) -> str:
    """Returns which device this is, so that ranks on one and the same are seen."""
    if device.type != "cuda":
        return "cpu"
    return f"cuda {torch.cuda.get_device_properties(device).uuid}"


def wrong_devices(names: Sequence[str], *, others_have_cuda: bool) -> str:
    """Returns what is wrong with the devices (as `identity` has them) of a node, "" if nothing."""
    lacking = sum(name.startswith("no: ") for name in names)
    if not lacking and others_have_cuda:
        lacking = names.count("cpu")
    if lacking:
        return f"no CUDA device is visible to {lacking} of its ranks"
    gpus = [name for name in names if name.startswith("cuda ")]
    distinct = len(set(gpus))
    if distinct < len(gpus):
        return f"{distinct} CUDA devices for {len(gpus)} ranks"
    return ""
