"""What one process can find out by itself: versions, limits, cores, devices, a repeated product."""

import os
import resource
import socket
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from ddp_kit.distributed.device import choose_device
from ddp_kit.distributed.node_check import identity
from ddp_kit.distributed.process_tuning import set_threads
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError
from ddp_kit.io.cgroup import own_cgroup
from ddp_kit.lifecycle.env_facts import environment_facts
from ddp_kit.stopping.grace_period import given_grace

SHARED = Path("/dev/shm")
# Of a product: on a CPU some milliseconds, on a GPU enough to have it at work.
SIDE = {"cpu": 384, "cuda": 4096}
REPEATS = 5


def process_facts(topology: Topology, device: torch.device, *, fault: str) -> dict[str, object]:
    """Returns the facts of this rank as JSON values.

    Args: `fault` is why there is no device.
    """
    # As a run would have them.
    threads = set_threads(topology)
    known = environment_facts(topology, device)
    has_s, giver = given_grace(topology)
    return {
        "versions": known["versions"],
        "environment": known["environment"],
        "host": socket.gethostname(),
        "topology": {**asdict(topology), "source": {}},
        "device": f"no: {fault}" if fault else identity(device),
        "visible": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "limits": limits(),
        "cores": cores(),
        "threads": threads,
        "product": product(device),
        "grace": {"has_s": has_s, "giver": giver},
    }


def device_of(topology: Topology) -> tuple[torch.device, str]:
    """Returns the device that a run would take here, and what is wrong with it."""
    try:
        device = choose_device("auto", topology=topology)
    except ConfigError as error:
        return torch.device("cpu"), str(error)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device, ""


def limits() -> dict[str, object]:
    """Returns what the system allows: open files, processes, shared memory. None: no limit."""
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    found: dict[str, object] = {
        "files": _limit(files),
        "most_files": _limit(most_files),
        "processes": _processes_left(),
        "shared_free": 0,
        "shared_size": 0,
    }
    if SHARED.is_dir():
        about = os.statvfs(SHARED)
        found["shared_free"] = about.f_bavail * about.f_frsize
        found["shared_size"] = about.f_blocks * about.f_frsize
    return found


def _limit(number: int) -> int | None:
    return None if number == resource.RLIM_INFINITY else number


def _processes_left() -> int | None:
    """How many processes and threads may still be started here, as far as there is a limit."""
    left = []
    own = own_cgroup("pids")
    if own is not None:
        most = own.number("pids.max")
        if most is not None:
            left.append(max(0, most - (own.number("pids.current") or 0)))
    by_user = _limit(resource.getrlimit(resource.RLIMIT_NPROC)[0])
    # It does not bind root.
    if by_user is not None and os.geteuid():
        left.append(by_user)
    return min(left, default=None)


def cores() -> float:
    """Returns the cores that this process may use, by its affinity and its cgroup's share."""
    usable = float(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        usable = float(len(os.sched_getaffinity(0)))
    share = _share_of_cores()
    return usable if share is None else min(usable, share)


def _share_of_cores() -> float | None:
    own = own_cgroup("cpu")
    if own is None:
        return None
    quota = own.number("cpu.cfs_quota_us")
    period = own.number("cpu.cfs_period_us")
    path = own.folder / "cpu.max"
    if own.version == 2 and path.exists():
        words = path.read_text().split()
        quota = int(words[0]) if words[0].isdigit() else None
        period = int(words[1])
    if quota is None or not period:
        return None
    return quota / period


def product(device: torch.device) -> Mapping[str, object]:
    """Returns whether a repeated matrix product has the same bits each time, and which."""
    side = SIDE[device.type]
    draws = torch.Generator().manual_seed(7)
    left = torch.randn(side, side, generator=draws).to(device)
    right = torch.randn(side, side, generator=draws).to(device)
    first = torch.mm(left, right)
    begin = time.perf_counter()
    is_same = True
    for _ in range(REPEATS):
        # The comparison waits for the device.
        is_same &= torch.equal(torch.mm(left, right), first)
    seconds = (time.perf_counter() - begin) / REPEATS
    where = "cpu"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return {
        "is_same": bool(is_same),
        "bits": zlib.crc32(first.cpu().numpy().tobytes()),
        "where": where,
        "tflops": 2 * side**3 / seconds / 1e12,
    }
