"""Before a run on several nodes begins: does every node answer in time, with the devices that its ranks need, and does a sum go through?

Owns: that check, which a launcher asks for (`DDP_KIT_PREFLIGHT_S`), and the names of the nodes that failed it, for the next submission.
Refuses: naming all of them: what fails everywhere is not a node's fault.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ddp_kit.distributed.topology import Topology, environment
from ddp_kit.errors import ConfigError, DdpKitError

FILE = "bad_nodes"
PAUSE_S = 0.1
LATER_S = 5.0  # by which others than rank 0 wait longer: its word counts, if it can give one


class NodesError(DdpKitError):
    """Nodes failed the pre-flight check."""


@dataclass(kw_only=True)
class Preflight:
    """One rank's part in the check. Where it is off (`within_s` is 0), nothing is asked and nothing said."""

    topology: Topology
    folder: Path  # the run directory
    within_s: float
    hosts: Mapping[int, str] = field(
        default_factory=dict
    )  # by node rank, where that follows the launcher's order
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
        """Returns how long to wait for peers: what is left of the check, or the usual time without one."""
        return timedelta(seconds=self.left_s) if self.within_s else usual

    def roll_call(self, store: dist.Store, device: torch.device) -> None:
        """Says that this rank is here and on which device, and hears from rank 0 whether all are. Every rank calls it.

        Raises: NodesError on every rank that is here if a node is not, or has too few devices.
        """
        if not self.within_s:
            return
        self.store, own = dist.PrefixStore("ddp_kit_preflight", store), self.topology
        self.store.set(f"size/{own.node_rank}", str(own.local_world_size))
        if self.own_host:
            self.store.set(f"host/{own.node_rank}", self.own_host)
        self.store.set(
            f"device/{own.node_rank}/{own.local_rank}",
            f"no: {self.fault}" if self.fault else _identity(device),
        )
        if own.rank == 0:
            faults = self._faults()
            while faults and self.left_s > 1:
                time.sleep(PAUSE_S)
                faults = self._faults()
            if faults:
                self._write(faults)
            self.store.set("verdict", self._words(faults) if faults else "")
            if faults:
                self._linger()
        self.store.wait(["verdict"], timedelta(seconds=self.left_s))
        if verdict := self.store.get("verdict").decode():
            self.store.add("heard", 1)
            raise NodesError(verdict)

    def _linger(self) -> None:
        """Keeps the store until the others that are here have heard."""
        assert self.store is not None
        sizes = {node: self._size(node) for node in range(self.topology.nodes)}
        here = sum(
            self._has(f"device/{node}/{rank}")
            for node, size in sizes.items()
            for rank in range(size)
        )
        end = time.monotonic() + LATER_S
        while self.store.add("heard", 0) < here - 1 and time.monotonic() < end:
            time.sleep(PAUSE_S)

    def device(self, choose: Callable[[], torch.device]) -> torch.device:
        """Returns this rank's device. In a check one that is not to be had is told to rank 0 first, which knows the node's name."""
        try:
            return choose()
        except ConfigError as error:
            if not self.within_s:
                raise
            self.fault = str(error)
            return torch.device("cpu")

    def try_sum(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Adds up a number over the training group, in the time that is left. Every rank calls it."""
        if self.within_s:
            work = dist.all_reduce(torch.zeros(1, device=device), group=group, async_op=True)
            assert work is not None
            work.wait(timedelta(seconds=self.left_s))
            self.passed("reduced")

    def passed(self, stage: str) -> None:
        """Notes that this rank has come so far."""
        if self.store is not None:
            self.store.add(f"{stage}/{self.topology.node_rank}", 1)

    @contextmanager
    def judging(self) -> Iterator[None]:
        """While the ranks join: says of a failure which nodes it was. Raises: NodesError in its place."""
        try:
            yield
        except NodesError:
            raise
        except (DdpKitError, RuntimeError) as error:  # torch's are RuntimeErrors
            if not self.within_s:
                raise
            raise NodesError(self._judge(error)) from error

    def _judge(self, error: BaseException) -> str:
        faults = {0: "its store was not reached"} if self.store is None else {}
        with contextlib.suppress(dist.DistError):
            faults = faults or self._behind()
        if self.topology.rank == 0 or not (self.folder / FILE).exists():
            self._write(faults)
        return f"{self._words(faults)}{'; ' if faults else ''}{type(error).__name__}: {error}"

    def _behind(self) -> dict[int, str]:
        """Returns the nodes that have not come as far as others: first those whose ranks have not even noticed that something is wrong."""
        end = time.monotonic() + LATER_S
        self.passed("out")
        while self._short_of("out") and time.monotonic() < end:
            time.sleep(PAUSE_S)
        stages = {
            "out": "its ranks hang or are gone",
            "met": "its ranks did not connect",
            "reduced": "its ranks got through no sum",
        }
        for stage, words in stages.items():
            nodes = self._short_of(stage)
            if 0 < len(nodes) < self.topology.nodes:
                return dict.fromkeys(nodes, words)
        return {}

    def _short_of(self, stage: str) -> list[int]:
        return [
            node
            for node in range(self.topology.nodes)
            if self._count(stage, node) < self._size(node)
        ]

    def _faults(self) -> dict[int, str]:
        """Returns what is wrong with which node as far as ranks have come."""
        faults: dict[int, str] = {}
        devices: dict[int, list[str]] = {}
        for node in range(self.topology.nodes):
            size = self._size(node)
            here = [rank for rank in range(size) if self._has(f"device/{node}/{rank}")]
            devices[node] = [self._text(f"device/{node}/{rank}") for rank in here]
            if not here or len(here) < size:
                faults[node] = f"{len(here)} of {size or 'its'} ranks came"
        kinds = {name.partition(" ")[0] for names in devices.values() for name in names}
        for node, names in devices.items():
            lacks = [name for name in names if name.startswith("no: ")] or [
                name for name in names if name == "cpu" and "cuda" in kinds
            ]
            gpus = [name for name in names if name.startswith("cuda ")]
            if lacks:
                faults[node] = f"no CUDA device is visible to {len(lacks)} of its ranks"
            elif len(set(gpus)) < len(gpus):
                faults[node] = f"{len(set(gpus))} CUDA devices for {len(gpus)} ranks"
        return faults

    def _words(self, faults: Mapping[int, str]) -> str:
        named = "; ".join(
            f"{self._host(node) or f'node {node}'}: {words}" for node, words in faults.items()
        )
        return f"the pre-flight check of {self.within_s:.0f} s was not passed. {named}"

    def _write(self, nodes: Collection[int]) -> None:
        if not 0 < len(nodes) < self.topology.nodes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{FILE}.{self.topology.rank}"
        names = [name for node in sorted(nodes) if (name := self._host(node))]
        temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        temporary.replace(self.folder / FILE)

    def _host(self, node: int) -> str:
        """A node's name, as its own ranks or else the launcher has it; "" if nobody has said."""
        with contextlib.suppress(dist.DistError):
            if self.store is not None and self._has(f"host/{node}"):
                return self._text(f"host/{node}")
        return self.hosts.get(node, "")

    def _size(self, node: int) -> int:
        return int(self._text(f"size/{node}")) if self._has(f"size/{node}") else 0

    def _count(self, stage: str, node: int) -> int:
        assert self.store is not None
        return self.store.add(f"{stage}/{node}", 0)

    def _has(self, key: str) -> bool:
        assert self.store is not None
        return self.store.check([key])

    def _text(self, key: str) -> str:
        assert self.store is not None
        return self.store.get(key).decode()


def preflight(topology: Topology, folder: Path | None) -> Preflight:
    """Returns the check that the launcher asked for, off without one, on one node, and for commands without a run directory.

    Raises: ConfigError if DDP_KIT_PREFLIGHT_S is no number.
    """
    text = environment().get("DDP_KIT_PREFLIGHT_S", "")
    try:
        within_s = float(text or 0)
    except ValueError:
        raise ConfigError(f"DDP_KIT_PREFLIGHT_S={text!r} is not a number of seconds.") from None
    is_torchruns = (
        topology.launcher == "torchrun"
    )  # it numbers its nodes in an order of its own, and those that are left anew
    names = (
        []
        if is_torchruns
        else [name for name in environment().get("DDP_KIT_HOSTS", "").split(",") if name]
    )
    host = environment().get("SLURMD_NODENAME", "")
    is_on = topology.nodes > 1 and folder is not None
    within_s = within_s if is_on else 0
    return Preflight(
        topology=topology,
        folder=folder or Path(),
        within_s=within_s,
        hosts=dict(enumerate(names)),
        own_host=host,
    )


def _identity(device: torch.device) -> str:
    """Which device this is, so that ranks on one and the same are seen."""
    return (
        f"cuda {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else "cpu"
    )
