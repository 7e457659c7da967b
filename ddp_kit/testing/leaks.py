"""What a test has left behind in its process: threads, child processes, process groups, environment variables, files.

Owns: taking stock and naming the difference. Refuses: cleaning up; whoever made it does that.
"""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ddp_kit.distributed.topology import environment

# Set or started once by a library and kept for the process's life by design.
LIBRARIES_VARIABLES = (
    "PYTEST_",
    "TORCHINDUCTOR_",
    "_TORCHINDUCTOR_",
    "TRITON_",
    "KINETO_",
    "KMP_",
    "COV_CORE_",
)
LIBRARIES_PROCESSES = (
    "ddp_kit.testing.server",
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "compile_worker",
)
LIBRARIES_THREADS = ("pytest_timeout", "pydevd", "execnet", "InductorSubproc", "tqdm_monitor")
CACHES = ("__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".coverage")


@dataclass(frozen=True, kw_only=True)
class Stock:
    """What a process has at one moment: its threads, its children by pid, its groups, variables, and the files in its folder."""

    threads: frozenset[threading.Thread]
    processes: Mapping[int, str]
    groups: frozenset[str]
    variables: Mapping[str, str]
    folder: Path
    files: frozenset[str]


def take_stock() -> Stock:
    """Returns what this process has now."""
    folder = Path.cwd()
    return Stock(
        threads=frozenset(thread for thread in threading.enumerate() if _is_own(thread)),
        processes=_children(),
        groups=_groups(),
        variables={
            name: value
            for name, value in environment().items()
            if not name.startswith(LIBRARIES_VARIABLES)
        },
        folder=folder,
        files=frozenset(path.name for path in folder.iterdir() if not path.name.startswith(CACHES)),
    )


def leaks_since(before: Stock, *, wait_s: float = 1.0) -> list[str]:
    """Returns a line for each thing that was not there before, waiting up to `wait_s` seconds for threads and children about to end."""
    now = take_stock()
    if _is_busier(now, before):
        gc.collect()  # a loader's workers end when its iterator is collected
        end = time.monotonic() + wait_s
        while _is_busier(now := take_stock(), before) and time.monotonic() < end:
            time.sleep(0.02)
    return _difference(before, now)


def _is_busier(now: Stock, before: Stock) -> bool:
    return bool(now.threads - before.threads or now.processes.keys() - before.processes.keys())


def _difference(before: Stock, now: Stock) -> list[str]:
    found = [
        f"leaked thread: {thread.name!r}{' (daemon)' if thread.daemon else ''}"
        for thread in sorted(now.threads - before.threads, key=lambda thread: thread.name)
    ]
    found += [
        f"leaked process: pid {pid}: {now.processes[pid]}"
        for pid in sorted(now.processes.keys() - before.processes.keys())
    ]
    found += [f"leaked process group: {name}" for name in sorted(now.groups - before.groups)]
    for name in sorted(before.variables.keys() | now.variables.keys()):
        if before.variables.get(name) != now.variables.get(
            name
        ):  # names only: values may be secrets
            change = (
                "set"
                if name not in before.variables
                else "unset"
                if name not in now.variables
                else "changed"
            )
            found.append(f"environment variable left {change}: {name}")
    if now.folder != before.folder:
        found.append(f"working directory left changed: {before.folder} -> {now.folder}")
    else:
        found += [
            f"file left in the working directory: {name}"
            for name in sorted(now.files - before.files)
        ]
    return found


def _is_own(thread: threading.Thread) -> bool:
    return not isinstance(thread, threading._DummyThread) and not thread.name.startswith(
        LIBRARIES_THREADS
    )


def _groups() -> frozenset[str]:
    distributed = sys.modules.get("torch.distributed.distributed_c10d")
    if distributed is None:
        return frozenset()
    world = distributed._world  # torch has no public list of groups
    return frozenset(
        f"{world.pg_names[group]} ({world.pg_map[group][0]})"
        for group in list(world.pg_map)
        if group in world.pg_names
    )


def _children() -> dict[int, str]:
    """Returns the living children of this process and the members of its session (children whose parent has ended), by pid."""
    own = os.getpid()
    table = _process_table()
    children = {
        pid: command
        for pid, (parent, session, command) in table.items()
        if own in (parent, session) and pid != own
    }
    return {
        pid: command
        for pid, command in children.items()
        if not any(name in command for name in LIBRARIES_PROCESSES)
    }


def _process_table() -> dict[int, tuple[int, int, str]]:
    """Returns pid -> (parent, session, command); zombies and processes that end meanwhile are left out."""
    if not Path("/proc/self/stat").exists():
        return _process_table_of_ps()
    table = {}
    own = os.getpid()
    for entry in os.listdir("/proc"):  # noqa: PTH208  # a tenth of Path.iterdir's time, paid twice by every test
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:  # noqa: PTH123  # as above
                state, parent, _, session = file.read().rpartition(b")")[2].split()[:4]
            if state == b"Z" or own not in (int(parent), int(session)):
                continue
            command = (
                Path(f"/proc/{entry}/cmdline")
                .read_bytes()
                .replace(b"\0", b" ")
                .decode(errors="replace")
                .strip()
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
        table[int(entry)] = (int(parent), int(session), command)
    return table


def _process_table_of_ps() -> dict[int, tuple[int, int, str]]:
    table = {}
    listing = subprocess.run(
        ["ps", "-axo", "pid=,ppid=,stat=,command="], capture_output=True, text=True, check=True
    ).stdout
    for line in listing.splitlines():
        pid, parent, state, command = line.split(maxsplit=3)
        if not state.startswith("Z") and "ps -axo" not in command:
            table[int(pid)] = (int(parent), 0, command)
    return table
