"""`ddp-kit doctor` on forked ranks, each with a fault of its own, and the checks that came of it."""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ddp_kit.testing import start_ranks

LIMIT_S = 40.0


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What a doctor found: exit codes by rank, and rank 0's checks by name."""

    codes: list[int]
    checks: Mapping[str, Mapping[str, str]]
    is_go: bool

    def verdict(self, name: str) -> str:
        return self.checks[name]["verdict"]

    def figure(self, name: str) -> str:
        return self.checks[name]["figure"]

    @property
    def failed(self) -> list[str]:
        return [name for name, check in self.checks.items() if check["verdict"] == "FAIL"]


def other_version() -> None:
    torch.__version__ = "9.9.9"  # type: ignore[assignment]  # a text to all who read it


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def wrong_chip() -> None:
    right = torch.mm
    calls = []

    def wrong(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        found = right(left, other)
        found.view(torch.int32)[0, 0] ^= int(len(calls) == 3)
        return found

    torch.mm = wrong


def wrong_clock() -> None:
    real = time.time
    time.time = lambda: real() + 3600


def wrong_sum() -> None:
    from ddp_kit.cli.doctor import network

    reduced = network._reduced

    def wrong(values: torch.Tensor, op: Any, **more: Any) -> None:
        reduced(values, op, **more)
        values[-1] += int(len(values) > 1)

    network._reduced = wrong


def never_comes() -> None:
    time.sleep(LIMIT_S)


def hangs() -> None:
    """As on a file server that does not answer."""
    from ddp_kit.cli.doctor import command, disk

    command.LATER_S = 0.2
    disk.try_disk = lambda home: time.sleep(LIMIT_S)  # type: ignore[assignment,return-value]


def stops() -> None:
    """As a machine does that hangs, once all have answered."""
    from ddp_kit.cli.doctor import network

    network.try_sum = lambda *args, **more: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore[assignment,return-value]


def own_node() -> None:
    """Each rank on a node of its own, which is this one."""
    os.environ["LOCAL_RANK"] = "0"
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"


FAULTS = {
    fault.__name__: fault
    for fault in (
        other_version,
        few_files,
        wrong_chip,
        wrong_clock,
        wrong_sum,
        never_comes,
        hangs,
        stops,
        own_node,
    )
}


def doctor_on_rank(argv: list[str], faults: Mapping[int, list[str]]) -> None:
    rank = int(os.environ["RANK"])
    for name in (*faults.get(-1, []), *faults.get(rank, [])):
        FAULTS[name]()
    from ddp_kit.cli.main import main

    sys.exit(main(["doctor", "--json", *argv]))


def examine(*argv: str, world_size: int = 2, **faults: str) -> Examined:
    """Runs a doctor. `rank_1="few_files"`: what is wrong with rank 1; `all="own_node"`: with each.

    Of ranks that never come, or stop, there is no exit code.
    """
    by_rank = {-1: faults.pop("all", "").split()}
    for name, fault in faults.items():
        by_rank[int(name.removeprefix("rank_"))] = fault.split()
    with start_ranks(
        doctor_on_rank, world_size, list(argv), by_rank, group=False, deadline_s=LIMIT_S
    ) as ranks:
        absent = (["stops"], ["never_comes"])
        awaited = [rank for rank in range(world_size) if by_rank.get(rank) not in absent]
        end = time.monotonic() + LIMIT_S
        while set(awaited) & set(ranks.living) and time.monotonic() < end:
            ranks.pool.receive(0.05)
        for rank in ranks.living:
            ranks.kill(rank)
        reports = ranks.wait()
    text = reports[0].output
    found = json.loads(text[text.index("{") :]) if "{" in text else {"checks": [], "go": False}
    return Examined(
        codes=[reports[rank].exit_code for rank in awaited],
        checks={check["name"]: check for check in found["checks"]},
        is_go=found["go"],
    )
