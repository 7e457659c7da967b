"""What a group of ranks is told: a file, beside which each rank writes what it has to say.

The files hold pickles, so they must come from nowhere else: one user's pytest writes and reads them
within one private folder.
"""

import contextlib
import importlib
import os
import pickle
import random
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ddp_kit.distributed.topology import environment
from ddp_kit.testing.pytest_parts import rewritten_modules
from ddp_kit.testing.report import RankReport

AGENTS_VARIABLES = (
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT",
)
# Ports for ranks to meet at, and Linux's first one of those that it hands out to connections.
LOWEST = 10_000
LOWEST_HANDED_OUT = 32_768


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all ranks of a test share: the call (pickled), and the pytest process's state.

    `changes` are made to the environment, None unsets a variable. Raises: ValueError for a
    `world_size` below 1.
    """

    call: bytes
    world_size: int
    has_group: bool
    deadline_s: float
    changes: InitVar[Mapping[str, str | None]] = MappingProxyType({})
    variables: Mapping[str, str] = field(init=False)
    port: int = field(default_factory=lambda: _free_port())
    path: list[str] = field(default_factory=lambda: list(sys.path))
    argv: list[str] = field(default_factory=lambda: list(sys.argv))
    folder: str = field(default_factory=os.getcwd)
    modules: Mapping[str, str] = field(default_factory=rewritten_modules)
    filters: bytes = field(default_factory=lambda: pickle.dumps(list(warnings.filters)))
    options: Mapping[str, object] = field(
        default_factory=lambda: {"verbose": 0, "tbstyle": "auto", "showlocals": False}
    )

    def __post_init__(self, changes: Mapping[str, str | None]) -> None:
        if self.world_size < 1:
            raise ValueError(f"world_size={self.world_size}: expected at least 1")
        object.__setattr__(self, "variables", environment_for_ranks(changes))

    def variables_of(self, rank: int) -> dict[str, str]:
        """Returns a rank's environment: torchrun's variables for one node; the test's own win."""
        size = str(self.world_size)
        torchrun = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }
        return {**torchrun, **self.variables}


@dataclass(frozen=True)
class Body:
    """A test function by name: the ranks import it themselves.

    `qualname` may name a method; its class is then instantiated.
    """

    module: str
    qualname: str

    def __call__(self, **arguments: object) -> None:
        """Runs the test's body."""
        owner: Any = importlib.import_module(self.module)
        *outer, name = self.qualname.split(".")
        for outer_name in outer:
            owner = getattr(owner, outer_name)
        if isinstance(owner, type):
            owner = owner()
        getattr(owner, name)(**arguments)


@dataclass(frozen=True)
class Stand:
    """Stands for an argument that each rank makes for itself: `group` or `monkeypatch`."""

    name: str


def environment_for_ranks(changes: Mapping[str, str | None]) -> dict[str, str]:
    """Returns this process's environment for ranks, one thread each; None unsets a variable."""
    kept = {name: value for name, value in environment().items() if name not in AGENTS_VARIABLES}
    merged = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", **kept, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def pack(function: Callable[..., object], *args: object, **kwargs: object) -> bytes:
    """Returns a call as bytes.

    Raises: TypeError naming what cannot be sent to another process.
    """
    function_name = getattr(function, "__qualname__", function)
    named: dict[str, object] = {f"function {function_name!r}": function}
    named |= {f"argument {i}": value for i, value in enumerate(args)}
    named |= {f"argument {name!r}": value for name, value in kwargs.items()}
    for what, value in named.items():
        try:
            pickle.dumps(value)
        except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError) as error:
            raise TypeError(
                f"{what} ({type(value).__name__}) cannot be sent to the ranks, which are processes "
                f"of their own: {error}. Expected a function at the top level of a module, and "
                "values that pickle; make everything else inside the body."
            ) from error
    return pickle.dumps((function, args, kwargs))


class Files:
    """The files of one group of ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job = folder / "job"
        self.store = folder / "store"

    def output(self, rank: int) -> Path:
        """What a rank printed."""
        return self.folder / f"rank-{rank}.output"

    def stacks(self, rank: int) -> Path:
        """Where `faulthandler` writes a rank's stacks."""
        return self.folder / f"rank-{rank}.stacks"

    def report(self, rank: int) -> Path:
        """A rank's RankReport; not there if it ended without a word."""
        return self.folder / f"rank-{rank}.report"

    def write_report(self, report: RankReport) -> None:
        """Writes a report whole or not at all."""
        temporary = self.report(report.rank).with_suffix(".tmp")
        temporary.write_bytes(pickle.dumps(report))
        temporary.replace(self.report(report.rank))


def _free_port() -> int:
    """Returns a port that is free until rank 0 listens there: one that the kernel hands out might
    meanwhile become some connection's own.
    """
    top = LOWEST_HANDED_OUT
    with contextlib.suppress(OSError):
        top = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        # not of the generator that a test may have seeded
        port = random.SystemRandom().randrange(LOWEST, max(top, LOWEST + 10_000))
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
